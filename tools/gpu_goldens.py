"""What single instructions of a GPU compute, for the CPU's stand-ins to be checked against.

Small kernels, written in the words of kernels/common.cuh, put random register contents through one
instruction each. goldens.npz holds their inputs and outputs under {kernel}/{argument}; it belongs
into tests/cuda, where test_gpu_check.py runs the same kernels on the shim and the PTX interpreter.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from gpu_journal import Journal, write_whole
from gpu_rates import open_gpu

from npclip.cuda_launch import Kernel, Launch
from npclip.weights import to_bfloat16

Arrays = dict[str, Any]
FILE = "goldens.npz"
HOPPER = 9, 0

LDMATRIX = """
KERNEL(32) SYMBOL({op})(const uint16_t *in, uint32_t *out) {{  // in [32, 8], out [32, 4]
    __shared__ __align__(16) uint16_t rows[32 * 8];
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) rows[lane * 8 + i] = in[lane * 8 + i];
    __syncwarp();
    uint32_t r[4];
    {op}(r, rows + (lane * 5 + 3) % 32 * 8);
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}}
"""
MMA = """
KERNEL(32) SYMBOL(mma_16816)(const uint32_t *a, const uint32_t *b, const float *c, float *out) {
    int lane = threadIdx.x;
    uint32_t r[4];
    float d[4];
    for (int i = 0; i < 4; i++) r[i] = a[lane * 4 + i], d[i] = c[lane * 4 + i];
    mma_16816(d, r, b[lane * 2], b[lane * 2 + 1]);
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}
"""
MMA_1688 = """
KERNEL(32) SYMBOL(mma_1688_asm)(const uint32_t *a, const uint32_t *b, const float *c, float *out) {
    int lane = threadIdx.x;
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = c[lane * 4 + i];
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[lane * 2]), "r"(a[lane * 2 + 1]), "r"(b[lane]));
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = d[i];
}
"""
COPY = """
// in and out [32, 4], inside [32]
KERNEL(32) SYMBOL(copy_async)(const uint32_t *in, const int *inside, uint32_t *out) {
    __shared__ __align__(16) uint32_t chunks[32 * 4];
    int lane = threadIdx.x;
    for (int i = 0; i < 4; i++) chunks[lane * 4 + i] = 0xffffffffu;
    __syncwarp();
    copy_async(chunks + lane * 4, in + lane * 4, inside[lane]);
    commit_async();
    wait_async<0>();
    __syncwarp();
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = chunks[lane * 4 + i];
}
"""
EXP2 = """
KERNEL(256) SYMBOL(exp2_fast)(const float *in, float *out) {  // [1024] both
    for (int i = threadIdx.x; i < 1024; i += 256) out[i] = exp2_fast(in[i]);
}
"""
_D = ", ".join(f"%{i}" for i in range(32))
_OUTPUTS = ", ".join(f'"+f"(d[{i}])' for i in range(32))
WGMMA = f"""
// in: a and then b [64, 64], swizzled as in shared memory; out [128, 32]
KERNEL(128) SYMBOL(wgmma)(const uint32_t *in, float *out) {{
    __shared__ __align__(1024) uint32_t tiles[2 * 64 * 32];
    for (int i = threadIdx.x; i < 2 * 64 * 32; i += 128) tiles[i] = in[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    // 128-byte swizzle, 1024 bytes from one group of 8 rows to the next
    uint64_t layout = (1ull << 16) | (64ull << 32) | (1ull << 62);
    uint64_t a = layout | (shared_address(tiles) & 0x3ffff) >> 4;
    uint64_t b = layout | (shared_address(tiles + 64 * 32) & 0x3ffff) >> 4;
    float d[32];
    for (int i = 0; i < 32; i++) d[i] = 0;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 4; k++)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                     "{{{_D}}}, %32, %33, 1, 1, 1, 0, 0;"
                     : {_OUTPUTS}
                     : "l"(a + 2 * k), "l"(b + 2 * k));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 32; i++) out[threadIdx.x * 32 + i] = d[i];
}}
"""  # fmt: skip


@dataclass(frozen=True)
class ProbeKernel(Kernel):
    """A kernel whose text is given instead of the name of a file."""

    text: str = ""

    @cached_property
    def source(self) -> str:
        """The one string that is compiled."""
        common = (files("npclip.kernels") / "common.cuh").read_text()
        return f"#define DTYPE {self.dtype.upper()}\n{common}{self.text}"


@dataclass(frozen=True)
class Probe:
    """A kernel of one instruction and its arguments; the last one is the output."""

    kernel: ProbeKernel
    inputs: Callable[[Any], Arrays]  # of a random generator, in the kernel's order
    output: Any  # an array of the shape and dtype of the output
    block: int = 32
    tolerance: float | None = None  # of the largest output, where stand-ins round in their own way
    capability: tuple[int, int] = (8, 0)  # at least; HOPPER: exactly
    on_shim: bool = True  # whether the shim has this word

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability has the instruction."""
        exactly = self.capability == HOPPER
        return capability == HOPPER if exactly else capability >= self.capability

    def launch(self, arguments: list[Any]) -> Launch:
        """With arrays for the inputs and the output."""
        return Launch(self.kernel, (1, 1, 1), self.block, 0, tuple(arguments))


