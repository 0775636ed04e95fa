"""CUDA C++ into machine code: NVIDIA's run-time compiler (NVRTC), called through ctypes.

Needs neither a GPU nor a driver nor CuPy: two shared libraries and CUDA's headers, which
`pip install 'npclip[cuda12]'` (or cuda13) brings. What it compiles for a GPU is kept on disk.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

from .errors import BackendError, NpclipError
from .whole_file import replacing

OPTIONS = ("-std=c++17", "-default-device", "-ftz=true")  # ftz: as CuPy compiles, too
INSTALL = "pip install 'npclip[cuda12]' (CUDA 12) or 'npclip[cuda13]' (CUDA 13) brings it"

TOOLKITS = ("/usr/local/cuda",)
SYSTEM = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")

TEGRA = 72, 87, 101  # architectures whose code no other device runs

_LOCK = RLock()  # NVRTC and ptxas share state within a process
_FILE = re.compile(r"libnvrtc\.so(\.[\d.]+)?|nvrtc64_\d+_\d+\.dll")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a GPU, as ptxas reports it."""

    registers: int  # per thread
    spill_bytes: int  # stores and loads of registers that did not fit
    stack_bytes: int
    shared_bytes: int  # static shared memory per block


@dataclass(frozen=True)
class Program:
    """A compiled source."""

    binary: bytes  # a cubin, or the text of PTX
    log: str
    usage: dict[str, Usage]  # by kernel; empty for PTX


def libraries() -> list[Path]:
    """The NVRTC libraries found here, newest CUDA version first.

    $NPCLIP_NVRTC, where set, is the list (separated as PATH is). Otherwise: what cuda.pathfinder
    finds, NVIDIA's wheels in sys.path, and the usual places of a CUDA toolkit.
    """
    if named := os.environ.get("NPCLIP_NVRTC"):
        return [Path(name) for name in named.split(os.pathsep) if name]
    found: dict[Path, Path] = {}
    for path in (*_from_pathfinder(), *_from_folders()):
        found.setdefault(path.resolve(), path)
    return sorted(found.values(), key=cuda_version, reverse=True)


def compile(
    source: str, arch: str, options: Sequence[str] = (), library: Path | None = None
) -> Program:
    """Compile for arch: sm_80 gives a cubin, compute_80 PTX; library: the first of libraries().

    Raises BackendError, with the compiler's log, where the source is wrong.
    """
    nvrtc = _Library.of(library)
    arguments = [f"-arch={arch}", *OPTIONS, "--ptxas-options=-v", f"-I{nvrtc.headers}", *options]
    with _LOCK:
        return nvrtc.compile(source, arch, arguments)


def target(capability: tuple[int, int], library: Path | None = None) -> str:
    """The best architecture of this NVRTC that a device of this compute capability runs: "80".

    That is one of the same major version and at most its minor one. BackendError if none is.
    """
    nvrtc = _Library.of(library)
    major, minor = capability
    fitting = [
        arch
        for arch in nvrtc.architectures
        if 0 <= arch - 10 * major <= minor and (arch not in TEGRA or arch == 10 * major + minor)
    ]
    if not fitting:
        known = ", ".join(map(str, nvrtc.architectures))
        raise BackendError(
            f"{nvrtc.path} (CUDA {nvrtc.version}) does not compile for compute capability "
            f"{major}.{minor}, only for: {known}. Another CUDA version may"
        )
    return str(max(fitting))


def version(library: Path | None = None) -> str:
    """The CUDA version of this NVRTC, as it says itself: "12.9"."""
    return _Library.of(library).version


def key(source: str, arch: str, version: str) -> str:
    """A name for what a compiler of that version makes of a source: of all that it depends on.

    The headers' path is no part of it.
    """
    import hashlib

    return hashlib.sha256("\0".join((source, arch, version, *OPTIONS)).encode()).hexdigest()


