"""CuPy on the CPU, as far as npclip uses it: devices, arrays, streams, graphs; kernels on the shim.

    xp = fake_cupy.module([(8, 0), (9, 0)])      # two GPUs, by their compute capabilities

Arrays are no NumPy arrays, and what CuPy 14 refuses is refused here with the same type of error:
implicit copies to the host, operands that lie on the host, streams of another device than the
current one, copies from and to the host while a stream captures. What a real GPU would compute
wrongly is a GpuError: arrays on another device than the current one, memory that a graph uses and
nobody keeps. Fresh memory holds 0xFF in every byte, and what is captured does not run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from cuda import shim

from npclip import cuda_driver
from npclip.cuda_launch import Launch

DEFAULT_SHARED = 48 << 10  # of dynamic shared memory, before a kernel asks for more
PROCESSORS, CACHE_BYTES = 7, 4096
# NumPy's functions that are CuPy's, too, as far as they are called.
FUNCTIONS = {
    "absolute", "add", "atleast_2d", "bitwise_and", "bitwise_or", "clip", "concatenate", "copysign",
    "divide", "empty", "equal", "exp", "eye", "full", "full_like", "isfinite", "isnan",
    "left_shift", "less_equal", "log", "matmul", "maximum", "minimum", "multiply", "ndim",
    "negative", "pad", "right_shift", "shape", "sliding_window_view", "sqrt", "square", "subtract",
    "triu", "vdot", "where", "zeros", "zeros_like",
}  # fmt: skip


class GpuError(Exception):
    """What would be wrong on a real GPU, though CuPy says nothing."""


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class Gpus:
    """The devices, and what was done on them."""

    def __init__(self, capabilities):
        self.capabilities = list(capabilities)
        self.launches = []  # Call, in the order of the calls, captured ones among them
        self.loaded = []  # (device, symbol) of kernels
        self.reads = []  # streams that copied to the host
        self.attributes = []  # (device, symbol, bytes) that were set
        self.functions = weakref.WeakValueDictionary()  # by CUfunction
        self.waits = []  # (stream, stream that it waits for)
        self.clock = 0.0  # milliseconds
        self.memories = weakref.WeakValueDictionary()  # by address
        self._local = threading.local()

    @property
    def state(self):
        """What CuPy keeps for each thread."""
        if not hasattr(self._local, "device"):
            self._local.device, self._local.entered = 0, []
            self._local.streams = [[Stream.null_of(self)] for _ in self.capabilities]
            self._local.pools = [None]
        return self._local

    @property
    def device(self):
        """The number of the current device."""
        return self.state.device

    @property
    def stream(self):
        """The current stream of the current device."""
        return self.state.streams[self.device][-1]

    def allocate(self, shape, dtype):
        """An uninitialised array on the current device, from the current pool."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = Memory(self, nbytes)
        return ndarray(memory.bytes.view(dtype).reshape(shape), memory)

    def put(self, work, arrays, milliseconds=0.0):
        """Do work on the current stream, or record it where that captures."""
        for array in arrays:
            if array.memory.device != self.device:
                raise GpuError(f"an array of device {array.memory.device} used on {self.device}")

        def timed():
            work()
            self.clock += milliseconds

        if self.stream.captured is None:
            timed()
        else:
            self.stream.captured.append((timed, {weakref.ref(a.memory) for a in arrays}))

    def forbid_capturing(self, what):
        """Raises RuntimeError while the current stream captures."""
        if self.stream.captured is not None:
            raise RuntimeError(f"the current stream is capturing, so {what} are disallowed")

    def at(self, address):
        """The Memory in which an address lies."""
        for start, memory in list(self.memories.items()):
            if start <= address < start + max(1, memory.bytes.size):
                return memory
        raise GpuError("an address that is nobody's")


class Memory:
    """An allocation on the current device, aligned and full of 0xFF."""

    def __init__(self, gpus, nbytes):
        self.gpus, self.device = gpus, gpus.device
        pool = gpus.state.pools[-1]
        self.pool = pool and weakref.ref(pool)
        whole = np.full(nbytes + 512, 0xFF, np.uint8)
        start = -whole.ctypes.data % 256
        self.bytes = whole[start : start + nbytes]
        self.address = self.bytes.ctypes.data
        gpus.memories[self.address] = self
        if pool:
            pool.blocks.append(self)  # what is freed stays in the pool


