"""Runs CUDA kernels on the CPU: their source compiled by a C++ compiler, with shim.h for CUDA.

    statistics = shim.run(launch)                        # writes into the launch's arrays
    shim.run(launch, order=7)                            # threads and blocks in another order
    shim.run_sanitized([launch], "thread")               # races, however the threads ran
    shim.run_sanitized([launch], "address,undefined")    # accesses outside arrays, misalignment

Any object with .source and .symbol will do as launch.kernel. What shim.h finds wrong is a
KernelError, what a sanitizer finds a SanitizerError, and arguments that do not fit the kernel's
parameters are an ArgumentError. shim.h tells how it works and what it cannot find.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from npclip.cuda_launch import Launch

HEADER = Path(__file__).with_name("shim.h")
# AVX2 and F16C: conversions of half precision would take most of the time without. The kernels
# look at values through pointers of other types, as CUDA allows.
FLAGS = ("-std=c++17", "-mavx2", "-mfma", "-mf16c", "-fno-strict-aliasing", "-w", "-DNPCLIP_SHIM")
LIBRARY_FLAGS = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden")
PROGRAM_FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-DSHIM_PROGRAM")
SANITIZERS = ("thread", "address,undefined")

MAX_THREADS, MAX_SHARED = 1024, 227 << 10  # of a block, on any device
PROGRAM_SECONDS = 300  # within which a sanitized run ends

_LOCK = threading.Lock()  # a library runs one launch at a time


class KernelError(Exception):
    """The kernel does what no kernel may, or does not compile."""


class ArgumentError(KernelError):
    """A launch does not fit its kernel."""


class SanitizerError(KernelError):
    """What a sanitizer reported."""


class Unavailable(Exception):
    """There is no compiler, or a sanitizer does not work on this machine."""


class _Counts(ctypes.Structure):  # Result of shim.h
    _fields_ = [
        ("mma", ctypes.c_int64),
        ("ldmatrix", ctypes.c_int64),
        ("bank_conflicts", ctypes.c_int64),
        ("barriers", ctypes.c_int64),
        ("switches", ctypes.c_int64),
        ("error", ctypes.c_char * 512),
    ]


class _Request(ctypes.Structure):  # Request of shim.h
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


@dataclass(frozen=True)
class Source:
    """A kernel that is not one of npclip's, or not as it is."""

    source: str
    symbol: str


@dataclass
class Statistics:
    """What was counted over all blocks of a launch."""

    mma: int = 0  # m16n8k16, of a warp
    ldmatrix: int = 0  # x4, of a warp
    bank_conflicts: int = 0  # of ldmatrix: rows that wait for another of their matrix
    barriers: int = 0  # __syncthreads, of a block
    switches: int = 0  # from one thread to another: what the run cost here


def run(launch: Launch, order: int = 0, sanitizer: str | None = None) -> Statistics:
    """Run a launch and write its results into its arrays.

    order: of the threads and blocks; 0 forward, 1 reverse, else a seed. sanitizer: one of
    SANITIZERS, in a program of its own.
    """
    _check_sizes(launch)
    if sanitizer is not None:
        return _run_program(launch, order, sanitizer)
    library = _library(launch.kernel)
    _check_arguments(launch, library.signature)
    values = [_value(argument) for argument in launch.arguments]
    addresses = [ctypes.addressof(value) for value in values]
    pointers = (ctypes.c_void_p * max(len(values), 1))(*addresses)
    request = _Request(launch.grid, launch.block, launch.shared, order, pointers)
    counts = _Counts()
    with _LOCK:
        library.run(ctypes.byref(request), ctypes.byref(counts))
    return _statistics(launch, counts)


def run_sanitized(
    launches: Iterable[Launch], sanitizer: str = "thread", order: int = 0
) -> list[Statistics]:
    """Run launches one after the other, each under a sanitizer; SanitizerError has its report."""
    return [run(launch, order, sanitizer) for launch in launches]


def signature(kernel: Any) -> list[str]:
    """The types of a kernel's parameters, as shim.h describes them: "const f2*", "i4", ..."""
    return _library(kernel).signature


@cache
def compiler() -> str | None:
    """$CXX, g++ or clang++, whichever is there; None where the shim cannot run."""
    machine = os.uname() if hasattr(os, "uname") else None
    if machine is None or (machine.sysname, machine.machine) != ("Linux", "x86_64"):
        return None
    names = os.environ.get("CXX", ""), "g++", "clang++"
    return next((found for name in names if name and (found := shutil.which(name))), None)


# ---- arguments ----