def cubin(source: str, arch: str, library: Path | None = None) -> Path:
    """The file of a source compiled for arch ("sm_80"), which is compiled once and then kept.

    It lies in kernels/ of the cache folder of hub.py, or in a temporary folder where that cannot
    be written. Several processes may ask at once.
    """
    nvrtc = _Library.of(library)
    name = f"{key(source, arch, nvrtc.version)}.cubin"
    folder = _cache_folder()
    if folder is not None and _is_whole(folder / name):
        return folder / name
    if _is_whole(_temporary_folder() / name):
        return _temporary_folder() / name
    binary = compile(source, arch, library=nvrtc.path).binary
    if folder is not None:
        with suppress(OSError):
            return _write(folder / name, binary)
    return _write(_temporary_folder() / name, binary)


class _Library:
    """One NVRTC, loaded, with the headers of its version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._builtins = _load_builtins(path.parent)
            self._c: Any = ctypes.CDLL(str(path))
            self._c.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise BackendError(f"cannot load NVRTC from {path}: {error}. {INSTALL}") from error
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = list(known)
        self.headers = _headers(path, major.value)

    @staticmethod
    def of(path: Path | None) -> _Library:
        with _LOCK:
            if path is not None:
                return _load(path)
            found = libraries()
            if not found:
                raise BackendError(f"CUDA's compiler NVRTC is not installed. {INSTALL}")
            error: BackendError | None = None
            for path in found:  # a newer toolkit may be there without its headers
                try:
                    return _load(path)
                except BackendError as reason:
                    error = error or reason
            assert error is not None
            raise error

    def compile(self, source: str, arch: str, options: list[str]) -> Program:
        program = ctypes.c_void_p()
        reference = ctypes.byref(program)
        text = source.encode()
        self._call("nvrtcCreateProgram", reference, text, b"kernel.cu", 0, None, None)
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._c.nvrtcCompileProgram(program, len(options), array)
            log = self._text("nvrtcGetProgramLog", program).decode(errors="replace")
            if code:
                reason = self._c.nvrtcGetErrorString(code).decode()
                raise BackendError(f"{self.path} for {arch}: {reason}\n{log}")
            kind = "CUBIN" if arch.startswith("sm_") else "PTX"
            binary = self._text(f"nvrtcGet{kind}", program)
        finally:
            self._c.nvrtcDestroyProgram(reference)
        return Program(binary.rstrip(b"\0") if kind == "PTX" else binary, log, _usage(log))

    def _text(self, function: str, program: ctypes.c_void_p) -> bytes:
        """What function(program, char *) writes; the log comes without its final zero."""
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.raw.rstrip(b"\0") if function == "nvrtcGetProgramLog" else text.raw

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._c, function)(*arguments)
        if code:
            reason = self._c.nvrtcGetErrorString(code).decode()
            raise BackendError(f"{self.path}: {function}: {reason}")


def _load_builtins(folder: Path) -> list[Any]:
    """What NVRTC opens by name as it compiles, and not every wheel of it finds beside itself."""
    if sys.platform == "win32":
        return [os.add_dll_directory(str(folder.resolve()))]
    files = sorted(folder.glob("libnvrtc-builtins.so.*"))
    return [ctypes.CDLL(str(file)) for file in files if not file.is_symlink()]


@cache
def _load(path: Path) -> _Library:
    return _Library(path)


def _from_pathfinder() -> Iterator[Path]:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception:  # its own error types, of which not all versions have the same
        return
    if path:
        yield Path(path)


def _from_folders() -> Iterator[Path]:
    """Of NVIDIA's wheels, a conda environment, a toolkit, the system."""
    wheels = ("cuda_nvrtc/lib", "cuda_nvrtc/bin", "cu*/lib", "cu*/bin", "cu*/bin/x86_64")
    for entry in sys.path:
        nvidia = Path(entry or ".", "nvidia")
        if nvidia.is_dir():
            for wheel in wheels:
                for folder in nvidia.glob(wheel):
                    yield from _libraries_in(folder)
    prefixes = [os.environ.get(name, "") for name in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")]
    prefixes += [sys.prefix, *TOOLKITS]
    places = ("lib64", "lib", "targets/*/lib", "bin", "bin/x64", "Library/bin")
    for prefix in dict.fromkeys(filter(None, prefixes)):
        for place in places:
            for folder in Path(prefix).glob(place):
                yield from _libraries_in(folder)
    loader = os.environ.get("PATH" if sys.platform == "win32" else "LD_LIBRARY_PATH", "")
    for entry in filter(None, (*loader.split(os.pathsep), *SYSTEM)):
        yield from _libraries_in(Path(entry))


def _libraries_in(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        names = [name for name in os.listdir(folder) if _FILE.fullmatch(name)]
        yield from (folder / name for name in sorted(names, reverse=True))


def cuda_version(path: Path) -> tuple[int, ...]:
    """(12, 9, 86) of libnvrtc.so.12.9.86, or of a link to it; (12, 0) of nvrtc64_120_0.dll."""
    name = path.resolve().name
    if windows := re.fullmatch(r"nvrtc64_(\d+)(\d)_\d+\.dll", name):
        return int(windows[1]), int(windows[2])
    return tuple(int(part) for part in re.findall(r"\d+", name))


def _headers(library: Path, major: int) -> Path:
    """The include folder that came with this NVRTC, or another of its CUDA major version."""
    for path in dict.fromkeys((library, library.resolve())):
        for parent in list(path.parents)[1:4]:
            for inside in ("include", "cuda_runtime/include", "targets/x86_64-linux/include"):
                if _has_headers(parent / inside, major):
                    return parent / inside
    for folder in _other_headers():
        if _has_headers(folder, major):
            return folder
    raise BackendError(
        f"the headers of CUDA {major} (cuda_fp16.h) are not installed, which {library} needs. "
        f"{INSTALL.replace('it', 'them')}"
    )


def _other_headers() -> Iterator[Path]:
    with suppress(ImportError):
        from cuda.pathfinder import find_nvidia_header_directory

        with suppress(Exception):
            if folder := find_nvidia_header_directory("cudart"):
                yield Path(folder)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        if root := os.environ.get(name):
            yield Path(root) / "include"


def _has_headers(folder: Path, major: int) -> bool:
    if not (folder / "cuda_fp16.h").is_file():
        return False
    with suppress(OSError):
        text = (folder / "cuda_runtime_api.h").read_text(errors="replace")
        if version := re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text):
            return int(version[1]) // 1000 == major
    return False


_PTXAS = re.compile(
    r"entry function '(?P<kernel>\w+)' for '\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:, (?P<shared>\d+) bytes smem[^\n]*)?(?:\n|$)",
    re.DOTALL,
)


def _usage(log: str) -> dict[str, Usage]:
    return {
        kernel["kernel"]: Usage(
            registers=int(kernel["registers"]),
            spill_bytes=int(kernel["stores"]) + int(kernel["loads"]),
            stack_bytes=int(kernel["stack"]),
            shared_bytes=int(kernel["shared"] or 0),
        )
        for kernel in _PTXAS.finditer(log)
    }


def _cache_folder() -> Path | None:
    from .hub import cache_directory

    try:
        return cache_directory() / "kernels"
    except NpclipError:  # no home directory
        return None


@cache
def _temporary_folder() -> Path:
    """This process's own, removed at its end: nobody else can have put files there."""
    import atexit
    import shutil

    folder = tempfile.mkdtemp(prefix="npclip-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write(path: Path, binary: bytes) -> Path:
    """Whole whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as stream:
            stream.write(binary)
    except PermissionError:  # Windows: another process wrote it and has it open
        if not _is_whole(path):
            raise
    return path


def _is_whole(path: Path) -> bool:
    """Whether a cubin, which is an ELF file, holds all that its header announces."""
    try:
        binary = path.read_bytes()
    except OSError:
        return False
    if len(binary) < 64 or binary[:4] != b"\x7fELF":
        return False

    def number(offset: int, size: int) -> int:
        return int.from_bytes(binary[offset : offset + size], "little")

    segments = number(32, 8) + number(54, 2) * number(56, 2)
    sections = number(40, 8) + number(58, 2) * number(60, 2)
    return max(segments, sections) <= len(binary)
