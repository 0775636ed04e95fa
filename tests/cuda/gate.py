"""What every kernel must compile to, on every architecture, with every NVRTC that is here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from npclip import nvrtc
from npclip.cuda_launch import Kernel

ARCHS = ("75", "80", "86", "89", "90", "100", "120")
MAX_REGISTERS = 255


def assert_compiles(
    kernel: Kernel, archs: Sequence[str] = ARCHS, max_registers: int = MAX_REGISTERS
) -> None:
    """No warning, no spill, no stack, of any kernel in its source; bfloat16 from sm_80 on."""
    if kernel.dtype == "bf16":
        archs = [arch for arch in archs if int(arch.rstrip("af")) >= 80]
    libraries = nvrtc.libraries()
    if not libraries:
        pytest.skip("CUDA's compiler NVRTC is not installed")
    for library in libraries:
        for arch in archs:
            program = nvrtc.compile(kernel.source, f"sm_{arch}", library=library)
            where = f"{kernel.symbol} {dict(kernel.defines)} for sm_{arch} by {library}"
            assert "warning" not in program.log, f"{where}: {program.log}"
            assert kernel.symbol in program.usage, where
            for symbol, usage in program.usage.items():
                assert usage.spill_bytes == 0, f"{symbol} in {where}: {usage}"
                assert usage.stack_bytes == 0, f"{symbol} in {where}: {usage}"
                assert usage.registers <= max_registers, f"{symbol} in {where}: {usage}"