class MemoryPool:
    """A pool whose memory is freed with it."""

    def __init__(self):
        self.blocks = []

    def malloc(self, size):
        raise NotImplementedError("only as the argument of using_allocator")


class DefaultPool(MemoryPool):
    """Keeps nothing that nobody else keeps."""

    blocks = property(lambda self: [], lambda self, _: None)


# ---- devices, streams, events, graphs ----


class Device:
    """A context in which a device is the current one; its objects may be entered again."""

    def __init__(self, gpus, ordinal):
        self.gpus, self.id = gpus, int(ordinal)

    def __enter__(self):
        if not 0 <= self.id < len(self.gpus.capabilities):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.gpus.state.entered.append(self.gpus.device)
        self.gpus.state.device = self.id
        return self

    def __exit__(self, *_):
        self.gpus.state.device = self.gpus.state.entered.pop()

    def use(self):
        self.gpus.state.device = self.id
        return self


class Stream:
    """A stream of the device that is current when it is made."""

    _numbers = itertools.count(1)

    def __init__(self, gpus, null=False, non_blocking=False):
        self.gpus, self.non_blocking = gpus, non_blocking
        self.ptr = 0 if null else 0x5000 + 16 * next(Stream._numbers)
        self.device_id = -1 if null else gpus.device
        self.captured = None  # a list while it captures

    @classmethod
    @functools.cache
    def null_of(cls, gpus):
        return cls(gpus, null=True)

    def __enter__(self):
        if self.device_id not in (-1, self.gpus.device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with "
                f"the current device ({self.gpus.device})"
            )
        self.gpus.state.streams[self.gpus.device].append(self)
        self.gpus.state.entered.append(self.gpus.device)
        return self

    def __exit__(self, *_):
        self.gpus.state.streams[self.gpus.state.entered.pop()].pop()

    def record(self, event=None):
        event = event or Event(self.gpus)
        event.record(self)
        return event

    def wait_event(self, event):
        if event.stream is None:
            raise GpuError("waits for an event that was not recorded")
        self.gpus.waits.append((self, event.stream))

    def synchronize(self):
        if self.captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")

    def begin_capture(self, mode=None):
        if not self.ptr:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.captured = []

    def end_capture(self):
        if self.captured is None:
            raise CUDARuntimeError("cudaErrorIllegalState: no capture")
        graph, self.captured = Graph(self.gpus, self.device_id, self.captured), None
        return graph

    def is_capturing(self):
        return self.captured is not None


class Event:
    """An event of the device that is current when it is made."""

    def __init__(self, gpus):
        self.gpus, self.device = gpus, gpus.device
        self.stream = self.time = None

    def record(self, stream=None):
        stream = stream or self.gpus.stream
        device = self.gpus.device if stream.device_id < 0 else stream.device_id
        if device != self.device:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: event of another device")
        self.stream, self.time = stream, self.gpus.clock

    def synchronize(self):
        self.gpus.stream.synchronize()


def _elapsed_time(start, end):
    if start.time is None or end.time is None or start.device != end.device:
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle")
    return end.time - start.time


class Graph:
    """What was put on a stream while it captured."""

    def __init__(self, gpus, device, work):
        self.gpus, self.device, self.work = gpus, device, work

    def launch(self, stream=None):
        stream = stream or self.gpus.stream
        if stream.device_id != self.device:
            raise CUDARuntimeError("cudaErrorInvalidValue: a stream of another device")
        for work, memories in self.work:
            if any(memory() is None for memory in memories):
                raise GpuError("a graph uses memory that was freed")
            work()


