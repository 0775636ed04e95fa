"""tools/check_distributions.py on wheels with something wrong; .ci/run has it build real ones."""

import re
import zipfile

import check_distributions as checks
import pytest
from check_distributions import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
VERSION = checks.version()
LICENCES = ["LICENSE", "NOTICE", "npclip/bpe_simple_vocab_16e6.LICENSE"]


def metadata(version, licences):
    fields = [("Metadata-Version", "2.4"), ("Name", "npclip"), ("Version", version)]
    fields += [("License-File", licence) for licence in licences]
    return "".join(f"{name}: {value}\n" for name, value in fields)


@pytest.fixture
def wheel(tmp_path):
    """Makes a wheel of empty files, with what is given different from what it should be."""

    def make(without=(), also=(), version=VERSION, licences=LICENCES, tag="any", says=""):
        path = tmp_path / f"npclip-{VERSION}-py3-none-{tag}.whl"
        info = f"npclip-{VERSION}.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            for name in (checks.package_files() - set(without)) | set(also):
                archive.writestr(name, "")
            for licence in LICENCES:
                archive.writestr(f"{info}/licenses/{licence}", "")
            archive.writestr(f"{info}/METADATA", metadata(version, licences))
            archive.writestr(f"{info}/WHEEL", f"Tag: py3-none-{says or tag}\n")
        return path

    return make


def test_a_pure_wheel_as_it_should_be(wheel):
    assert checks.check_wheel(wheel()) is False


def test_a_wheel_with_a_library_as_it_should_be(wheel):
    assert checks.check_wheel(wheel(also=[checks.LIBRARY], tag="macosx_11_0_x86_64")) is True


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"without": ["npclip/py.typed"]}, r"lacks \['npclip/py.typed'\]"),
        ({"without": ["npclip/kernels/linear.cu"]}, "lacks"),
        ({"also": ["tests/test_clip.py"]}, r"should not have \['tests/test_clip.py'\]"),
        ({"also": [checks.LIBRARY]}, "should not have"),
        ({"also": ["npclip/kernels/gemm.c"]}, "should not have"),
        ({"version": "9.9"}, "of version 9.9"),
        ({"licences": LICENCES[:1]}, "has the licences"),
        ({"tag": "win_amd64"}, "lacks"),
        ({"says": "linux_x86_64"}, "says that it is for"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_wheel_is_said(wheel, wrong, message):
    with pytest.raises(SystemExit, match=message):
        checks.check_wheel(wheel(**wrong))


@pytest.mark.parametrize("tag", ["v9.9.9", VERSION, f"v{VERSION}rc1"])
def test_another_tag_is_refused(tag):
    with pytest.raises(SystemExit, match=re.escape(f"the tag {tag} is not v")):
        checks.check_tag(tag)


def test_a_version_needs_a_dated_section_in_the_changelog(tmp_path, monkeypatch):
    for name in ("pyproject.toml", "CITATION.cff", "npclip/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    with pytest.raises(SystemExit, match="no dated section"):
        checks.check_tag(f"v{VERSION}")
    (tmp_path / "CHANGELOG.md").write_text(f"## [{VERSION}] - 2030-01-02\n")
    checks.check_tag(f"v{VERSION}")
    (tmp_path / "CITATION.cff").write_text("version: 0.0.0\n")
    with pytest.raises(SystemExit, match=r"CITATION.cff is not of version"):
        checks.version()


def test_libc_versions():
    both = "manylinux_2_27_x86_64.manylinux_2_28_x86_64"
    assert checks.libc_versions(both) == [("manylinux", 2, 27)]
    assert checks.libc_versions("manylinux_2_34_x86_64") > checks.libc_versions(both)
    assert checks.libc_versions("linux_x86_64") == []


@pytest.mark.parametrize("flag", ["-march=native", "-mtune=native", "-mcpu=native"])
def test_flags_of_the_machine_that_compiles_are_refused(tmp_path, flag):
    file = tmp_path / "compile_commands.json"
    entry = '{{"file": "/x/{}", "command": "cc {} -c {}"}}'
    file.write_text(f"[{entry.format('cpu.c', '', '')}, {entry.format('gemm.c', '-mavx2', flag)}]")
    with pytest.raises(SystemExit, match=r"gemm\.c is compiled with"):
        checks.check_compile_commands(file)
    file.write_text(f"[{entry.format('cpu.c', '-mavx2', '')}]")
    with pytest.raises(SystemExit, match=r"cpu\.c is compiled with"):
        checks.check_compile_commands(file)
