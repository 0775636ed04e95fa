"""What a release must be: builds the sdist and the wheels from a clean tree, and checks them.

python tools/check_distributions.py                    # build in a temporary folder, check, install
python tools/check_distributions.py dist/*             # only check what was built elsewhere
python tools/check_distributions.py --tag v0.1.0 ...   # and that this is the version to release

The sdist holds every file of the repository and is the same bytes when built twice; the wheels are
built from it. A wheel holds the package and nothing else, needs no library but libc's, and, where
it says manylinux, no newer one than that. Needs the extra `release`, git, and on Linux readelf.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "npclip/kernels/npclip_cpu.so"
SOURCES_OF_THE_LIBRARY = (".c", ".h", "CMakeLists.txt")
LIBC = {
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "libc.musl-x86_64.so.1",
}
MIB = 1 << 20
LARGEST = {"sdist": 16 * MIB, "wheel": 10 * MIB, "installed": 14 * MIB}


def run(*command: str | Path, cwd: Path = ROOT, **env: str | None) -> str:
    """stdout of a command; a variable of the environment that is None is taken out of it."""
    variables = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def check(right: object, message: str) -> None:
    """Ends the program with the message where it is not right."""
    if not right:
        raise SystemExit(f"check_distributions: {message}")


def check_size(what: str, size: int) -> None:
    """Prints the size of something in LARGEST, and checks it."""
    print(f"  {what}: {size / MIB:.2f} MiB")
    check(size <= LARGEST[what], f"{what} of more than {LARGEST[what] / MIB:.0f} MiB")


def same_names(what: str, found: set[str], expected: set[str]) -> None:
    """That the files of a distribution are those expected, each and no other."""
    check(not expected - found, f"{what} lacks {sorted(expected - found)}")
    check(not found - expected, f"{what} should not have {sorted(found - expected)}")


def repository_files() -> set[str]:
    """Of the commit that is checked out."""
    return set(run("git", "ls-tree", "-r", "--name-only", "HEAD").splitlines())


def package_files() -> set[str]:
    """What every wheel installs, under the names that it has there."""
    wanted = (name for name in repository_files() if not name.endswith(SOURCES_OF_THE_LIBRARY))
    names = (re.sub("^kernels/", "npclip/kernels/", name) for name in wanted)
    return {name for name in names if name.startswith("npclip/")}


def version() -> str:
    """The project's; all files that name it must agree."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', text, re.M)[1]
    others = {"npclip/__init__.py": f'__version__ = "{found}"', "CITATION.cff": f"version: {found}"}
    for name, line in others.items():
        lines = (ROOT / name).read_text().splitlines()
        check(line in lines, f"{name} is not of version {found}")
    return found


def check_tag(tag: str) -> None:
    """That the tag is of this version, and that the changelog has a section for it."""
    check(tag == f"v{version()}", f"the tag {tag} is not v{version()}")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heading = rf"^## \[{re.escape(version())}\] - \d{{4}}-\d\d-\d\d$"
    check(re.search(heading, changelog, re.M), f"CHANGELOG.md has no dated section {version()}")


def check_metadata(what: str, text: str) -> None:
    """Of a wheel or an sdist."""
    metadata = Parser().parsestr(text)
    check(metadata["Name"] == "npclip", f"{what} is of {metadata['Name']}")
    check(metadata["Version"] == version(), f"{what} is of version {metadata['Version']}")
    licences = set(metadata.get_all("License-File") or [])
    expected = {"LICENSE", "NOTICE", "npclip/bpe_simple_vocab_16e6.LICENSE"}
    check(licences == expected, f"{what} has the licences {licences}")


def check_sdist(path: Path) -> None:
    """Names, metadata, size."""
    print(path.name)
    root = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name for member in archive if not member.isdir()}
        check_metadata(path.name, archive.extractfile(f"{root}/PKG-INFO").read().decode())
    files = repository_files() | {"PKG-INFO"}
    same_names(path.name, names, {f"{root}/{name}" for name in files})
    check_size("sdist", path.stat().st_size)


def check_wheel(path: Path) -> bool:
    """Names, tag, metadata, size, the library; returns whether there is one."""
    print(path.name)
    name, of_version, python, abi, tag = path.stem.split("-")
    check((python, abi) == ("py3", "none"), f"{path.name} is not for every Python")
    info, native = f"{name}-{of_version}.dist-info", tag != "any"
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    names = {name for name in contents if not name.startswith(info) and not name.endswith("/")}
    same_names(path.name, names, package_files() | ({LIBRARY} if native else set()))
    check_metadata(path.name, contents[f"{info}/METADATA"].decode())
    licences = ("LICENSE", "NOTICE", "npclip/bpe_simple_vocab_16e6.LICENSE")
    for licence in licences:
        check(f"{info}/licenses/{licence}" in contents, f"{path.name} lacks {licence}")
    tags = re.findall("^Tag: (.+)$", contents[f"{info}/WHEEL"].decode(), re.M)
    expected = {f"py3-none-{part}" for part in tag.split(".")}
    check(set(tags) == expected, f"{path.name} says that it is for {tags}")
    check_size("wheel", path.stat().st_size)
    check_size("installed", sum(map(len, contents.values())))
    if native and "linux" in tag:
        check_library(path, tag)
    return native


