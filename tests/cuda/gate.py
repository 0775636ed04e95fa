"""What every kernel must compile to, on every architecture, with NVRTC of every CUDA version.

What a compiler said of a source is kept between runs, as shim.py keeps what it built.
What a test needs and does not find makes it skip; under CI=true it fails (missing).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from npclip import nvrtc
from npclip.cuda_launch import Kernel

EVERYTHING = os.environ.get("NPCLIP_TEST_EVERYTHING")  # half an hour: see where it is used
AMPERE, ADA = "86", "89"  # get the same machine code, but for rows.cu: test_gate.py
ALL_ARCHS = ("75", "80", AMPERE, ADA, "90", "100", "120")
ARCHS = tuple(arch for arch in ALL_ARCHS if EVERYTHING or arch != ADA)
CUDAS = (12, 13)
MAX_REGISTERS = 255

each_cuda = pytest.mark.parametrize("cuda", CUDAS, ids=[f"cuda{cuda}" for cuda in CUDAS])


def missing(reason: str) -> NoReturn:
    """Skip the test that runs; under CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, yet {reason}")
    pytest.skip(reason)


def library(cuda: int) -> Path:
    """The newest NVRTC of this CUDA version."""
    for path in nvrtc.libraries():
        if nvrtc.cuda_version(path)[0] == cuda:
            return path
    missing(f"NVRTC of CUDA {cuda} is not installed")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a source."""

    log: str
    usage: dict[str, nvrtc.Usage]  # by kernel
    code: str  # a digest of its machine code


def compiled(source: str, arch: str, compiler: Path) -> Compiled:
    """A source compiled to machine code; what was compiled before is not compiled again."""
    folder = Path(tempfile.gettempdir(), f"npclip-gate-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    build = f"{nvrtc.version(compiler)} {compiler.stat().st_size} {[*Compiled.__annotations__]}"
    path = folder / nvrtc.key(source, arch, build)
    if path.exists():
        known = json.loads(path.read_text())
        usage = {symbol: nvrtc.Usage(**used) for symbol, used in known["usage"].items()}
        return Compiled(**{**known, "usage": usage})
    program = nvrtc.compile(source, f"sm_{arch}", library=compiler)
    result = Compiled(program.log, program.usage, machine_code(program.binary))
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(result)))
    part.replace(path)
    return result


def machine_code(cubin: bytes) -> str:
    """A digest of the sections .text of an ELF file, one for each kernel, by name."""
    first, size, count, names = (
        int.from_bytes(cubin[at : at + length], "little")
        for at, length in ((40, 8), (58, 2), (60, 2), (62, 2))
    )
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", cubin, first + size * i) for i in range(count)
    ]  # name, type, flags, address, offset, size, ...
    start = headers[names][4]
    sections = {
        cubin[start + h[0] : cubin.index(0, start + h[0])]: cubin[h[4] : h[4] + h[5]]
        for h in headers
    }
    code = sorted(item for item in sections.items() if item[0].startswith(b".text."))
    assert code, "a cubin without a kernel"
    return hashlib.sha256(repr(code).encode()).hexdigest()


def assert_compiles(
    kernel: Kernel,
    cuda: int,
    archs: Sequence[str] = ARCHS,
    max_registers: int = MAX_REGISTERS,
) -> None:
    """No warning, no spill, no stack, of any kernel in its source; bfloat16 from sm_80 on."""
    compiler = library(cuda)
    for arch in archs:
        if kernel.dtype == "bf16" and int(arch.rstrip("af")) < 80:
            continue
        result = compiled(kernel.source, arch, compiler)
        where = f"{kernel.symbol} {dict(kernel.defines)} for sm_{arch} by CUDA {cuda}"
        assert "warning" not in result.log, f"{where}: {result.log}"
        assert kernel.symbol in result.usage, where
        for symbol, usage in result.usage.items():
            assert usage.spill_bytes == 0, f"{symbol} in {where}: {usage}"
            assert usage.stack_bytes == 0, f"{symbol} in {where}: {usage}"
            assert usage.registers <= max_registers, f"{symbol} in {where}: {usage}"


def assert_same_code(kernel: Kernel, cuda: int, arch: str, other: str) -> None:
    """Two architectures run the same machine code of a kernel."""
    compiler = library(cuda)
    one, two = (compiled(kernel.source, a, compiler) for a in (arch, other))
    assert one.code == two.code, f"{kernel.symbol} {dict(kernel.defines)} by CUDA {cuda}"
    assert one.usage == two.usage