# ---- arrays ----


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on a device. Its operators are NumPy's ufuncs, which ask __array_ufunc__."""

    def __init__(self, values, memory, base=None):
        self.values, self.memory, self.base = values, memory, base

    dtype = property(lambda self: self.values.dtype)
    shape = property(lambda self: self.values.shape)
    strides = property(lambda self: self.values.strides)
    flags = property(lambda self: self.values.flags)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    nbytes = property(lambda self: self.values.nbytes)
    itemsize = property(lambda self: self.values.itemsize)
    T = property(lambda self: self.transpose())

    @property
    def gpus(self):
        return self.memory.gpus

    @property
    def device(self):
        return Device(self.gpus, self.memory.device)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.values.ctypes.data, device_id=self.memory.device)

    @property
    def __cuda_array_interface__(self):
        fields = {"shape": self.shape, "typestr": self.dtype.str, "version": 3, "descr": ""}
        strides = None if self.flags.c_contiguous else self.strides
        return {**fields, "strides": strides, "data": (self.data.ptr, False), "stream": 1}

    def __dlpack_device__(self):
        return 2, self.memory.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self  # for from_dlpack below only

    def __array__(self, *_, **__):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def get(self, stream=None):
        stream = stream or self.gpus.stream
        if stream.device_id not in (-1, self.memory.device):
            raise GpuError("a copy to the host that waits for no stream of the array's device")
        if stream.captured is not None:
            raise RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
        self.gpus.reads.append(stream)
        return np.array(self.values)

    def item(self):
        return self.get().item()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __repr__(self):
        return repr(self.get())

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def _view(self, values):
        return ndarray(values, self.memory, self if self.base is None else self.base)

    def _compute(self, function):
        """A new array of function(values of this one)."""
        return _compute(self.gpus, lambda: function(self.values), [self])

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, (list, np.ndarray)) for k in keys):
            self.gpus.forbid_capturing("H2D transfers")
        if any(isinstance(k, (list, np.ndarray, ndarray)) for k in keys):
            bare = tuple(k.values if isinstance(k, ndarray) else k for k in keys)
            return self._compute(lambda values: values[bare])
        return self._view(self.values[keys if Ellipsis in keys else (*keys, ...)])

    def __setitem__(self, key, value):
        if isinstance(value, np.ndarray):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        bare = value.values if isinstance(value, ndarray) else value
        index = isinstance(key, ndarray)  # the rows of an array, of which self[key] is a copy
        target = self if index else self[key]

        def work():
            target.values[key.values if index else ...] = bare

        self.gpus.put(work, [a for a in (target, key, value) if isinstance(a, ndarray)])

    def astype(self, dtype, copy=True):
        if not copy and self.dtype == dtype:
            return self
        return self._compute(lambda values: values.astype(dtype))

    def copy(self):
        if self.memory.device == self.gpus.device:
            return self._compute(np.array)
        if not self.flags.c_contiguous:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        self.gpus.forbid_capturing("copies between devices")
        result = self.gpus.allocate(self.shape, self.dtype)
        result.values[...] = self.values
        return result

    def view(self, dtype):
        return self._view(self.values.view(dtype))

    def transpose(self, *axes):
        return self._view(self.values.transpose(*axes))

    def reshape(self, *shape):
        view = self.values.view()
        try:
            view.shape = self.values.reshape(*shape).shape
        except AttributeError:  # it would have to be copied
            return self._compute(lambda values: values.reshape(*shape))
        return self._view(view)

    def ravel(self):
        return self.reshape(-1)


def _reduction(name):
    def method(self, *arguments, **options):
        return self._compute(lambda values: getattr(values, name)(*arguments, **options))

    return method


for _name in ("max", "mean", "min", "sum", "any", "all", "argmax", "diagonal"):
    setattr(ndarray, _name, _reduction(_name))


def _compute(gpus, function, arrays, out=None):
    """The array that function() gives, made on the current stream; function reads the arrays."""
    with np.errstate(all="ignore"):
        values = np.asarray(function())
    result = gpus.allocate(values.shape, values.dtype) if out is None else out

    def work():
        with np.errstate(all="ignore"):
            result.values[...] = function()

    gpus.put(work, [*arrays, result])
    return result