def _check_sizes(launch: Launch) -> None:
    if len(launch.grid) != 3 or min(launch.grid) < 1 or max(launch.grid[1:]) > 65535:
        raise ArgumentError(f"{launch.kernel.symbol}: a grid of {launch.grid}")
    if not 1 <= launch.block <= MAX_THREADS or launch.block % 32:
        raise ArgumentError(
            f"{launch.kernel.symbol}: a block of {launch.block} threads: whole warps are needed, "
            f"and at most {MAX_THREADS} threads"
        )
    if not 0 <= launch.shared <= MAX_SHARED:
        raise ArgumentError(f"{launch.kernel.symbol}: {launch.shared} bytes of shared memory")


def _check_arguments(launch: Launch, parameters: Sequence[str]) -> None:
    name = launch.kernel.symbol
    if len(parameters) != len(launch.arguments):
        raise ArgumentError(
            f"{name} takes {len(parameters)} arguments ({', '.join(parameters)}), "
            f"not {len(launch.arguments)}"
        )
    for i, (argument, parameter) in enumerate(zip(launch.arguments, parameters, strict=True)):
        if wrong := _mismatch(argument, parameter, launch.arguments):
            raise ArgumentError(f"argument {i} of {name} is {parameter}: {wrong}")


def _mismatch(argument: Any, parameter: str, arguments: Sequence[Any]) -> str:
    """Why an argument does not fit a parameter, or nothing."""
    element = parameter.removeprefix("const ")
    pointer = element.endswith("*")
    kind, size = element[0], int(element[1:].rstrip("*"))
    if argument is None:
        return "" if pointer else "got None"
    if isinstance(argument, np.ndarray):
        described = f"got an array of {argument.dtype}"
        if not pointer:
            return described
        if not argument.flags.c_contiguous and not _tells_stride(arguments, argument):
            return "got an array that is not contiguous"
        if element == parameter and not argument.flags.writeable:
            return "got an array that is read-only"
        return "" if _same_values(argument.dtype, kind, size) else described
    if isinstance(argument, np.generic):
        fits = not pointer and _same_values(argument.dtype, kind, size)
        return "" if fits else f"got a scalar of {argument.dtype}"
    return f"got a {type(argument).__name__}: neither an array nor a NumPy scalar nor None"


def _tells_stride(arguments: Sequence[Any], array: np.ndarray) -> bool:
    """Whether the rows of a matrix lie apart, and a scalar argument says how far."""
    if array.ndim != 2 or array.strides[1] != array.itemsize or array.strides[0] < 0:
        return False
    scalars = [int(a) for a in arguments if isinstance(a, np.integer)]
    return array.strides[0] / array.itemsize in scalars


def _same_values(dtype: np.dtype, kind: str, size: int) -> bool:
    if kind == "?":
        return True
    kinds = {"f": "f", "b": "u", "i": "iub", "u": "iub"}[kind]
    return dtype.kind in kinds and dtype.itemsize == size


def _value(argument: Any) -> Any:
    """8 bytes or more that hold what the kernel gets: an address or a number."""
    if argument is None:
        return ctypes.c_uint64(0)
    if isinstance(argument, np.ndarray):
        return ctypes.c_uint64(argument.ctypes.data)
    return ctypes.create_string_buffer(argument.tobytes(), 8)


# ---- compiling ----


@dataclass
class _Library:
    signature: list[str]
    run: Any


def _library(kernel: Any) -> _Library:
    hashable = isinstance(kernel, Hashable)
    return _load(kernel if hashable else Source(kernel.source, kernel.symbol))


@cache
def _load(kernel: Any) -> _Library:
    library = ctypes.CDLL(str(_built(kernel, LIBRARY_FLAGS)))
    library.shim_signature.restype = ctypes.c_char_p
    library.shim_run.argtypes = [ctypes.POINTER(_Request), ctypes.POINTER(_Counts)]
    library.shim_run.restype = None
    return _Library(_parameters(library.shim_signature().decode()), library.shim_run)


def _parameters(signature: str) -> list[str]:
    return signature.strip().split(",")[:-1]


