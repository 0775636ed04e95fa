"""What gpu_check.py computes with every op: CLIP's shapes, awkward ones, tiny ones.

Arguments go by the names of kernels/reference.py. Shapes are written as in kernel_cases.py, and
`how` has words for what a shape does not say: an activation, residual, causal, ragged, relu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import kernel_cases
import numpy as np

from npclip import cuda
from npclip.cuda_launch import DTYPES
from npclip.kernels import reference
from npclip.weights import from_bfloat16

Shape = tuple[int, ...]
PARAMETERS = "weight", "bias", "class_embedding", "positional_embedding", "token_embedding"
FLOAT32_OPS = ("l2_normalize",)
KINDS = tuple(DTYPES.values())  # f16, bf16, f32
MODEL_DTYPES = {kind: dtype for dtype, kind in DTYPES.items()}


def patch_linear(ops: Any, images: Any, weight: Any, patch: int) -> Any:
    """The patch convolution: rows of 588 values are filled up to 592."""
    return ops.linear(ops.patchify(images, patch), weight)


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    shape: Shape
    how: str = ""

    def __str__(self) -> str:
        """attention 2x577x16x64 causal"""
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.how}".rstrip()

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Random float32 arrays and the numbers that go with them."""
        rng, made = np.random.default_rng(seed), MAKERS.get(self.op)
        if made is None:
            work = kernel_cases.OPS[self.op].work(*self.shape)
            arguments = dict(work.arguments)
            if work.weight is not None:
                arguments["weight"] = work.weight
        else:
            arguments = made(rng, *self.shape)
        for name, value in arguments.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32:
                fan_in = np.prod(value.shape[1:]) if name == "weight" and value.ndim > 1 else 1
                noise = rng.standard_normal(value.shape, dtype=np.float32)
                arguments[name] = noise * np.float32(fan_in**-0.5)
        for word in self.how.split():
            if word in reference.ACTIVATIONS:
                arguments["activation"] = word
            elif word == "causal":
                arguments["causal"] = True
            elif word == "ragged":
                arguments["cu_seqlens"] = _ragged(rng, arguments["cu_seqlens"])
            elif word == "residual":
                arguments["residual"] = rng.standard_normal(self._result(), dtype=np.float32)
            else:
                raise ValueError(f"{self}: what is {word}?")
        return arguments

    def activation(self) -> str | None:
        """Of linear or conv2d."""
        return next((word for word in self.how.split() if word in reference.ACTIVATIONS), None)

    def _result(self) -> Shape:
        """The shape of what linear or conv2d returns."""
        if self.op == "linear":
            return self.shape[0], self.shape[2]
        batch, side, _, outputs, _, stride = self.shape
        return batch, (side - 1) // stride + 1, (side - 1) // stride + 1, outputs

    def flop(self) -> Any:
        """Of the matrix products in it; of equal sequences, all of them unmasked."""
        match self.op, self.shape:
            case "linear", (n, k, m):
                return 2 * n * k * m
            case "attention" | "attention_pool", (batch, tokens, heads, head_width):
                queries = tokens if self.op == "attention" else 1
                return 4 * batch * heads * queries * tokens * head_width
            case "conv2d", (_, _, channels, _, kernel, _):
                return 2 * np.prod(self._result()) * channels * kernel**2
        return 0

    def run(self, ops: Any, arguments: dict[str, Any]) -> Any:
        """Call it in a module of ops: reference or cuda."""
        if self.op == "patch_linear":
            return patch_linear(ops, **arguments)
        return getattr(ops, self.op)(**arguments)

    def dtypes(self) -> tuple[str, ...]:
        """f16, bf16, f32: how its arrays may be stored."""
        return ("f32",) if self.op in FLOAT32_OPS else KINDS


def place(device: Any, arguments: dict[str, Any], kind: str) -> dict[str, Any]:
    """Arguments of a case on a device, as a model of this dtype has them there."""
    parameters = {k: v for k, v in arguments.items() if k in PARAMETERS}
    placed = cuda.place(parameters, device, MODEL_DTYPES[kind], ())
    for name, value in arguments.items():
        if name not in placed:
            is_float = isinstance(value, np.ndarray) and value.dtype == np.float32
            placed[name] = device.asarray(cuda.CONVERT[kind](value)) if is_float else value
    return placed


