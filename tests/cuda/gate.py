"""What every kernel must compile to, on every architecture, with NVRTC of every CUDA version.

What a compiler said of a source is kept between runs, as shim.py keeps what it built.
What a test needs and does not find makes it skip; under CI=true it fails (missing).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import pytest

from npclip import nvrtc
from npclip.cuda_launch import Kernel

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
CUDAS = (12, 13)
MAX_REGISTERS = 255
EVERYTHING = os.environ.get("NPCLIP_TEST_EVERYTHING")  # half an hour: see where it is used

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


def compiled(source: str, arch: str, compiler: Path) -> tuple[str, dict[str, nvrtc.Usage]]:
    """The compiler's log, and what each kernel uses."""
    folder = Path(tempfile.gettempdir(), f"npclip-gate-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    build = f"{nvrtc._load(compiler).version} {compiler.stat().st_size}"
    path = folder / nvrtc._key(source, arch, build)
    if path.exists():
        log, usage = json.loads(path.read_text())
        return log, {symbol: nvrtc.Usage(**used) for symbol, used in usage.items()}
    program = nvrtc.compile(source, f"sm_{arch}", library=compiler)
    usage = {symbol: asdict(used) for symbol, used in program.usage.items()}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([program.log, usage]))
    part.replace(path)
    return program.log, program.usage


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
        log, usages = compiled(kernel.source, arch, compiler)
        where = f"{kernel.symbol} {dict(kernel.defines)} for sm_{arch} by CUDA {cuda}"
        assert "warning" not in log, f"{where}: {log}"
        assert kernel.symbol in usages, where
        for symbol, usage in usages.items():
            assert usage.spill_bytes == 0, f"{symbol} in {where}: {usage}"
            assert usage.stack_bytes == 0, f"{symbol} in {where}: {usage}"
            assert usage.registers <= max_registers, f"{symbol} in {where}: {usage}"