def check_library(path: Path, tag: str) -> None:
    """That the kernels need libc alone, and no newer one than the wheel's tag promises."""
    if sys.platform != "linux":
        return print("  the library: not checked, which takes Linux")
    with tempfile.TemporaryDirectory() as work, zipfile.ZipFile(path) as archive:
        dynamic = run("readelf", "-d", archive.extract(LIBRARY, work))
    needed = set(re.findall(r"NEEDED.+\[(.+)\]", dynamic))
    check(needed <= LIBC, f"the library needs {needed - LIBC}")
    check("RUNPATH" not in dynamic and "RPATH" not in dynamic, "the library has a search path")
    report = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", path))
    runs_on = report["overall_tag"]
    print("  the library runs on", runs_on)
    check(not report["unsupported_isa"], f"{path.name} needs more than the baseline of x86-64")
    promised = libc_versions(tag)
    wrong = f"{path.name} runs on {runs_on}, not on {tag}"
    check(not promised or libc_versions(runs_on) <= promised, wrong)


def libc_versions(tag: str) -> list[tuple[str, int, int]]:
    """The oldest libc of a platform tag: [("manylinux", 2, 28)]; none of "linux_x86_64"."""
    found = re.findall(r"(manylinux|musllinux)_(\d+)_(\d+)_", tag)
    return sorted((libc, int(major), int(minor)) for libc, major, minor in found)[:1]


def check_compile_commands(path: Path) -> None:
    """That no source is compiled for the machine that compiles, and cpu.c for any x86-64."""
    commands = {entry["file"]: entry["command"] for entry in json.loads(path.read_text())}
    flags = {Path(file).name: re.findall(r" -m\S+", line) for file, line in commands.items()}
    check(flags["cpu.c"] == [], f"cpu.c is compiled with {flags['cpu.c']}")
    for name, of_file in flags.items():
        wrong = [flag for flag in of_file if re.match(" -m(arch|cpu|tune)", flag)]
        check(not wrong, f"{name} is compiled with {wrong}")


def build(kind: str, tree: Path, out: Path, *options: str, **env: str | None) -> Path:
    """The sdist or the wheel of a tree."""
    run(sys.executable, "-m", "build", f"--{kind}", "--outdir", out, *options, tree, **env)
    (built,) = out.iterdir()
    return built


def install(wheel: Path, python: Path, backend: str, *options: str) -> None:
    """Into an environment, where it must compute."""
    command = "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"
    run(python, "-m", "pip", *command, *options, wheel)
    # elsewhere than ROOT, whose npclip would hide the installed one
    print(" ", run(python, ROOT / "tests" / "smoke.py", backend, cwd=wheel.parent).strip())


def build_all(work: Path) -> None:
    """The sdist, twice; from it the wheel of this machine and the pure one; checks them all."""
    for tree in ("tree", "again"):
        run("git", "clone", "--quiet", ROOT, work / tree)
    sdist = build("sdist", work / "tree", work / "sdist")
    again = build("sdist", work / "again", work / "sdist-again")
    check(sdist.read_bytes() == again.read_bytes(), "the sdist is other bytes each time")
    check_sdist(sdist)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "source")
    (source,) = (work / "source").iterdir()
    pure = build("wheel", source, work / "pure", CC="false", CI=None)
    check(not check_wheel(pure), "without a compiler there is a library")
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install(pure, python, "numpy")
    if sys.platform == "win32" or platform.machine() not in ("x86_64", "AMD64"):
        return print("no kernels for this machine")
    made = work / "cmake"
    options = f"-Cbuild-dir={made}", "-Ccmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON"
    wheel = build("wheel", source, work / "wheel", *options, CI="true")
    check(check_wheel(wheel), "the wheel has no library")
    check_compile_commands(made / "compile_commands.json")
    install(wheel, python, "kernels", "--no-deps", "--force-reinstall")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, pure, wheel)


def main(argv: Sequence[str] | None = None) -> None:
    """Ends with exit code 1 and a message at the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("built", nargs="*", type=Path, help="sdist and wheels to check")
    parser.add_argument("--tag", help="the git tag that is released")
    args = parser.parse_args(argv)
    print("npclip", version())
    if args.tag:
        check_tag(args.tag)
    if not args.built:
        with tempfile.TemporaryDirectory() as work:
            return build_all(Path(work))
    for path in args.built:
        (check_wheel if path.suffix == ".whl" else check_sdist)(path.resolve())
    run(sys.executable, "-m", "twine", "check", "--strict", *map(Path.resolve, args.built))


if __name__ == "__main__":
    main()