def _built(kernel: Any, flags: Sequence[str]) -> Path:
    """The compiled source, kept between runs. Processes may build the same one at a time."""
    command = _command(flags)
    source = f"{kernel.source}\nSHIM_KERNEL({kernel.symbol})\n"
    path = _cache() / _key(source, *command)
    if path.exists():
        return path
    # What is built under another name and then renamed is there as a whole or not at all.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source_path, result = Path(folder, "kernel.cpp"), Path(folder, "kernel")
        source_path.write_text(source)
        arguments = [*command, "-x", "c++", str(source_path), "-o", str(result)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError(f"{kernel.symbol} does not compile:\n{done.stderr[:8000]}")
        os.replace(result, path)
    return path


def _command(flags: Sequence[str]) -> list[str]:
    if (found := compiler()) is None:
        raise Unavailable("the shim needs a C++ compiler, on Linux and x86-64")
    return [found, *FLAGS, *flags, f"-I{HEADER.parent}"]


def _cache() -> Path:
    folder = Path(tempfile.gettempdir(), f"npclip-shim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _key(*texts: str) -> str:
    parts = (*texts, HEADER.read_text(), _compiler_version())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _compiler_version() -> str:
    command = [str(compiler()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- sanitizers ----

_OPTIONS = {
    # Fibers confuse what would look at their stacks as at a thread's.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "exitcode=66:report_thread_leaks=0:history_size=5:atexit_sleep_ms=0",
}


def _run_program(launch: Launch, order: int, sanitizer: str) -> Statistics:
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer {sanitizer!r} is none of {', '.join(SANITIZERS)}")
    flags = *PROGRAM_FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined"
    program = _built(launch.kernel, flags)
    _check_arguments(launch, _program_signature(program))
    pieces = _pieces(launch.arguments)
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        path = Path(folder, "launch")
        path.write_bytes(_packed(launch, order, pieces))
        done = _execute(program, str(path))
        report = done.stderr.strip()
        if done.returncode or report:
            report = f"{report}\n{_quoted_lines(launch.kernel.source, report)}"
            raise SanitizerError(f"{launch.kernel.symbol} (exit {done.returncode}):\n{report}")
        data = path.read_bytes()
    start = ctypes.sizeof(_Counts)
    counts = _Counts.from_buffer_copy(data)
    for piece in pieces:
        piece.write(data[start : start + piece.size])
        start += piece.size
    return _statistics(launch, counts)


@cache
def _program_signature(program: Path) -> list[str]:
    return _parameters(_execute(program).stdout)


def _execute(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program; at fixed addresses where ThreadSanitizer cannot work at random ones."""
    command = [str(program), *arguments]
    for prefix in ([], ["setarch", "-R"]):
        if prefix and not shutil.which(prefix[0]):
            break
        done = subprocess.run(
            [*prefix, *command],
            env={**os.environ, **_OPTIONS},
            capture_output=True,
            text=True,
            check=False,
            timeout=PROGRAM_SECONDS,
        )
        if "unexpected memory mapping" not in done.stderr and "personality" not in done.stderr:
            return done
    raise Unavailable(done.stderr)


@dataclass
class _Piece:
    """Memory that one or several arrays share: a heap block of its own in the program."""

    start: int
    end: int
    arrays: list[np.ndarray]

    @property
    def size(self) -> int:
        return self.end - self.start

    def read(self) -> bytes:
        return ctypes.string_at(self.start, self.size)

    def write(self, data: bytes) -> None:
        if any(array.flags.writeable for array in self.arrays):
            ctypes.memmove(self.start, data, self.size)


def _pieces(arguments: Sequence[Any]) -> list[_Piece]:
    """Arrays that overlap are one piece."""
    arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
    pieces: list[_Piece] = []
    for array in sorted(arrays, key=lambda array: array.ctypes.data):
        start = array.ctypes.data
        last = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
        end = start + (sum(last) + array.itemsize if array.size else 0)
        if pieces and start < pieces[-1].end:
            pieces[-1].end = max(pieces[-1].end, end)
            pieces[-1].arrays.append(array)
        else:
            pieces.append(_Piece(start, end, [array]))
    return pieces


def _packed(launch: Launch, order: int, pieces: Sequence[_Piece]) -> bytes:
    """The file that the program reads; run_file in shim.h says what is in it."""
    numbers = [*launch.grid, launch.block, launch.shared, order, len(pieces)]
    numbers.append(len(launch.arguments))
    for piece in pieces:
        numbers += [piece.size, piece.start % 16]
    for argument in launch.arguments:
        if isinstance(argument, np.ndarray):
            index = next(
                i for i, piece in enumerate(pieces) if any(a is argument for a in piece.arrays)
            )
            numbers += [index, argument.ctypes.data - pieces[index].start]
        else:
            bits = b"" if argument is None else argument.tobytes()
            numbers += [-1, int.from_bytes(bits.ljust(8, b"\0"), "little", signed=True)]
    return struct.pack(f"{len(numbers)}q", *numbers) + b"".join(piece.read() for piece in pieces)


def _statistics(launch: Launch, counts: _Counts) -> Statistics:
    if counts.error:
        message = counts.error.decode(errors="replace")
        lines = _quoted_lines(launch.kernel.source, message)
        raise KernelError(f"{launch.kernel.symbol}: {message}\n{lines}".rstrip())
    return Statistics(
        counts.mma, counts.ldmatrix, counts.bank_conflicts, counts.barriers, counts.switches
    )


def _quoted_lines(source: str, report: str) -> str:
    """The lines of the source that a report names."""
    found = re.findall(r"(?:kernel\.cpp:|lines? |and )(\d+)", report)
    lines = source.splitlines()
    named = sorted({int(number) for number in found if 1 <= int(number) <= len(lines)})
    return "\n".join(f"line {number}: {lines[number - 1].strip()}" for number in named[:20])