def _pairs(rng: Any, kind: str, *shape: int) -> Any:
    """Registers that hold two values of 16 bits each."""
    x = rng.standard_normal((*shape[:-1], 2 * shape[-1]), dtype=np.float32)
    return (to_bfloat16(x) if kind == "bf16" else x.astype(np.float16)).view(np.uint32)


def _mma_inputs(kind: str, a: int, b: int) -> Callable[[Any], Arrays]:
    return lambda rng: {
        "a": _pairs(rng, kind, 32, a),
        "b": _pairs(rng, kind, 32, b),
        "c": rng.standard_normal((32, 4), dtype=np.float32),
    }


def _exponents(rng: Any) -> Arrays:
    x = rng.uniform(-140, 129, 1024).astype(np.float32)
    x[:8] = 0, -np.inf, -126, -126.5, -150, 127.5, 128, 1
    x[8:512] = rng.uniform(-1, 0, 504)
    return {"in": x}


def _copies(rng: Any) -> Arrays:
    inside = (np.arange(32) % 3 != 0).astype(np.int32)
    return {"in": rng.integers(0, 2**32, (32, 4), np.uint32), "inside": inside}


_REGISTERS, _SUMS = np.empty((32, 4), np.uint32), np.empty((32, 4), np.float32)


def _rows(rng: Any) -> Arrays:
    return {"in": rng.integers(0, 2**16, (32, 8), np.uint16)}


def _kernel(op: str, text: str, dtype: str = "f16", arch: str = "") -> ProbeKernel:
    return ProbeKernel("gpu_goldens", op, dtype, arch=arch, text=text)


PROBES = {
    "ldmatrix_x4": Probe(
        _kernel("ldmatrix_x4", LDMATRIX.format(op="ldmatrix_x4")),
        _rows, _REGISTERS, capability=(7, 5),
    ),
    "ldmatrix_x4_trans": Probe(
        _kernel("ldmatrix_x4_trans", LDMATRIX.format(op="ldmatrix_x4_trans")),
        _rows, _REGISTERS, capability=(7, 5),
    ),
    "mma_16816_f16": Probe(
        _kernel("mma_16816", MMA), _mma_inputs("f16", 4, 2), _SUMS, tolerance=1e-5,
    ),
    "mma_16816_bf16": Probe(
        _kernel("mma_16816", MMA, "bf16"), _mma_inputs("bf16", 4, 2), _SUMS, tolerance=1e-5,
    ),
    "mma_1688_f16": Probe(
        _kernel("mma_1688_asm", MMA_1688), _mma_inputs("f16", 2, 1), _SUMS, tolerance=1e-5,
        capability=(7, 5), on_shim=False,
    ),
    "copy_async": Probe(_kernel("copy_async", COPY), _copies, _REGISTERS, capability=(7, 5)),
    "exp2_fast": Probe(
        _kernel("exp2_fast", EXP2), _exponents, np.empty(1024, np.float32), 256, 2e-7,
        capability=(7, 5),
    ),
    "wgmma": Probe(
        _kernel("wgmma", WGMMA, arch="90a"), lambda rng: {"in": _pairs(rng, "f16", 2 * 64, 32)},
        np.empty((128, 32), np.float32), 128, 1e-5, HOPPER, on_shim=False,
    ),
}  # fmt: skip


