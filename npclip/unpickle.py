"""A pickle interpreter that can build what torch checkpoints hold, and can run nothing.

A pickle is a program for a stack machine, and may name any function for Python to call. Here
the standard library's pickletools splits the bytes into opcodes (it executes nothing), the machine
below knows only the opcodes that torch writes, and a name is a key of the tables below, never
something to import. Whatever else a pickle asks for is a CheckpointError.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError
from .tensor import DTYPES


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, such as torch.FloatStorage: a label, not the object."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The flat array of elements that tensors are views of: entry data/<key> of the archive."""

    dtype: str
    key: str
    size: int  # elements


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count elements. Not yet checked against it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Module:
    """An inert TorchScript object: the name of its class, and its attributes."""

    cls: str
    attributes: dict[Any, Any] = field(default_factory=dict)


STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}


def _tensor(
    storage: object, offset: object, shape: object, strides: object, *_unused: object
) -> StoredTensor:
    if not (isinstance(storage, Storage) and isinstance(shape, tuple | list)):
        raise TypeError("a tensor needs a storage and a shape")
    if not (isinstance(strides, tuple | list) and len(strides) == len(shape)):
        raise TypeError("a tensor needs one stride per dimension")
    numbers = [_count(n) for n in (offset, *shape, *strides)]
    rank = len(shape)
    return StoredTensor(
        storage, numbers[0], tuple(numbers[1 : 1 + rank]), tuple(numbers[1 + rank :])
    )


def _count(number: object) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError("sizes, strides and offsets must be integers from 0 to 2^63 - 1")
    return number


# What a pickle may call -> what is done instead. TorchScript tags its lists by the last group.
CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_unused: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_unused: tensor,
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *_unused: None,
    "torch.jit._pickle.build_intlist": lambda items: items,
    "torch.jit._pickle.build_tensorlist": lambda items: items,
    "torch.jit._pickle.build_doublelist": lambda items: items,
    "torch.jit._pickle.build_boollist": lambda items: items,
    "torch.jit._pickle.restore_type_tag": lambda value, _tag: value,
}
MODULE_PREFIX = "__torch__."  # classes that a TorchScript archive brings along; never defined here
NAMES = {*CALLS, *STORAGES, *(f"torch.{dtype}" for dtype in DTYPES)}


def unpickle(data: bytes) -> Any:
    """The object that the pickle describes, made of None, numbers, str, tuple, list, dict (also
    for OrderedDict) and the classes above.

    Raises CheckpointError for a damaged pickle, and for any name or opcode not listed here.
    """
    machine, position = _Machine(), 0
    try:
        for opcode, argument, at in pickletools.genops(data):
            position = at or 0
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except Exception as error:  # of many types: what genops meets in garbage, operands that misfit
        raise CheckpointError(f"its pickle is damaged at byte {position}: {error}") from error
    raise AssertionError("genops ends with STOP or raises")


class _Machine:
    """Pickle's stack machine. Misuse of the stack raises IndexError, KeyError or TypeError."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def result(self) -> Any:
        if self.outer or len(self.stack) != 1:
            raise ValueError("it ends in the middle of an object")
        return self.pop()

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def step(self, opcode: str, argument: Any) -> None:
        """Execute one opcode."""
        stack, push, pop = self.stack, self.stack.append, self.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_to_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(opcode[-1]))][::-1]))
            case "APPEND":
                item = pop()
                _of_type(stack[-1], list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                _of_type(self.stack[-1], list).extend(items)
            case "SETITEM":
                value, key = pop(), pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                _set_items(self.stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(_global(f"{_of_type(module, str)}.{_of_type(name, str)}"))
            case "BINPERSID":
                push(_storage(*_of_type(pop(), tuple)))
            case "REDUCE":
                arguments, name = _of_type(pop(), tuple), _of_type(pop(), Global).name
                push(CALLS[name](*arguments))
            case "NEWOBJ":
                arguments, name = _of_type(pop(), tuple), _of_type(pop(), Global).name
                if arguments or not name.startswith(MODULE_PREFIX):
                    raise TypeError("it makes an object that is not a TorchScript module")
                push(Module(name))
            case "BUILD":
                _set_state(pop(), stack[-1])
            case _:
                raise CheckpointError(
                    f"its pickle uses opcode {opcode}, which no checkpoint needs; "
                    "nothing was executed"
                )


def _of_type(value: Any, cls: type) -> Any:
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, found {type(value).__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    for key in keys:
        if not isinstance(key, str | int | float):  # hashing nested tuples may take forever
            raise TypeError(f"a key of type {type(key).__name__}")
    _of_type(target, dict).update(zip(keys, values, strict=True))


def _set_state(state: Any, target: Any) -> None:
    if isinstance(target, Module):
        # The state of a class with __getstate__ can be anything; it holds no parameters.
        target.attributes = state if isinstance(state, dict) else {}
    else:
        _of_type(target, dict)  # an OrderedDict's _metadata (versions of modules): not needed


def _global(name: str) -> Global:
    if name in NAMES or name.startswith(MODULE_PREFIX):
        return Global(name)
    raise CheckpointError(
        f"its pickle refers to {name[:100]!r}, which is not part of a checkpoint; "
        "nothing was executed (of your own model, save the state_dict)"
    )


def _storage(kind: object, cls: object, key: object, _device: object, size: object) -> Storage:
    if kind != "storage" or not isinstance(cls, Global) or not isinstance(key, str):
        raise TypeError("a persistent id that is not a storage")
    return Storage(STORAGES[cls.name], key, _count(size))