def exact(arguments: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same values, rounded as they are stored on the device, in float64."""
    result = {}
    for name, value in arguments.items():
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            result[name] = value
            continue
        is_vector = name in PARAMETERS and name != "token_embedding" and value.ndim < 2
        keeps_float32 = is_vector or name == "positional_embedding"
        stored = value if keeps_float32 else cuda.CONVERT[kind](value)
        wide = from_bfloat16(stored) if stored.dtype == np.uint16 else stored
        result[name] = wide.astype(np.float64)
    return result


def copied(device: Any, value: Any) -> Any:
    """The same arguments in other memory of the device."""
    if isinstance(value, dict):
        return {name: copied(device, item) for name, item in value.items()}
    if isinstance(value, cuda.Matrix):
        return replace(value, array=device.copy(value.array))
    return device.copy(value) if hasattr(value, "__cuda_array_interface__") else value


def device_arrays(value: Any) -> Iterator[Any]:
    """All arrays among arguments or results."""
    if isinstance(value, cuda.Matrix):
        yield value.array
    elif isinstance(value, dict):
        for item in value.values():
            yield from device_arrays(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from device_arrays(item)
    elif hasattr(value, "nbytes"):
        yield value


def _ragged(rng: Any, cu_seqlens: Any) -> Any:
    count, total = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    inner = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
    return np.concatenate([[0], inner, [total]]).astype(cu_seqlens.dtype)


def _embed_tokens(rng: Any, n: int, width: int) -> dict[str, Any]:
    return {
        "ids": rng.integers(0, 1000, n).astype(np.int32),
        "positions": rng.integers(0, 77, n).astype(np.int32),
        "token_embedding": kernel_cases.normal(1000, width),
        "positional_embedding": kernel_cases.normal(77, width),
    }


def _take(rng: Any, n: int, rows: int, width: int) -> dict[str, Any]:
    return {
        "x": kernel_cases.normal(n, width),
        "rows": rng.integers(0, n, rows).astype(np.int32),
    }


def _patch_linear(rng: Any, batch: int, resolution: int, patch: int, width: int) -> dict[str, Any]:
    return {
        "images": kernel_cases.normal(batch, 3, resolution, resolution),
        "weight": kernel_cases.normal(width, 3 * patch * patch),
        "patch": patch,
    }


MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "embed_tokens": _embed_tokens,
    "take": _take,
    "patch_linear": _patch_linear,
}

ALL_CASES = SimpleNamespace(
    clip=[
        *(Case("attention", (4, t, h, 64)) for t, h in ((50, 12), (197, 12), (257, 16), (577, 16))),
        Case("attention", (2, 257, 16, 80)), Case("attention", (1, 257, 16, 88)),
        Case("attention", (1, 257, 16, 104)),
        Case("attention", (3, 77, 8, 64), "causal"),
        Case("attention", (64, 12, 8, 64), "causal ragged"),
        Case("attention_pool", (4, 50, 12, 64)), Case("attention_pool", (2, 577, 16, 64)),
        *(Case("layer_norm", shape) for shape in ((400, 768), (514, 1024), (77, 512), (50, 1664))),
        *(Case("add_layer_norm", shape) for shape in ((400, 768), (514, 1024), (10, 1280))),
        Case("linear", (50, 768, 3072), "quick_gelu"), Case("linear", (50, 3072, 768), "residual"),
        Case("linear", (1600, 768, 2304)), Case("linear", (514, 1024, 4096), "quick_gelu"),
        Case("linear", (8, 768, 512)), Case("linear", (77, 512, 2048), "gelu"),
        Case("patch_linear", (2, 224, 32, 768)), Case("patch_linear", (2, 224, 14, 1024)),
        Case("patchify", (2, 224, 16)), Case("patchify", (1, 336, 14)),
        Case("embed_patches", (4, 50, 768)), Case("embed_patches", (2, 257, 1024)),
        Case("embed_tokens", (300, 512)), Case("take", (400, 8, 768)),
        Case("l2_normalize", (64, 512)),
        Case("conv2d", (1, 56, 64, 64, 3, 1), "relu"),
        Case("conv2d", (2, 224, 3, 32, 3, 2), "relu"),
        Case("conv2d", (1, 14, 256, 1024, 1, 1), "residual relu"),
        Case("avg_pool2d", (1, 56, 256, 2)),
    ],
    awkward=[
        Case("attention", (3, 1, 2, 64)), Case("attention", (1, 130, 1, 64), "causal"),
        Case("attention", (17, 23, 3, 64), "ragged"), Case("attention", (1, 1100, 2, 64)),
        Case("attention_pool", (5, 37, 3, 64), "ragged"),
        Case("layer_norm", (1, 8)), Case("layer_norm", (7, 1000)), Case("layer_norm", (3, 4096)),
        Case("add_layer_norm", (5, 648)), Case("linear", (1, 8, 8)), Case("linear", (129, 72, 136)),
        Case("linear", (63, 1032, 264), "quick_gelu residual"),
        Case("linear", (257, 520, 8), "relu"),
        Case("l2_normalize", (3, 77)), Case("take", (5, 1, 24)), Case("embed_tokens", (1, 40)),
        Case("embed_patches", (1, 5, 72)), Case("avg_pool2d", (2, 6, 3, 3)),
    ],
    tiny=[
        Case("attention", (2, 9, 2, 64)), Case("attention", (2, 9, 1, 64), "causal ragged"),
        Case("attention_pool", (2, 9, 1, 64)), Case("layer_norm", (3, 64)),
        Case("add_layer_norm", (3, 72)), Case("linear", (9, 40, 24), "quick_gelu residual"),
        Case("patch_linear", (1, 28, 14, 16)), Case("embed_patches", (2, 5, 64)),
        Case("embed_tokens", (5, 40)), Case("take", (5, 2, 24)), Case("l2_normalize", (3, 40)),
        Case("conv2d", (1, 6, 8, 16, 3, 1), "residual relu"), Case("avg_pool2d", (1, 4, 8, 2)),
    ],
)  # fmt: skip

TIMED = [
    *(Case("attention", s) for s in ((256, 50, 12, 64), (64, 197, 12, 64), (64, 257, 16, 64),
                                     (16, 577, 16, 64), (1, 50, 12, 64), (1, 257, 16, 64))),
    Case("attention", (256, 77, 8, 64), "causal"),
    Case("attention", (256, 12, 8, 64), "causal ragged"),
    Case("attention_pool", (256, 50, 12, 64)),
    *(Case(op, s) for op in ("layer_norm", "add_layer_norm")
      for s in ((12800, 768), (16448, 1024), (50, 768))),
    Case("patchify", (256, 224, 32)), Case("patchify", (64, 224, 14)),
    Case("embed_patches", (256, 50, 768)), Case("embed_tokens", (3072, 512)),
    Case("take", (12800, 256, 768)), Case("l2_normalize", (1024, 512)),
    Case("conv2d", (32, 56, 64, 64, 3, 1), "relu"),
    Case("conv2d", (32, 14, 1024, 256, 1, 1), "relu"),
    Case("avg_pool2d", (32, 56, 256, 2)),
]  # fmt: skip