def _call(gpus, function, arguments, options, out=None):
    arrays = []

    def bare(x):
        if isinstance(x, (list, tuple)):
            return type(x)(bare(item) for item in x)
        if isinstance(x, ndarray):
            arrays.append(x)
            return x.values
        if isinstance(x, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return x

    arguments = bare(tuple(arguments))
    options = {name: bare(x) for name, x in options.items()}
    if function in (np.shape, np.ndim):
        return function(*arguments, **options)
    return _compute(gpus, lambda: function(*arguments, **options), arrays, out)


def _array_ufunc(self, ufunc, method, *inputs, out=None, **options):
    if method != "__call__" or ufunc.__name__ not in FUNCTIONS:
        return NotImplemented
    if out is not None and not isinstance(out[0], ndarray):
        raise TypeError("return arrays must be of ArrayType")
    return _call(self.gpus, ufunc, inputs, options, out and out[0])


def _array_function(self, function, _, arguments, options):
    if function.__name__ not in FUNCTIONS:
        return NotImplemented
    if function is np.atleast_2d:
        return self._view(np.atleast_2d(self.values))
    return _call(self.gpus, function, arguments, options)


ndarray.__array_ufunc__ = _array_ufunc
ndarray.__array_function__ = _array_function


# ---- kernels ----


class Source(SimpleNamespace):
    """What the shim needs of a kernel."""

    def __hash__(self):
        return hash((self.source, self.symbol))


class Function:
    """A RawKernel: its attributes and its launches are those on the current device."""

    def __init__(self, gpus, kernel):
        self.gpus, self.kernel = gpus, kernel
        self._shared = {}  # by device
        object.__setattr__(kernel, "ptr", id(self))  # though it be frozen
        gpus.functions[kernel.ptr] = self

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._shared.get(self.gpus.device, DEFAULT_SHARED)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes):
        if nbytes > shim.MAX_SHARED:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._shared[self.gpus.device] = nbytes
        self.gpus.attributes.append((self.gpus.device, self.kernel.symbol, nbytes))

    def __call__(self, grid, block, args, *, shared_mem=0):
        if not (isinstance(grid, tuple) and isinstance(block, tuple)):
            raise TypeError("grid and block must be tuples")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        arrays = [x for x in args if isinstance(x, ndarray)]
        launch = Launch(self.kernel, grid, *block, shared_mem, tuple(map(_argument, args)))
        stream = self.gpus.stream
        self.gpus.launches.append(
            SimpleNamespace(
                symbol=self.kernel.symbol,
                device=self.gpus.device,
                stream=stream,
                captured=stream.is_capturing(),
            )
        )
        self.gpus.put(lambda: shim.run(launch), arrays, 1.0)


def _argument(x):
    """A kernel's argument as the shim takes it."""
    if isinstance(x, ndarray):
        return x.values
    if isinstance(x, np.ndarray) and x.size != 1:  # one element goes by value
        raise TypeError("You are trying to pass a numpy.ndarray as a kernel parameter.")
    return None if isinstance(x, np.uint64) else x  # npclip's null pointer; the driver's is None


class Libcuda:
    """The driver's launches, which read the arguments from memory; the calls are its own."""

    def __init__(self, gpus):
        self.cuLaunchKernelEx = _LaunchKernelEx(gpus)


