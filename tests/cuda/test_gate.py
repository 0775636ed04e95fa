"""What gate.py and its users take for granted, so that they need not compile everything."""

import re
from pathlib import Path

import numpy as np
import pytest
from cuda import gate

from npclip import cuda_attention, cuda_images, cuda_linear, cuda_rows, nvrtc

KERNELS = Path(cuda_linear.__file__).parents[1] / "kernels"
NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def launches(kind):
    """Of each kernel, or of one of those that are compiled together; not of rows.cu."""
    x, y = np.empty((1, 768), NUMPY[kind]), np.empty((1, 64), NUMPY[kind])
    qkv, kv = np.empty((1, 192), NUMPY[kind]), np.empty((1, 128), NUMPY[kind])
    images = np.empty((1, 2, 2, 8), NUMPY[kind])
    seqs = np.zeros(2, np.int32)
    yield cuda_rows.layer_norm(x, None, None, x, 1e-5)
    yield cuda_rows.patchify(np.empty((1, 3, 14, 14), NUMPY[kind]), 14, x)
    yield cuda_images.windows(images, 3, 1, np.empty((4, 80), NUMPY[kind]))
    yield cuda_linear.linear(y, y, None, "quick_gelu", None, y)
    yield from (cuda_attention.attention(qkv, seqs, y, 1, longest, False) for longest in (77, 257))
    yield cuda_attention.attention_pool(y, kv, seqs, y, 1, 1)


@gate.each_cuda
@pytest.mark.parametrize("kind", NUMPY if gate.EVERYTHING else ["f16"])
def test_ada_runs_the_machine_code_of_ampere(kind, cuda):
    """So that what compiles for the one compiles for the other."""
    for launch in launches(kind):
        gate.assert_compiles(launch.kernel, cuda, (gate.ADA,))
        gate.assert_same_code(launch.kernel, cuda, gate.ADA, gate.AMPERE)


def test_other_machine_code_is_told_apart():
    source = 'extern "C" __global__ void f(float *x) { *x += %s; }'
    compiler = gate.library(gate.CUDAS[-1])
    one, same, other = (
        nvrtc.compile(source % more, "sm_80", library=compiler).binary
        for more in ("1.0f", "1.0f  ", "3.0f")
    )
    assert gate.machine_code(one) == gate.machine_code(same) != gate.machine_code(other)


def test_every_kernel_waits_for_the_one_before_it():
    """wait_for_previous, first of all or, where weights come before it, once at least."""
    for file in sorted(KERNELS.glob("*.cu")):
        _, *bodies = re.split(r"^SYMBOL\(", file.read_text(), flags=re.MULTILINE)
        assert bodies, file.name
        for body in bodies:
            assert body.count("wait_for_previous();") == 1, f"{body.partition(')')[0]}: {file.name}"