def is_close(found: Any, expected: Any, tolerance: float | None) -> bool:
    """Whether outputs are equal bit for bit or, with a tolerance, nearly: relative to 1 or more."""
    if tolerance is None:
        return bool(np.array_equal(found, expected))
    scale = np.maximum(np.abs(expected), np.float32(1))
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(found - expected) <= tolerance * scale
    return bool((near | (found == expected)).all())


def run_probe(run: Callable[[Launch], Any], probe: Probe, inputs: Arrays, to_device: Any) -> Any:
    """The output array, wherever to_device puts arrays, full of ones in every bit before."""
    poison = np.full(probe.output.nbytes, 0xFF, np.uint8).view(probe.output.dtype)
    output = to_device(poison.reshape(probe.output.shape))
    run(probe.launch([*(to_device(x) for x in inputs.values()), output]))
    return output


def record(device: Any, seed: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of goldens.npz, and an error for every probe that did not work."""
    arrays: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, probe in PROBES.items():
        if not probe.runs_on(device.capability):
            continue
        inputs = probe.inputs(np.random.default_rng(seed))
        try:
            output = device.asnumpy(run_probe(device.run, probe, inputs, device.asarray))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            continue
        arrays |= {f"{name}/{key}": x for key, x in inputs.items()} | {f"{name}/out": output}
    return arrays, failed


def pack(arrays: dict[str, Any]) -> bytes:
    """The bytes of goldens.npz."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def unpack(path: Path) -> dict[str, tuple[Arrays, Any]]:
    """Probe -> its inputs and its output."""
    with np.load(path) as file:
        arrays = dict(file)
    found = {}
    for name in PROBES:
        mine = {key.partition("/")[2]: x for key, x in arrays.items() if key.startswith(f"{name}/")}
        if mine:
            output = mine.pop("out")
            found[name] = mine, output
    return found


def golden_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `goldens`: whether this GPU agrees with the file; what it lacks is added."""
    device = open_gpu()
    if isinstance(device, str):
        return device
    committed = Path(__file__).parents[1] / "tests" / "cuda" / FILE
    old = next((path for path in (out / FILE, committed) if path.exists()), None)
    arrays, failed = record(device)
    for name, error in failed.items():
        journal.row(probe=name, ok=False, error=error)
    known = unpack(old) if old else {}
    for name, (_, expected) in known.items():
        if f"{name}/out" in arrays:
            same = is_close(arrays[f"{name}/out"], expected, PROBES[name].tolerance)
            journal.row(probe=name, ok=same)
    added = {key.partition("/")[0] for key in arrays} - set(known)
    if added:
        write_whole(out / FILE, pack(extended(known, arrays, added)))
        for name in sorted(added):
            journal.row(probe=name, ok=True, added=True)
    journal.fact(compared_with=old.name if old else None, added=sorted(added))
    return None


def extended(
    known: dict[str, tuple[Arrays, Any]], arrays: dict[str, Any], added: set[str]
) -> dict[str, Any]:
    """What unpack() gave, with these probes of another recording beside it."""
    result = {key: x for key, x in arrays.items() if key.partition("/")[0] in added}
    for name, (inputs, output) in known.items():
        result |= {f"{name}/{key}": x for key, x in inputs.items()} | {f"{name}/out": output}
    return result