class _LaunchKernelEx:
    def __init__(self, gpus):
        self.gpus, self.error, self.attributes = gpus, 0, []

    def __call__(self, config, function, pointers, extra):
        config, gpus = config._obj, self.gpus
        if not getattr(gpus.state, "has_context", False):
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        if self.error or extra is not None:
            return self.error or 1
        if (config.stream or 0) != gpus.stream.ptr:
            raise GpuError("a launch on another stream than the current one")
        for i in range(config.count):
            size = ctypes.sizeof(cuda_driver.Attribute)
            attribute = cuda_driver.Attribute.from_address(config.attributes + i * size)
            self.attributes.append((attribute.id, attribute.value))
        launched, pointers = gpus.functions[function], pointers._obj
        parameters = shim.signature(launched.kernel)
        if len(pointers) != len(parameters):
            raise GpuError(f"{len(pointers)} arguments for {len(parameters)} parameters")
        arguments = tuple(map(self._argument, pointers, parameters))
        (width, *others), shared = config.block, config.shared
        assert others == [1, 1]
        launched(tuple(config.grid), (width,), arguments, shared_mem=shared)
        return 0

    def _argument(self, pointer, parameter):
        """What lies there, as CuPy takes it; an array is flat, to the end of its memory."""
        kind, size = parameter.removeprefix("const ")[0], int(parameter.rstrip("*")[-1])
        dtype = np.dtype({"b": "u", "?": "u"}.get(kind, kind) + str(size))
        if not parameter.endswith("*"):
            return np.frombuffer(ctypes.string_at(pointer, size), dtype)[0]
        address = ctypes.c_uint64.from_address(pointer).value
        if not address:
            return None
        memory = self.gpus.at(address)
        rest = memory.bytes[address - memory.address :]
        return ndarray(rest[: len(rest) // size * size].view(dtype), memory)


# ---- the module ----


def module(capabilities=((8, 0),), version="14.2.0", error=None):
    """A module like cupy, with .gpus. error: what getDeviceCount finds wrong."""
    gpus = Gpus(capabilities)

    def asarray(x):
        if isinstance(x, ndarray):
            return x if x.memory.device == gpus.device else x.copy()
        if (interface := getattr(x, "__cuda_array_interface__", None)) is not None:
            memory = gpus.at(interface["data"][0])
            fields = {name: interface[name] for name in ("shape", "typestr", "data", "strides")}
            values = np.asarray(SimpleNamespace(__array_interface__={**fields, "version": 3}))
            return asarray(ndarray(values, memory))
        host = np.asarray(x)
        if host.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {host.dtype}")
        gpus.forbid_capturing("H2D transfers")
        result = gpus.allocate(host.shape, host.dtype)
        result.values[...] = host
        return result

    def ascontiguousarray(x):
        x = asarray(x)
        return x if x.flags.c_contiguous else x.copy()

    def zeros(shape, dtype=float):
        result = gpus.allocate(shape, dtype)
        result[...] = 0
        return result

    def add_at(x, index, values):
        gpus.put(lambda: np.add.at(x.values, index.values, values.values), [x, index, values])

    def from_dlpack(x):
        kind, ordinal = x.__dlpack_device__()
        if kind != 2:
            raise TypeError("CPU arrays cannot be directly imported to CuPy.")
        with Device(gpus, ordinal):  # where it stays
            return x.__dlpack__(stream=gpus.stream.ptr or 1, max_version=(1, 0), copy=None)

    def get_device_count():
        if error:
            raise CUDARuntimeError(error)
        return len(gpus.capabilities)

    def get_device_properties(ordinal):
        major, minor = gpus.capabilities[ordinal]
        name = b"fake GPU %d" % ordinal
        sizes = {"multiProcessorCount": PROCESSORS, "l2CacheSize": CACHE_BYTES}
        return {"name": name, "major": major, "minor": minor, **sizes}

    def set_device(ordinal):
        gpus.state.device, gpus.state.has_context = ordinal, True

    def raw_module(*, path):
        if not isinstance(path, str):
            raise TypeError("Argument 'path' has incorrect type (expected str)")

        def get_function(name):
            gpus.loaded.append((gpus.device, name))
            return Function(gpus, Source(source=Path(path).read_text(), symbol=name))

        return SimpleNamespace(get_function=get_function)

    @contextlib.contextmanager
    def using_allocator(malloc):
        gpus.state.pools.append(malloc.__self__)
        try:
            yield
        finally:
            gpus.state.pools.pop()

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=get_device_count,
        getDeviceProperties=get_device_properties,
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 13000,
        getDevice=lambda: gpus.device,
        setDevice=set_device,
    )
    return SimpleNamespace(
        __version__=version,
        gpus=gpus,
        libcuda=Libcuda(gpus),
        ndarray=ndarray,
        empty=gpus.allocate,
        zeros=zeros,
        add=SimpleNamespace(at=add_at),
        asarray=asarray,
        ascontiguousarray=ascontiguousarray,
        asnumpy=lambda x: x.get() if isinstance(x, ndarray) else np.asarray(x),
        from_dlpack=from_dlpack,
        RawModule=raw_module,
        get_default_memory_pool=DefaultPool,
        cuda=SimpleNamespace(
            runtime=runtime,
            Device=functools.partial(Device, gpus),
            Stream=functools.partial(Stream, gpus),
            Event=functools.partial(Event, gpus),
            MemoryPool=MemoryPool,
            using_allocator=using_allocator,
            get_current_stream=lambda: gpus.stream,
            get_elapsed_time=_elapsed_time,
        ),
    )
