"""Which kernel computes a product: one of ours, or cuBLASLt, whichever is faster.

Each kind of product is timed once on a GPU, with as many rows as the next power of two, and the
choice kept on disk. $NPCLIP_CUDA_LINEAR names one instead: "own", "cublaslt", or a tiling of
cuda_linear such as 128x128x32x4.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cublaslt, cuda_linear, cuda_rows
from .cuda_launch import MODEL_DTYPES, stored
from .errors import BackendError, NpclipError
from .whole_file import replacing

if TYPE_CHECKING:
    from .cuda_device import Device

Array = Any
Way = Callable[..., None]  # of x, weight, bias, residual, y
PLANS = 4  # of cuBLASLt that are timed
KEPT_PLANS = 512  # shapes
CUBLASLT = "cublaslt"
FEW_ROWS, MOST_COPIES = 512, 64  # where reading the weights is most of the work


class Key(NamedTuple):
    """What a choice depends on."""

    kind: str
    result: str
    n: int
    k: int
    m: int
    activation: str | None
    has_bias: bool
    has_residual: bool
    residual_first: bool


def round_up_to_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


class Products:
    """The products of one device. Threads may share it."""

    def __init__(self, device: Device) -> None:
        """Nothing is loaded or timed before it is needed."""
        self.device = device
        self._chosen: dict[Key, Way] = {}
        self._plans: OrderedDict[Any, list[cublaslt.Plan]] = OrderedDict()
        self._biases: dict[Any, Array] = {}
        self._lock = threading.RLock()

    def run(
        self,
        x: Array,
        weight: Array,
        bias: Array,
        activation: str | None,
        residual: Array,
        y: Array,
        residual_first: bool = False,
    ) -> None:
        """y = activation(x weight^T + bias) + residual, as cuda_linear.linear takes them."""
        (n, k), m = x.shape, weight.shape[0]
        rows = round_up_to_power(n)
        has = bias is not None, residual is not None
        key = Key(stored(x), stored(y), rows, k, m, activation, *has, residual_first)
        if (way := self._chosen.get(key)) is None:
            with self.device.handle, self._lock:
                if (way := self._chosen.get(key)) is None:
                    name = self._choose(key, x, weight, bias, residual, y)
                    way = self._chosen[key] = self._way(key, name)
        way(x, weight, bias, residual, y)

    def _choose(self, key: Key, *arrays: Array) -> str:
        names = list(self._names(key, *arrays))
        if len(names) == 1 or not self.device.can_time:
            return names[0]
        if (known := self._remembered.get(repr(key))) in names:
            return known
        x, weight, bias, residual, y = arrays
        with self.device.common_memory():  # a graph's memory is its own for as long as it lives
            spare = self.device.copy(y)  # a residual may be y itself
            weights, seconds = self._as_in_a_model(key, weight), {}
        for name in names:
            seconds[name] = math.inf  # where a way fails on this GPU
            with contextlib.suppress(BackendError, RuntimeError):
                way = self._way(key, name)
                calls = [partial(way, x, w, bias, residual, spare) for w in weights]
                seconds[name] = self.device.seconds(*calls)
        best = min(names, key=seconds.__getitem__)
        self._remember(key, best)
        return best

    def _as_in_a_model(self, key: Key, weight: Array) -> list[Array]:
        """The weight, and for few rows copies of it, so many that L2 has none when it is read."""
        most = MOST_COPIES if key.n <= FEW_ROWS else 1
        count = min(most, 1 + 2 * self.device.cache_bytes // max(1, weight.nbytes))
        return [weight, *(self.device.copy(weight) for _ in range(count - 1))]

    def _names(self, key: Key, *arrays: Array, everything: bool = False) -> Iterator[str]:
        """What can compute it, our default first; everything: not only what may be the fastest."""
        wanted = os.environ.get("NPCLIP_CUDA_LINEAR", "")
        capability = self.device.capability
        variants = [v for v in cuda_linear.variants(key.kind) if v.runs_on(capability)]
        named = [str(v) for v in variants if str(v) == wanted]
        if named:
            yield from named
            return
        plans = self._count_plans(key, *arrays) if wanted != "own" else 0
        if wanted == CUBLASLT and plans:
            yield f"{CUBLASLT} 0"
            return
        default = cuda_linear.default_variant(key.kind, key.n, key.m, capability)
        yield str(default)
        if not everything:
            variants = cuda_linear.worth_timing(key.kind, key.n, capability)
        yield from (str(v) for v in variants if v != default)
        yield from (f"{CUBLASLT} {i}" for i in range(plans))

    def _count_plans(self, key: Key, x: Array, weight: Array, *_: Array) -> int:
        if key.activation and key.has_residual and not key.residual_first:
            return 0  # it adds before our activation could come
        if self._library is None:
            return 0
        with contextlib.suppress(BackendError):
            return len(self._plans_of(key, x, weight))
        return 0

    def _plans_of(self, key: Key, x: Array, weight: Array) -> list[cublaslt.Plan]:
        (n, k), m, size = x.shape, weight.shape[0], x.dtype.itemsize
        strides = x.strides[0] // size, weight.strides[0] // size
        shape = n, k, m, key.kind, key.result, *strides, m, key.has_bias, key.has_residual
        with self._lock:
            if (plans := self._plans.get(shape)) is None:
                with self.device.handle:
                    plans = self._plans[shape] = self._library.plan(*shape, PLANS)
            self._plans.move_to_end(shape)
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
            return plans

    def _way(self, key: Key, name: str) -> Way:
        library, _, plan = name.partition(" ")
        if library == CUBLASLT:
            return partial(self._by_cublaslt, key, int(plan))
        variant = next(v for v in cuda_linear.variants(key.kind) if str(v) == name)
        return partial(self._by_kernel, key, variant)

    def _by_kernel(self, key: Key, variant: Any, x: Array, w: Array, bias: Array, r: Array,
                   y: Array) -> None:  # fmt: skip
        first = key.residual_first
        launch = cuda_linear.linear(x, w, bias, key.activation, r, y, variant, first)
        self.device.run(launch)

    def _by_cublaslt(self, key: Key, index: int, x: Array, w: Array, bias: Array, r: Array,
                     y: Array) -> None:  # fmt: skip
        plans = self._plans_of(key, x, w)
        if not plans:  # for this many rows, unlike those that were timed
            variant = cuda_linear.default_variant(key.kind, key.n, key.m, self.device.capability)
            return self._by_kernel(key, variant, x, w, bias, r, y)
        plan = plans[min(index, len(plans) - 1)]
        bias = self._bias(bias, key.result)
        addresses = [None if a is None else a.data.ptr for a in (x, w, bias, r, y)]
        with self.device.handle:
            stream = self.device.xp.cuda.get_current_stream().ptr
            # Freed at once: what gets its memory next on this stream comes after the product.
            workspace = self.device.empty((max(1, plan.workspace_bytes),), "u8")
            self._library.run(plan, *addresses, workspace.data.ptr, stream)
        if key.activation:
            self.device.run(cuda_rows.activate(y, key.activation))

    def _bias(self, bias: Array, kind: str) -> Array:
        """A bias stored as cuBLASLt wants it, kept as long as the one that it was made from."""
        if bias is None or kind == "f32":
            return bias
        key = id(bias), kind
        with self._lock:
            if key not in self._biases:
                self._biases[key] = self.device.cast(bias, MODEL_DTYPES[kind])
                self.device.synchronize()  # other streams will read it, too
                weakref.finalize(bias, self._biases.pop, key, None)
            return self._biases[key]

    @cached_property
    def _library(self) -> Any:
        """cuBLASLt, or None where there is none."""
        if not self.device.can_time:
            return None
        with contextlib.suppress(BackendError), self.device.handle:
            return cublaslt.CublasLt()
        return None

    @cached_property
    def _file(self) -> Path | None:
        """Where the choices of this GPU, our kernels and this cuBLASLt are kept."""
        from . import hub

        what = [cuda_linear.fingerprint()]
        if self._library is not None:
            what.append(f"cublaslt-{self._library.version}")
        name = "-".join([*self.device.name.split(), *map(str, self.device.capability), *what])
        with contextlib.suppress(NpclipError):
            return hub.cache_directory() / "products" / f"{name}.json"
        return None

    @cached_property
    def _remembered(self) -> dict[str, str]:
        return self._read()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._file.read_text()) if self._file else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, key: Key, name: str) -> None:
        self._remembered[repr(key)] = name
        if not self._file:
            return
        with contextlib.suppress(OSError):  # without a cache it is timed anew
            self._file.parent.mkdir(parents=True, exist_ok=True)
            known = self._read() | self._remembered  # other processes write, too
            with replacing(self._file) as stream:
                stream.write(json.dumps(known, indent=0, sort_keys=True).encode())
