"""GPUs, through CuPy: the only module that imports it, when a device is first asked for.

A Device allocates, copies and launches; it knows no op. Work goes to CuPy's current stream.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cuda_driver
from .cuda_launch import DTYPES, Kernel, Launch, TensorMap
from .errors import BackendError

if TYPE_CHECKING:
    from types import ModuleType

MIN_CUPY = 14
MIN_CAPABILITY = 7, 5  # tensor cores with ldmatrix
INSTALL = "pip install 'npclip[cuda12]' (or 'npclip[cuda13]' for CUDA 13)"
NUMPY_DTYPES = {
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "i32": np.int32, "u8": np.uint8,
}  # fmt: skip
NULL = np.uint64(0)  # a pointer
SHARED_BYTES = 48 << 10  # of dynamic shared memory that a kernel may have without asking
TIMED_RUNS, CALLS_PER_RUN = 7, 10
ALIGNMENT = 16  # bytes, of what the kernels read
KEPT_INDICES = 128  # small index arrays that a Device remembers
KEPT_MAPS = 4096  # and tensor maps, of 128 bytes


@functools.cache
def cupy() -> ModuleType:
    """CuPy. Raises BackendError where it is missing, too old or broken."""
    try:
        import cupy
    except ImportError as error:
        raise BackendError(f"no GPU without CuPy ({error}): {INSTALL}") from None
    except Exception as error:  # what its libraries raise when they do not fit together
        raise BackendError(f"CuPy cannot be used ({error}): {INSTALL}") from error
    if int(cupy.__version__.split(".")[0]) < MIN_CUPY:
        raise BackendError(f"CuPy {cupy.__version__} is too old, {MIN_CUPY} is needed: {INSTALL}")
    return cupy


def device_count() -> int:
    """How many GPUs CuPy sees. Raises BackendError where there is no CuPy, no driver or no GPU."""
    xp = cupy()
    try:
        count = int(xp.cuda.runtime.getDeviceCount())
    except xp.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy finds no usable GPU: {error}") from None
    if not count:
        raise BackendError("CuPy finds no GPU")
    return count


def why_unavailable() -> str | None:
    """Why there is no GPU to use; None if there is one."""
    try:
        open_device(0)
    except BackendError as error:
        return str(error)
    return None


_devices: dict[int, Device] = {}
_lock = threading.Lock()


def open_device(ordinal: int) -> Device:
    """The GPU of that number. Raises BackendError where it cannot be used."""
    with _lock:
        if ordinal not in _devices:
            if ordinal >= (count := device_count()):
                raise BackendError(f"there is no cuda:{ordinal}: CuPy finds {count} GPU(s)")
            _devices[ordinal] = Device(ordinal)
        return _devices[ordinal]


def device_of(x: Any) -> Device:
    """The Device on which an array lies."""
    return _devices.get(x.device.id) or open_device(x.device.id)


@dataclass(frozen=True)
class Sequences:
    """cu_seqlens that lie on a device already."""

    array: Any  # int32 [B + 1]
    longest: int  # no sequence is longer


@dataclass(frozen=True)
class Captured:
    """A CUDA graph: what a function put on the stream, to be put there again."""

    graph: Any
    stream: Any
    result: Any  # what the function returned: every launch writes it anew
    kept: tuple[Any, ...]  # what the kernels read and write must live as long

    def launch(self) -> None:
        """Run everything once more, on the stream on which it was captured."""
        self.graph.launch(self.stream)


class Device:
    """One GPU. On one that is older than MIN_CAPABILITY, the ops are reference.py's, on CuPy."""

    def __init__(self, ordinal: int) -> None:
        """Use open_device()."""
        self.ordinal, self.xp = ordinal, cupy()
        self.handle = self.xp.cuda.Device(ordinal)
        try:
            with self.handle:
                properties = self.xp.cuda.runtime.getDeviceProperties(ordinal)
        except self.xp.cuda.runtime.CUDARuntimeError as error:
            raise BackendError(f"cuda:{ordinal} cannot be used: {error}") from None
        self.name = properties["name"].decode()
        self.capability = properties["major"], properties["minor"]
        self._start()
        if self.has_kernels:
            self._compiler  # noqa: B018 - fails now, not when the first image is encoded

    def _start(self) -> None:
        self._functions: dict[Kernel, Any] = {}
        self._shared: dict[Kernel, int] = {}  # bytes of those that have asked for more
        self._indices: OrderedDict[tuple[Any, bytes], Any] = OrderedDict()
        self._maps: dict[tuple[Any, ...], Any] = {}
        self._lock, self._threads = threading.RLock(), threading.local()

    can_time = True  # unlike a device of the tests

    @property
    def has_kernels(self) -> bool:
        """Whether the CUDA kernels run here."""
        return self.capability >= MIN_CAPABILITY

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of models, the default first. Tensor cores take bfloat16 from 8.0 on."""
        if not self.has_kernels:
            return ("float32",)
        return tuple(d for d in DTYPES if d != "bfloat16" or self.capability >= (8, 0))

    @functools.cached_property
    def processors(self) -> int:
        """How many blocks of a large kernel run at once."""
        return int(self.xp.cuda.runtime.getDeviceProperties(self.ordinal)["multiProcessorCount"])

    @functools.cached_property
    def cache_bytes(self) -> int:
        """Of L2."""
        return int(self.xp.cuda.runtime.getDeviceProperties(self.ordinal)["l2CacheSize"])

    @functools.cached_property
    def products(self) -> Any:
        """What computes linear here (cuda_products.Products)."""
        from .cuda_products import Products

        return Products(self)

    def __str__(self) -> str:
        """As load() takes it."""
        return f"cuda:{self.ordinal}"

    def empty(self, shape: tuple[int, ...], stored: str) -> Any:
        """An uninitialised array; stored: f16, bf16, f32, i32 or u8."""
        with self.handle:
            return self.xp.empty(shape, NUMPY_DTYPES[stored])

    def asarray(self, x: Any) -> Any:
        """A contiguous array on this GPU: a host array is copied, a device array taken over."""
        with self.handle:
            return self.xp.ascontiguousarray(self.xp.asarray(x))

    def take_over(self, x: Any) -> Any:
        """An array of any library on this GPU, or copied from another, as CuPy's, contiguous.

        By DLPack where the library has it: it waits for what the library has still to compute.
        """
        xp = self.xp
        with self.handle:
            if not isinstance(x, xp.ndarray):
                x = xp.from_dlpack(x) if hasattr(x, "__dlpack__") else xp.asarray(x)
            if not x.flags.c_contiguous:
                with x.device:
                    x = xp.ascontiguousarray(x)
            x = self.asarray(x)
            return x.copy() if x.data.ptr % ALIGNMENT else x

    def asnumpy(self, x: Any) -> Any:
        """A host copy, when everything before it on the stream is done."""
        with self.handle:
            return self.xp.asnumpy(x)

    def copy(self, x: Any) -> Any:
        """A new array with the values of a device array."""
        with self.handle:
            return x.copy()

    def cast(self, x: Any, dtype: str) -> Any:
        """A float array as a model of that dtype stores it: bfloat16 as bit patterns."""
        with self.handle:
            if dtype != "bfloat16":
                return x.astype(dtype, copy=False)
            bits = x.astype(np.float32, copy=False).view(np.uint32)
            return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)

    def widen(self, x: Any) -> Any:
        """The inverse: float32."""
        with self.handle:
            if x.dtype != np.uint16:
                return x.astype(np.float32, copy=False)
            return (x.astype(np.uint32) << 16).view(np.float32)

    def fill_up(self, x: Any, rows: int) -> Any:
        """x with rows of zeros after its own."""
        if len(x) == rows:
            return x
        with self.handle:
            filled = self.xp.zeros((rows, *x.shape[1:]), x.dtype)
            filled[: len(x)] = x
        return filled

    def replay(self, captured: Captured, buffers: list[Any], inputs: tuple[Any, ...]) -> Any:
        """A copy of the graph's result for these inputs, which take the place of its own."""
        xp = self.xp
        with self.handle:
            current, of_graph = xp.cuda.get_current_stream(), captured.result
            result = xp.empty(of_graph.shape, of_graph.dtype)  # memory of the caller's stream
            captured.stream.wait_event(current.record())
            with captured.stream:
                for buffer, x in zip(buffers, inputs, strict=True):
                    buffer[...] = x
                captured.launch()
                result[...] = of_graph
            current.wait_event(captured.stream.record())
        return result

    def index(self, rows: Any) -> Any:
        """An int32 array on this GPU; one from the host is remembered by its values."""
        if hasattr(rows, "__cuda_array_interface__"):
            return rows
        rows = np.ascontiguousarray(rows, np.int32)
        with self._lock:
            key = rows.shape, rows.tobytes()
            if key in self._indices:
                self._indices.move_to_end(key)
            else:
                self._indices[key] = self.asarray(rows)
                self.synchronize()  # other streams will read it, too
            while len(self._indices) > KEPT_INDICES:
                self._indices.popitem(last=False)
            return self._indices[key]

    def synchronize(self) -> None:
        """Wait for what the current stream has to do."""
        with self.handle:
            self.xp.cuda.get_current_stream().synchronize()

    def sequences(self, cu_seqlens: Any) -> tuple[Any, int]:
        """cu_seqlens on this GPU, and the length of the longest sequence."""
        if isinstance(cu_seqlens, Sequences):
            return cu_seqlens.array, cu_seqlens.longest
        return self.index(cu_seqlens), int((cu_seqlens[1:] - cu_seqlens[:-1]).max(initial=0))

    def capture(self, function: Callable[[], Any]) -> Captured:
        """What function() puts on the stream, as a graph.

        It runs once before that, to compile and choose its kernels. Its arrays come from a memory
        pool of the graph's own, so that nothing else gets them.
        """
        xp = self.xp
        with self._lock, self.handle:  # nobody may take an index array away in the meantime
            pool, stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)
            stream.wait_event(xp.cuda.get_current_stream().record())
            with xp.cuda.using_allocator(pool.malloc), stream:
                function()
                stream.synchronize()
                stream.begin_capture()
                try:
                    result = function()
                finally:
                    graph = stream.end_capture()
                kept = (pool, *self._indices.values())
        return Captured(graph, stream, result, kept)

    def common_memory(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which arrays come from CuPy's pool, though a graph be captured."""
        return self.xp.cuda.using_allocator(self.xp.get_default_memory_pool().malloc)

    def seconds(self, *functions: Callable[[], Any]) -> float:
        """How long what a function puts on the stream takes, which take turns: a median.

        As a graph of several calls: one launch from the host takes longer than a small kernel.
        """
        xp, count = self.xp, max(CALLS_PER_RUN, len(functions))
        captured = self.capture(lambda: [f() for f in islice(cycle(functions), count)])
        with self.handle:
            events = [xp.cuda.Event() for _ in range(TIMED_RUNS + 1)]
            captured.launch()
            for event in events[:-1]:
                event.record(captured.stream)
                captured.launch()
            events[-1].record(captured.stream)
            events[-1].synchronize()
            milliseconds = [xp.cuda.get_elapsed_time(*pair) for pair in pairwise(events)]
        return float(np.median(milliseconds)) / 1e3 / count

    def run(self, launch: Launch) -> None:
        """Put a kernel on the stream."""
        if launch.stays:
            launch = self._staying(launch)
        kernel, grid, block, shared, arguments, _ = launch
        function = self._functions.get(kernel) or self._function(kernel)
        with self.handle:
            if shared > self._shared.get(kernel, SHARED_BYTES):
                function.max_dynamic_shared_size_bytes = self._shared[kernel] = shared
            if (driver := self._driver) is not None:
                self._begin_thread()
                driver.run(function, launch, self.xp.cuda.get_current_stream().ptr)
                return
            arguments = tuple([NULL if a is None else a for a in arguments])
            function(grid, (block,), arguments, shared_mem=shared)

    @functools.cached_property
    def _driver(self) -> cuda_driver.Driver | None:
        """Where launches may overlap."""
        if self.capability < cuda_driver.MIN_CAPABILITY:
            return None
        if self.xp.cuda.runtime.driverGetVersion() < cuda_driver.MIN_DRIVER:
            return None
        with contextlib.suppress(BackendError):
            return cuda_driver.Driver()
        return None

    def _begin_thread(self) -> None:
        """The driver, unlike CuPy, launches nothing before a thread has made the device current."""
        if not getattr(self._threads, "has_begun", False):
            self.xp.cuda.runtime.setDevice(self.ordinal)
            self._threads.has_begun = True

    def _staying(self, launch: Launch) -> Launch:
        """With as many blocks as run at once, at most, and its tensor maps made."""
        stays, (blocks, y, z) = launch.stays, launch.grid
        blocks = max(min(blocks, self.processors // stays * stays), stays)
        arguments = [self._map(a) if type(a) is TensorMap else a for a in launch.arguments]
        return launch._replace(grid=(blocks, y, z), arguments=tuple(arguments))

    def _map(self, wanted: TensorMap) -> Any:
        """Made once for an address and a shape: a map holds no more than these."""
        x = wanted.array
        key = x.data.ptr, x.shape, x.strides[0], wanted.box
        if (known := self._maps.get(key)) is None:
            from . import tensor_map

            with self._lock:
                if len(self._maps) >= KEPT_MAPS:
                    self._maps.clear()
                known = self._maps[key] = tensor_map.encode(*key)
        return known

    @functools.cached_property
    def _compiler(self) -> Path:
        """The NVRTC of CuPy's CUDA version: a driver may refuse what a newer one compiled."""
        from . import nvrtc

        major = self.xp.cuda.runtime.runtimeGetVersion() // 1000
        of_cuda = (path for path in nvrtc.libraries() if nvrtc.cuda_version(path)[0] == major)
        if (path := next(of_cuda, None)) is None:
            raise BackendError(f"no NVRTC of CUDA {major}, which is CuPy's: {INSTALL}")
        return path

    def _function(self, kernel: Kernel) -> Any:
        from . import nvrtc

        with self._lock, self.handle:
            if (function := self._functions.get(kernel)) is None:
                arch = kernel.arch or nvrtc.target(self.capability, self._compiler)
                cubin = nvrtc.cubin(kernel.source, f"sm_{arch}", self._compiler)
                module = self.xp.RawModule(path=str(cubin))
                function = self._functions[kernel] = module.get_function(kernel.symbol)
        return function
