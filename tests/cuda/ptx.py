"""Runs CUDA kernels on the CPU: an interpreter of the PTX that NVRTC makes of them, on NumPy.

    statistics = ptx.run(launch)      # writes into the launch's arrays, as a device would

One cluster of blocks after the other. A register is an array with an element per thread of the
block, and an instruction is executed for all threads that stand at it at once; of the groups of
threads that stand apart the one at the lowest address goes first, so that they meet again where
branches join.

What a device would leave undefined or slow is looked for on the way:

  KernelError      misaligned or out-of-bounds accesses (to the byte, for each array), barriers and
                   warp operations that some threads miss, cp.async that is never waited for
  races            two threads touch the same shared memory, one writes, and no barrier lies
                   between: bar.sync, or bar.warp.sync within a warp. It is found whatever the order
                   in which the threads happened to run, because each access is stamped with a clock
                   (see SharedMemory)
  uninitialised    shared memory read before anything was written there (it reads as NaN)
  bank_conflicts   of ldmatrix; other_conflicts: of every other access to shared memory

A kernel that waits for the one before it (griddepcontrol.wait) may touch no array before that: a
KernelError, but for its weights, the parameter w, which no kernel writes.

What is not modelled: time, ptxas, races in global memory, and the last bits of ex2.approx and its
kind and of the sums within mma, which a device rounds in its own way.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npclip import nvrtc
from npclip.cuda_launch import Launch, TensorMap

WARP = 32
SHARED_WINDOW = 1 << 56  # where generic addresses of shared memory begin
PARAMETER_WINDOW, PARAMETER_BYTES = 1 << 57, 1 << 12  # of parameters, and for each
IN_FLIGHT = np.iinfo(np.int64).max  # the stamp of bytes that a cp.async is still writing
POISON = 0xFF  # uninitialised shared memory: NaN in every float type

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
TYPES: dict[str, Any] = {
    "u8": U8, "u16": U16, "u32": U32, "u64": U64, "s8": I8, "s16": I16, "s32": I32, "s64": I64,
    "b8": U8, "b16": U16, "b32": U32, "b64": U64, "f32": F32, "f64": F64, "f16": F16,
    "bf16": U16, "f16x2": U32, "bf16x2": U32, "pred": np.bool_,
}  # fmt: skip


class KernelError(Exception):
    """The kernel does what no kernel may."""


@dataclass
class Statistics:
    """What was counted over all blocks of a launch."""

    instructions: int = 0  # executed, each once for all threads that stood at it
    mma: int = 0  # warp-wide matrix products
    bank_conflicts: int = 0  # of ldmatrix and stmatrix: cycles beyond the first
    other_conflicts: int = 0  # of ld, st and cp.async on shared memory
    races: int = 0  # accesses
    race_at: set[str] = field(default_factory=set)  # the instructions of the races
    uninitialised: int = 0  # reads


def run(
    launch: Launch,
    arch: str = "80",
    library: Path | None = None,
    edit: Callable[[str], str] | None = None,
) -> Statistics:
    """Run a launch whose arrays are NumPy's; edit changes the text of the PTX before."""
    text = _ptx(launch.kernel.source, arch, library)
    return execute(edit(text) if edit else text, launch)


def execute(text: str, launch: Launch) -> Statistics:
    """Run this PTX in place of the launch's source."""
    from cuda import ptx_hopper  # noqa: F401  (registers its instructions)

    program = _program(text, launch.kernel.symbol, launch.kernel.source)
    statistics = Statistics()
    memory = GlobalMemory([*launch.arguments, *program.tables])
    memory.early = _weights(launch)
    parameters = _parameters(program, launch.arguments)
    x_blocks, y_blocks, z_blocks = launch.grid
    if x_blocks % program.cluster:
        raise KernelError(f"{x_blocks} blocks in clusters of {program.cluster}")
    with np.errstate(all="ignore"):
        for z in range(z_blocks):
            for y in range(y_blocks):
                for x in range(0, x_blocks, program.cluster):
                    places = [(x + rank, y, z) for rank in range(program.cluster)]
                    Cluster(program, launch, places, parameters, memory, statistics).run()
    return statistics


def _weights(launch: Launch) -> list[Extent]:
    """Where the argument of the parameter w lies."""
    declared = re.search(
        rf"SYMBOL\({launch.kernel.symbol.rpartition('_')[0]}\)\(([^{{]*)\)", launch.kernel.source
    )
    names = [text.split("*")[-1].split()[-1] for text in declared[1].split(",")] if declared else []
    values = dict(zip(names, launch.arguments, strict=False))
    return [Extent.of(values["w"])] if isinstance(values.get("w"), np.ndarray) else []


@functools.lru_cache(maxsize=64)
def _ptx(source: str, arch: str, library: Path | None) -> str:
    """With -lineinfo, so that errors name the kernel's line."""
    program = nvrtc.compile(source, f"compute_{arch}", ("-lineinfo",), library)
    return program.binary.decode()


def _parameters(program: Program, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """The kernel's parameters by name, tensor maps also by address.

    Arguments that do not fit its declaration are errors.
    """
    declared = program.parameters
    if len(declared) != len(arguments):
        raise KernelError(f"{len(arguments)} arguments for {len(declared)} parameters")
    memory: dict[str, Any] = {}
    for i, (parameter, argument) in enumerate(zip(declared, arguments, strict=True)):
        if isinstance(argument, TensorMap):
            if parameter.size != 128:
                raise KernelError(f"argument {i} is a TensorMap, {parameter.name} is not")
            memory[parameter.name] = memory[PARAMETER_WINDOW + i * PARAMETER_BYTES] = argument
            continue
        if argument is None:
            value = U64(0).tobytes()
        elif isinstance(argument, np.ndarray):
            value = U64(argument.ctypes.data).tobytes()
        elif isinstance(argument, (I32, I64, F32)):
            value = argument.tobytes()
        else:
            raise KernelError(f"argument {i} is of type {type(argument).__name__}")
        pointer = argument is None or isinstance(argument, np.ndarray)
        if (
            len(value) != parameter.size
            or (parameter.pointer and not pointer)
            or (parameter.type == "f32" and not isinstance(argument, F32))
            or (parameter.type[0] in "us" and isinstance(argument, F32))
        ):
            wanted = "pointer" if parameter.pointer else f".{parameter.type}"
            raise KernelError(
                f"argument {i} is {type(argument).__name__}, {parameter.name} is a {wanted}"
            )
        memory[parameter.name] = value
    return memory


# ---------------------------------------------------------------------------------------------
# The program: statements, operands, symbols


@dataclass(frozen=True)
class Register:
    """index: in the block's list of registers, whose storage is an unsigned type or bool."""

    index: int
    storage: Any


class Constant:
    """A number, or the address of a symbol: its bits, read as whatever type is asked for."""

    def __init__(self, bits: int) -> None:
        self.bits = bits & (2**64 - 1)
        self._as: dict[Any, Any] = {}

    def read(self, dtype: Any) -> Any:
        if (value := self._as.get(dtype)) is None:
            if dtype is np.bool_:
                value = np.bool_(self.bits != 0)
            else:
                size = np.dtype(dtype).itemsize
                value = UNSIGNED[size](self.bits & ((1 << 8 * size) - 1)).view(dtype)
            self._as[dtype] = value
        return value


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Not:
    predicate: Register


@dataclass(frozen=True)
class Address:
    base: Any  # Register or Constant, or the name of a parameter
    offset: int


@dataclass(frozen=True)
class Element:
    """Of a tensor: its map's address, and coordinates, the fastest first."""

    map: Any
    coordinates: tuple[Any, ...]


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass
class Label:
    """scopes: the blocks { } around its use, outermost first; target: an instruction's index."""

    name: str
    scopes: tuple[int, ...]
    target: int = -1


SINK = Special("_")


@dataclass(eq=False)
class Instruction:
    opcode: str  # "ld.global.nc.v4.u32"
    words: tuple[str, ...]  # its parts
    operands: list[Any]
    guard: Register | None
    guard_is_negated: bool
    text: str
    where: str  # the line of the kernel's source
    execute: Callable[[Block, Instruction], None]
    index: int  # in the program

    @property
    def type(self) -> Any:
        return TYPES[self.words[-1]]

    def __str__(self) -> str:
        return f"{self.text}  // {self.where}" if self.where else self.text


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    size: int
    pointer: bool


@dataclass
class Program:
    parameters: list[Parameter]
    instructions: list[Instruction]
    tables_of_labels: dict[str, list[Label]]  # of brx.idx
    registers: list[Any]  # their storage
    static_shared: int  # bytes
    tables: list[np.ndarray]  # .global and .const arrays
    granule: int  # bytes: the smallest access to shared memory; the unit of the race check
    cluster: int  # blocks
    overlaps: bool  # with the kernel before it, until griddepcontrol.wait


_DECLARATION = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$]+)((?:\[\d*\])*)\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)
_ELEMENT_SIZE = {"8": 1, "16": 2, "32": 4, "64": 8}


@functools.lru_cache(maxsize=64)
def _program(text: str, symbol: str, source: str) -> Program:
    return _Parser(text, symbol, source).program()


class _Parser:
    def __init__(self, text: str, symbol: str, source: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
        entry = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\(", text)
        if not entry:
            raise KernelError(f"the PTX has no kernel {symbol}")
        start = text.index("{", entry.end())
        self.header = text[entry.end() : start]
        self.body = text[start + 1 : self._end(text, start)]
        self.prelude = text[: re.search(r"\.(entry|func)\b", text).start()]  # type: ignore[union-attr]
        self.lines = source.splitlines()
        self.registers: list[Any] = []
        self.scopes: list[dict[str, Register]] = [{}]
        self.scope_numbers = [0]
        self.symbols: dict[str, Constant] = {}
        self.tables: list[np.ndarray] = []
        self.static_shared = 0
        self.parameters = self._parameters()

    @staticmethod
    def _end(text: str, start: int) -> int:
        depth = 0
        for brace in re.finditer(r"[{}]", text[start:]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return start + brace.start()
        raise KernelError("the PTX ends within its kernel")

    def program(self) -> Program:
        self._declarations()
        instructions: list[Instruction] = []
        labels: dict[tuple[int, str], int] = {}
        tables_of_labels: dict[str, list[Label]] = {}
        scopes = 0
        where = ""
        body = re.sub(r"(^\s*\.loc\s[^\n]*)", r"\1;", self.body, flags=re.M)
        for statement in body.split(";"):
            statement = statement.strip()
            label = ""
            while statement:
                if statement[0] == "{":
                    scopes += 1
                    self.scopes.append({})
                    self.scope_numbers.append(scopes)
                elif statement[0] == "}":
                    self.scopes.pop()
                    self.scope_numbers.pop()
                elif match := re.match(r"([\w$]+):", statement):
                    label = match[1]
                    labels[self.scope_numbers[-1], label] = len(instructions)
                    statement = statement[match.end() - 1 :]
                else:
                    break
                statement = statement[1:].strip()
            if statement.startswith(".loc"):
                where = self._where(statement)
            elif statement.startswith(".branchtargets"):
                names = re.findall(r"[\w$]+", statement.removeprefix(".branchtargets"))
                tables_of_labels[label] = [self._label(name) for name in names]
            elif statement.startswith(".reg"):
                self._declare_registers(statement)
            elif statement and statement[0] != ".":
                instructions.append(self._instruction(statement, where, len(instructions)))
        used = [o for i in instructions for o in i.operands if isinstance(o, Label)]
        for use in (*used, *(use for table in tables_of_labels.values() for use in table)):
            inner = [scope for scope in use.scopes if (scope, use.name) in labels]
            if inner:
                use.target = labels[inner[-1], use.name]
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)", self.header)
        return Program(
            self.parameters, instructions, tables_of_labels, self.registers,
            self.static_shared, self.tables, self._granule(instructions),
            int(cluster[1]) if cluster else 1,
            any(i.words[:2] == ("griddepcontrol", "wait") for i in instructions),
        )  # fmt: skip

    def _label(self, name: str) -> Label:
        return Label(name, tuple(self.scope_numbers))

    def _declarations(self) -> None:
        dynamic = []
        for match in _DECLARATION.finditer(self.prelude + self.body):
            space, align, kind, name, shape, values = match.groups()
            size = _ELEMENT_SIZE[re.sub(r"\D", "", kind)]
            alignment = int(align or size)
            if space == "local":
                raise KernelError("the kernel uses local memory")
            if space == "shared":
                if shape.endswith("[]"):
                    dynamic.append((name, alignment))
                    continue
                self.static_shared = -(-self.static_shared // alignment) * alignment
                self.symbols[name] = Constant(self.static_shared)
                self.static_shared += size * int(np.prod(_numbers(shape), dtype=int))
            else:
                self.symbols[name] = self._table(kind, size, _numbers(shape), values)
        for _, alignment in dynamic:
            self.static_shared = -(-self.static_shared // alignment) * alignment
        for name, _ in dynamic:
            self.symbols[name] = Constant(self.static_shared)

    def _table(self, kind: str, size: int, shape: list[int], values: str | None) -> Constant:
        count = int(np.prod(shape, dtype=int))
        data = np.zeros(-(-count * size // 16) * 2, U64).view(U8)[: count * size]
        numbers = [_bits(number) for number in re.findall(r"[\w.+-]+", values or "")]
        unsigned = np.array([n % (1 << 8 * size) for n in numbers], UNSIGNED[size])
        data[: unsigned.nbytes] = unsigned.view(U8)
        self.tables.append(data)
        return Constant(data.ctypes.data)

    def _parameters(self) -> list[Parameter]:
        found = []
        for text in re.findall(r"\.param([^,)]*)", self.header):
            words = re.findall(r"\.(\w+)", text)
            name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", text)
            assert name
            kind = next(word for word in words if word in TYPES)
            size = np.dtype(TYPES[kind]).itemsize * int(name[2] or 1)
            found.append(Parameter(name[1], kind, size, "ptr" in words))
        return found

    def _declare_registers(self, statement: str) -> None:
        match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", statement, re.S)
        assert match
        kind = TYPES[match[1]]
        storage = np.bool_ if kind is np.bool_ else UNSIGNED[np.dtype(kind).itemsize]
        for name in match[2].split(","):
            if several := re.fullmatch(r"\s*(%[\w$]+)<(\d+)>\s*", name):
                for i in range(int(several[2])):
                    self._declare_register(f"{several[1]}{i}", storage)
            else:
                self._declare_register(name.strip(), storage)

    def _declare_register(self, name: str, storage: Any) -> None:
        self.scopes[-1][name] = Register(len(self.registers), storage)
        self.registers.append(storage)

    def _where(self, statement: str) -> str:
        """The kernel's line of a .loc; of code that was inlined, the line that called it."""
        match = re.search(r"inlined_at\s+\d+\s+(\d+)", statement) or re.match(
            r"\.loc\s+\d+\s+(\d+)", statement
        )
        number = int(match[1]) if match else 0
        line = self.lines[number - 1].strip() if 0 < number <= len(self.lines) else ""
        return f"line {number}: {line}"

    def _instruction(self, statement: str, where: str, index: int) -> Instruction:
        match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", statement, re.S)
        if not match:
            raise KernelError(f"not understood: {statement}")
        negated, guard, opcode, rest = match.groups()
        words = tuple(opcode.replace("::", "__").split("."))
        if (handler := HANDLERS.get(words[0])) is None:
            handler = _unknown
        operands = [self._operand(text) for text in _split(rest)]
        register = self._register(guard) if guard else None
        text = " ".join(statement.split())
        return Instruction(
            opcode, words, operands, register, bool(negated), text, where, handler, index
        )

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise KernelError(f"register {name} is not declared")

    def _operand(self, text: str) -> Any:
        if text[0] == "{":
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text[0] == "[":
            if element := re.fullmatch(r"\[\s*([^,]+),\s*\{([^}]*)\}\s*\]", text):
                coordinates = tuple(self._operand(item) for item in _split(element[2]))
                return Element(self._operand(element[1].strip()), coordinates)
            match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            if not match:
                raise NotImplementedError(f"the address {text}")
            offset = int(match[2], 0) if match[2] else 0
            base = match[1]
            if base[0] != "%" and base not in self.symbols and not base[0].isdigit():
                try:
                    return Address(self._register(base), offset)
                except KernelError:
                    return Address(base, offset)  # a parameter
            return Address(self._operand(base), offset)
        if "|" in text:
            return Vector(tuple(self._operand(item) for item in text.split("|")))
        if text[0] == "!":
            return Not(self._register(text[1:].strip()))
        if text == "_":
            return SINK
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text[0] == "%":
            return Special(text)
        if match := re.fullmatch(r"([\w$]+)\+(\d+)", text):
            return Constant(self.symbols[match[1]].bits + int(match[2]))
        if text in self.symbols:
            return self.symbols[text]
        if re.match(r"-?\d", text):
            return Constant(_bits(text))
        for i, parameter in enumerate(self.parameters):
            if text == parameter.name:
                return Constant(PARAMETER_WINDOW + i * PARAMETER_BYTES)
        return self._label(text)

    @staticmethod
    def _granule(instructions: list[Instruction]) -> int:
        sizes = [16]
        for instruction in instructions:
            words = instruction.words
            generic = words[0] in ("ld", "st", "atom") and not {
                "global", "param", "const"
            } & set(words)  # fmt: skip
            if any(w.startswith("shared") for w in words) or generic:
                if words[0] in ("ld", "st"):
                    sizes.append(_access_size(words))
                elif words[0] in ("atom", "red"):
                    sizes.append(np.dtype(TYPES[words[-1]]).itemsize)
                elif words[0] == "cp" and len(instruction.operands) > 2:
                    size = instruction.operands[2]
                    sizes.append(size.bits if isinstance(size, Constant) else 16)
        return min(sizes)


def _numbers(shape: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", shape)]


def _bits(text: str) -> int:
    """Of a literal: 12, -1, 0x1FU, 0f3F800000, 0d..., 1.5."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    if "." in text:
        return int(F32(text).view(U32))
    text = text.rstrip("U")
    octal = re.fullmatch(r"(-?)0(\d+)", text)
    return int(f"{octal[1]}0o{octal[2]}" if octal else text, 0)


def _split(text: str) -> list[str]:
    return [item.strip() for item in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,{\[]*", text)]


def _access_size(words: tuple[str, ...]) -> int:
    lanes = 8 if "v8" in words else 4 if "v4" in words else 2 if "v2" in words else 1
    return lanes * int(np.dtype(TYPES[words[-1]]).itemsize)


# ---------------------------------------------------------------------------------------------
# Memory


@dataclass
class Extent:
    """Where an array lies: rows of width bytes, a pitch apart (one row, if it is contiguous)."""

    low: int
    high: int
    flat: np.ndarray  # bytes from low to high
    pitch: int
    width: int
    writeable: bool

    @classmethod
    def of(cls, array: np.ndarray) -> Extent:
        low, writeable = array.ctypes.data, array.flags.writeable
        if array.flags.c_contiguous:
            flat = array.view(U8).reshape(-1) if array.ndim else array.reshape(1).view(U8)
            return cls(low, low + flat.size, flat, flat.size, flat.size, writeable)
        pitch, step = array.strides if array.ndim == 2 else (0, 0)
        width = array.shape[-1] * array.itemsize
        if step != array.itemsize or pitch < width:
            raise KernelError("an argument is neither contiguous nor of contiguous rows")
        size = (array.shape[0] - 1) * pitch + width
        flat = np.lib.stride_tricks.as_strided(array.view(U8), (size,), (1,), writeable=writeable)
        return cls(low, low + size, flat, pitch, width, writeable)

    def holds(self, address: np.ndarray, size: int) -> np.ndarray:
        inside = (address >= U64(self.low)) & (address + U64(size) <= U64(self.high))
        if self.pitch > self.width:
            inside &= (address - U64(self.low)) % U64(self.pitch) + U64(size) <= U64(self.width)
        return inside


class GlobalMemory:
    """The arrays of a launch, at their real addresses."""

    def __init__(self, values: list[Any]) -> None:
        self.early: list[Extent] = []  # what a kernel may read before its griddepcontrol.wait
        arrays = [v for v in values if isinstance(v, np.ndarray) and v.nbytes]
        self.extents = [Extent.of(array) for array in arrays]

    def parts(self, address: np.ndarray, size: int, at: Instruction) -> Any:
        """(which lanes, their offsets, the array) for each array that the addresses lie in."""
        lowest, highest = int(address.min()), int(address.max()) + size
        for extent in self.extents:
            if (
                extent.low <= lowest
                and highest <= extent.high
                and (extent.pitch == extent.width or extent.holds(address, size).all())
            ):
                yield slice(None), (address - U64(extent.low)).view(I64), extent
                return
        left = np.ones(address.size, np.bool_)
        for extent in self.extents:
            inside = left & extent.holds(address, size)
            if inside.any():
                offset = (address[inside] - U64(extent.low)).view(I64)
                yield np.nonzero(inside)[0], offset, extent
                left &= ~inside
        if left.any():
            raise KernelError(f"{self._nearest(int(address[left][0]), size)} at {at}")

    def _nearest(self, address: int, size: int) -> str:
        text = f"{size} bytes at {address:#x}, outside every array"
        if self.extents:
            distance, array = min(
                (max(extent.low - address, address + size - extent.high), i)
                for i, extent in enumerate(self.extents)
            )
            if distance <= 0:
                text += f": between the rows of array {array} of the arguments"
            elif distance < 1 << 40:
                text += f": {distance} bytes beyond array {array} of the arguments"
        return text

    def load(self, address: np.ndarray, size: int, at: Instruction) -> np.ndarray:
        result: np.ndarray | None = None
        for lanes, offset, extent in self.parts(address, size, at):
            found = _gather(extent.flat, offset, size)
            if isinstance(lanes, slice):
                return found
            if result is None:
                result = np.empty((address.size, size), U8)
            result[lanes] = found
        assert result is not None
        return result

    def store(self, address: np.ndarray, data: np.ndarray, at: Instruction) -> None:
        size = data.shape[1]
        for lanes, offset, extent in self.parts(address, size, at):
            if not extent.writeable:
                raise KernelError(f"a store to a read-only array at {at}")
            _scatter(extent.flat, offset, data[lanes])


def _unit(flat: np.ndarray, size: int) -> int:
    unit = min(size, 8)
    return unit if flat.ctypes.data % unit == 0 else 1


def _gather(flat: np.ndarray, offset: np.ndarray, size: int) -> np.ndarray:
    """bytes [lanes, size] at the offsets, in as large pieces as may be."""
    unit = _unit(flat, size)
    view = flat[: flat.size // unit * unit].view(UNSIGNED[unit])
    index = offset // unit
    if size == unit:
        return view[index].view(U8).reshape(-1, size)
    return view[index[:, None] + np.arange(size // unit)].view(U8).reshape(-1, size)


def _scatter(flat: np.ndarray, offset: np.ndarray, data: np.ndarray) -> None:
    size = data.shape[1]
    unit = _unit(flat, size)
    view = flat[: flat.size // unit * unit].view(UNSIGNED[unit])
    pieces = np.ascontiguousarray(data).view(UNSIGNED[unit])
    view[offset[:, None] // unit + np.arange(size // unit)] = pieces


class Order:
    """What the warps of a cluster have seen of one another.

    clock ticks with every access to shared memory. synced[w, u] is the time up to which warp w has
    seen all accesses of warp u: a barrier sets it for the warps that meet.
    """

    def __init__(self, warps: int) -> None:
        self.clock = 0
        self.synced = np.zeros((warps, warps), I64)
        self.floor = 0  # the least of synced


class SharedMemory:
    """A block's shared memory, and who touched what, when.

    For each granule: the last writer and the time of its write, and per warp the last reader (-1:
    several) and the time. An access races with an earlier one of another thread that its warp has
    not seen (see Order, where this block's warps are those from first on).
    """

    def __init__(self, size: int, granule: int, order: Order, first: int) -> None:
        self.size, self.granule = size, granule
        self.order, self.first = order, first
        self.bytes = np.full(-(-size // 16) * 2, -1, I64).view(U8)
        granules, warps = -(-size // granule), len(order.synced)
        self.written = np.full(granules, -1, I64)
        self.fenced = np.zeros(granules, np.bool_)  # for Hopper's async proxy
        self.writer = np.zeros(granules, I32)
        self.writer_warp = np.zeros(granules, I32)
        self.read_at = np.full((warps, granules), -1, I64)
        self.reader = np.zeros((warps, granules), I32)

    def barrier(self, warps: np.ndarray) -> None:
        """These warps have met: each has seen whatever any of them had seen."""
        self.acquire(warps, self.release(warps))

    def seen(self, warps: np.ndarray) -> np.ndarray:
        """Up to when one of these warps has seen each warp of the cluster."""
        return self.order.synced[warps + self.first].max(0)

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What these warps have seen and done, for acquire()."""
        seen = self.seen(warps)
        seen[warps + self.first] = self.order.clock
        return seen

    def acquire(self, warps: np.ndarray, seen: np.ndarray) -> None:
        synced = self.order.synced
        synced[warps + self.first] = np.maximum(synced[warps + self.first], seen)
        self.order.floor = int(synced.min())

    def granules(self, offset: np.ndarray, size: int) -> np.ndarray:
        first = offset // self.granule
        if size == self.granule:
            return first[:, None]
        return first[:, None] + np.arange(size // self.granule)

    def note_read(
        self, offset: np.ndarray, size: int, thread: np.ndarray, warp: np.ndarray
    ) -> tuple[int, int]:
        """(races, uninitialised) of a read; thread -1: by all threads of the warp."""
        self.order.clock += 1
        index = self.granules(offset, size)
        warp = warp + self.first
        warps, threads = warp[:, None], thread[:, None]
        stamp = self.written[index]
        races = 0
        if int(stamp.max()) > self.order.floor:
            races = int(self._after_write(index, stamp, warps, threads).any(1).sum())
        uninitialised = int((stamp < 0).any(1).sum())
        before = self.read_at[warps, index]
        several = None
        if int(before.max()) > self.order.floor:
            several = before > self.order.synced[warps, warps]
            several &= self.reader[warps, index] != threads
        self.reader[warps, index] = threads
        shared = self.reader[warps, index] != threads
        if several is not None:
            shared |= several
        if shared.any():
            rows = np.broadcast_to(warps, index.shape)[shared]
            self.reader[rows, index[shared]] = -1
        self.read_at[warps, index] = self.order.clock
        return races, uninitialised

    def note_write(
        self,
        offset: np.ndarray,
        size: int,
        thread: np.ndarray,
        warp: np.ndarray,
        in_flight: bool = False,
    ) -> int:
        """The races of a write; thread -2: by all threads of the warp.

        A warp of another block of the cluster is counted from this block's first on, too.
        """
        self.order.clock += 1
        index = self.granules(offset, size)
        warp = warp + self.first
        warps, threads = warp[:, None], thread[:, None]
        stamp = self.written[index]
        bad = np.zeros(index.shape, np.bool_)
        if int(stamp.max()) > self.order.floor:
            bad |= self._after_write(index, stamp, warps, threads)
        reads = self.read_at[:, index]
        if int(reads.max()) > self.order.floor:
            late = reads > self.order.synced[warp].T[:, :, None]
            bad |= (late & (self.reader[:, index] != threads)).any(0)
        self.writer[index] = threads
        self.writer_warp[index] = warps
        bad |= (self.writer[index] != threads) | (self.writer_warp[index] != warps)
        self.written[index] = IN_FLIGHT if in_flight else self.order.clock
        self.fenced[index] = False
        return int(bad.any(1).sum())

    def _after_write(self, index: Any, stamp: Any, warps: Any, threads: Any) -> Any:
        late = stamp > self.order.synced[warps, self.writer_warp[index]]
        return late & ((self.writer[index] != threads) | (stamp == IN_FLIGHT))

    def landed(self, offset: np.ndarray, size: int, data: np.ndarray) -> None:
        """A cp.async arrives: for its thread, from now on, it is an ordinary write."""
        self.order.clock += 1
        self.written[self.granules(offset, size)] = self.order.clock
        _scatter(self.bytes, offset, data)


@functools.lru_cache(maxsize=1 << 14)
def _conflicts(offsets: bytes, size: int, threads: bytes) -> int:
    """Cycles beyond the first of each phase: 32 lanes of 4 bytes, 16 of 8, or 8 of 16."""
    offset, thread = np.frombuffer(offsets, I64), np.frombuffer(threads, I64)
    phase = thread // min(WARP, 128 // max(size, 4))
    word = offset[:, None] // 4 + np.arange(max(size // 4, 1))
    word -= word.min()
    pairs = np.unique((phase[:, None] << 40) | word)
    banks = np.bincount((pairs >> 40) * 32 + (pairs & ((1 << 40) - 1)) % 32)
    banks = np.concatenate([banks, np.zeros(-banks.size % 32, banks.dtype)]).reshape(-1, 32)
    return int(np.maximum(banks.max(1) - 1, 0).sum())


# ---------------------------------------------------------------------------------------------
# Execution


class Cluster:
    """Blocks that run at once and reach one another's shared memory; in most launches it is one."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        places: list[tuple[int, int, int]],
        parameters: dict[Any, Any],
        memory: GlobalMemory,
        statistics: Statistics,
    ) -> None:
        self.order = Order(len(places) * -(-launch.block // WARP))
        self.blocks: list[Block] = []
        for place in places:
            self.blocks.append(Block(program, launch, place, parameters, memory, statistics, self))
        self.hopper: Any = None  # ptx_hopper's

    def run(self) -> None:
        while any(block.groups for block in self.blocks):
            for block in self.blocks:
                block.run()
        for block in self.blocks:
            block.end()


class Block:
    """One block of a launch."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        position: tuple[int, int, int],
        parameters: dict[Any, Any],
        memory: GlobalMemory,
        statistics: Statistics,
        cluster: Cluster,
    ) -> None:
        self.program, self.memory, self.statistics = program, memory, statistics
        self.parameters, self.position = parameters, position
        self.cluster, self.rank = cluster, len(cluster.blocks)
        self.threads = launch.block
        self.warps = -(-self.threads // WARP)
        self.everyone = np.arange(self.threads)
        self.registers = [np.zeros(self.threads, storage) for storage in program.registers]
        self.shared = SharedMemory(
            program.static_shared + launch.shared, program.granule, cluster.order,
            self.rank * self.warps,
        )  # fmt: skip
        lane = (self.everyone % WARP).astype(U32)
        self.special: dict[str, Any] = {
            "%tid.x": self.everyone.astype(U32),
            "%laneid": lane,
            "%warpid": (self.everyone // WARP).astype(U32),
            "%lanemask_eq": U32(1) << lane,
            "%lanemask_lt": (U32(1) << lane) - U32(1),
            "%lanemask_le": ((U64(2) << lane.astype(U64)) - U64(1)).astype(U32),
            "%ntid.x": U32(self.threads),
            "%cluster_ctarank": U32(self.rank),
        }
        self.special["%lanemask_ge"] = ~self.special["%lanemask_lt"]
        self.special["%lanemask_gt"] = ~self.special["%lanemask_le"]
        for axis, at, of in zip("xyz", position, launch.grid, strict=True):
            self.special[f"%ctaid.{axis}"] = U32(at)
            self.special[f"%nctaid.{axis}"] = U32(of)
        for axis in "yz":
            self.special[f"%tid.{axis}"] = U32(0)
            self.special[f"%ntid.{axis}"] = U32(1)
        # The threads that execute the current instruction: their numbers, and how to index by them.
        self.active = self.everyone
        self.lanes: Any = slice(None)
        self.next: dict[int, np.ndarray] | None = None  # set by branches
        self.groups: dict[int, np.ndarray] = {0: self.everyone}
        self.waiting: dict[int, list[tuple[np.ndarray, int, int, bool]]] = {}
        self.exited = 0
        self.committed = np.zeros(self.threads, I64)  # cp.async groups, per thread
        self.has_waited = np.full(self.threads, not program.overlaps)
        self.copies: list[Copy] = []
        self.parked: dict[
            Any, list[tuple[np.ndarray, Instruction]]
        ] = {}  # until someone wakes them
        self.unfinished: list[Any] = []  # of other asynchronous instructions
        self.hopper: Any = None  # ptx_hopper's

    def run(self) -> None:
        """Until all threads have ended or wait."""
        while self.groups:
            start = min(self.groups)
            self._run_group(start, self.groups.pop(start))

    def end(self) -> None:
        """Raise KernelError where threads or copies are left."""
        if self.parked:
            _, at = next(iter(self.parked.values()))[0]
            raise KernelError(f"block {self.position}: threads wait for ever at {at}")
        if self.waiting:
            held = {key: sum(w[0].size for w in waits) for key, waits in self.waiting.items()}
            raise KernelError(
                f"block {self.position}: threads wait at a barrier that others never reach: "
                f"{held} (barrier: threads) of {self.threads}, {self.exited} have exited"
            )
        for left in (*self.copies, *self.unfinished):
            raise KernelError(f"never waited for: {left.at}")

    def _run_group(self, pc: int, threads: np.ndarray) -> None:
        """From pc until the group splits, waits, ends, or reaches another group."""
        instructions = self.program.instructions
        limit = min(self.groups, default=len(instructions))
        whole: Any = slice(None) if threads.size == self.threads else threads
        count = 0
        while pc < limit:
            instruction = instructions[pc]
            count += 1
            self.active, self.lanes = threads, whole
            if instruction.guard is not None:
                taken = self.registers[instruction.guard.index][whole] != (
                    instruction.guard_is_negated
                )
                if not taken.all():
                    self.active = self.lanes = threads[taken]
            pc += 1
            if self.active.size == 0:
                continue
            self.next = None
            try:
                instruction.execute(self, instruction)
            except NotImplementedError as error:
                raise NotImplementedError(f"{error or instruction.opcode}: {instruction}") from None
            if self.next is not None:
                for target, group in self.next.items():
                    self.join(target, group)
                if self.active.size < threads.size:
                    self.join(pc, np.setdiff1d(threads, self.active, assume_unique=True))
                self.statistics.instructions += count
                return
        self.statistics.instructions += count
        if pc >= len(instructions):
            self.exited += threads.size
        else:
            self.join(pc, threads)

    def join(self, pc: int, threads: np.ndarray) -> None:
        if threads.size:
            others = self.groups.get(pc)
            self.groups[pc] = threads if others is None else np.sort(np.append(others, threads))

    # Operands

    def read(self, operand: Any, dtype: Any) -> Any:
        """The values of the active threads as dtype: an array, or a scalar where all have one."""
        if type(operand) is Register:
            value = self.registers[operand.index][self.lanes]
            if dtype is np.bool_ or operand.storage is dtype:
                return value
            size = np.dtype(dtype).itemsize
            if value.dtype.itemsize != size:
                value = value.astype(UNSIGNED[size])
            return value.view(dtype)
        if type(operand) is Constant:
            return operand.read(dtype)
        if type(operand) is Special:
            if (value := self.special.get(operand.name)) is None:
                raise NotImplementedError(f"special register {operand.name}")
            if isinstance(value, np.ndarray):
                value = value[self.lanes]
            return value.astype(UNSIGNED[np.dtype(dtype).itemsize]).view(dtype)
        if type(operand) is Not:
            return ~self.registers[operand.predicate.index][self.lanes]
        raise NotImplementedError(f"operand {operand}")

    def read_array(self, operand: Any, dtype: Any) -> np.ndarray:
        value = self.read(operand, dtype)
        if type(value) is np.ndarray:
            return value
        return np.full(self.active.size, value, dtype)

    def write(self, operand: Any, value: Any) -> None:
        if operand is SINK:
            return
        register = self.registers[operand.index]
        if operand.storage is not np.bool_:
            size = value.dtype.itemsize
            if value.dtype.kind == "f":
                value = value.view(UNSIGNED[size])
            if register.itemsize != size:
                value = value.astype(operand.storage)  # sign-extends signed values
            elif value.dtype.kind != "u":
                value = value.view(operand.storage)
        register[self.lanes] = value

    def address(self, operand: Address) -> np.ndarray:
        base = self.read_array(operand.base, U64)
        return base + U64(operand.offset % 2**64) if operand.offset else base

    def warp(self) -> np.ndarray:
        return self.active >> 5

    def whole_warps(self, at: Instruction) -> int:
        """The number of warps at a warp-wide instruction, which all their threads must execute."""
        count = self.active.size
        if (
            count % WARP
            or (self.active[::WARP] % WARP).any()
            or (count != self.threads and (np.diff(self.active.reshape(-1, WARP)) != 1).any())
        ):
            raise KernelError(f"only some threads of a warp execute {at}")
        return count // WARP

    # Memory

    def space(self, words: tuple[str, ...], address: np.ndarray) -> tuple[str, np.ndarray]:
        """shared or global; generic addresses say it themselves."""
        for word in words[1:]:
            if word.startswith("shared"):
                return "shared", address
            if word in ("global", "const"):
                return "global", address
        if "local" in words:
            raise KernelError("the kernel uses local memory")
        shared = address >= U64(SHARED_WINDOW)
        if shared.all():
            return "shared", address - U64(SHARED_WINDOW)
        if shared.any():
            raise NotImplementedError("generic addresses of both spaces in one instruction")
        return "global", address

    def shared_offset(self, address: np.ndarray, size: int, at: Instruction) -> np.ndarray:
        if address.size and int(address.max()) + size > self.shared.size:
            raise KernelError(
                f"{size} bytes at {int(address.max())} of {self.shared.size} bytes of shared "
                f"memory at {at}"
            )
        return np.ascontiguousarray(address).view(I64)

    def aligned(self, address: np.ndarray, size: int, at: Instruction) -> None:
        if (address & U64(size - 1)).any():
            raise KernelError(f"an address is no multiple of {size} at {at}")

    def raced(self, races: int, at: Instruction) -> None:
        if races:
            self.statistics.races += races
            self.statistics.race_at.add(str(at))

    def conflicts(self, offset: np.ndarray, size: int) -> int:
        start = int(offset[0]) & ~3
        return _conflicts((offset - start).tobytes(), size, self.active.tobytes())

    def load(self, words: tuple[str, ...], address: Any, size: int, at: Instruction) -> np.ndarray:
        self.aligned(address, size, at)
        space, address = self.space(words, address)
        if space == "global":
            self.touches(address, at)
            return self.memory.load(address, size, at)
        offset = self.shared_offset(address, size, at)
        races, uninitialised = self.shared.note_read(offset, size, self.active, self.warp())
        self.raced(races, at)
        self.statistics.uninitialised += uninitialised
        self.statistics.other_conflicts += self.conflicts(offset, size)
        return _gather(self.shared.bytes, offset, size)

    def touches(self, address: np.ndarray, at: Instruction) -> None:
        """Raises KernelError for global memory that the kernel before this one may still write."""
        if self.has_waited[self.active].all():
            return
        inside = np.zeros(address.size, np.bool_)
        for extent in self.memory.early:
            inside |= extent.holds(address, 1)
        if not inside.all():
            raise KernelError(f"memory is touched before griddepcontrol.wait at {at}")

    def store(self, words: tuple[str, ...], address: Any, data: np.ndarray, at: Any) -> None:
        size = data.shape[1]
        self.aligned(address, size, at)
        space, address = self.space(words, address)
        if space == "global":
            self.touches(address, at)
            self.memory.store(address, data, at)
            return
        offset = self.shared_offset(address, size, at)
        self.raced(self.shared.note_write(offset, size, self.active, self.warp()), at)
        self.statistics.other_conflicts += self.conflicts(offset, size)
        _scatter(self.shared.bytes, offset, data)


@dataclass
class Copy:
    """A cp.async under way: of these threads, each in its group."""

    group: np.ndarray
    target: np.ndarray
    data: np.ndarray
    at: Instruction


HANDLERS: dict[str, Callable[[Block, Instruction], None]] = {}
Handler = Callable[[Block, Instruction], None]


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the function that executes instructions of these names."""

    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def _unknown(block: Block, at: Instruction) -> None:
    raise NotImplementedError(at.opcode)


# Floats. bf16 is a float32 whose lower half is zero; f16 and bf16 arithmetic rounds once.


def flush(x: Any) -> Any:
    """float32 with subnormal numbers made zeros of the same sign (.ftz)."""
    bits = x.view(U32)
    small = (bits & U32(0x7FFFFFFF)) - U32(1) < U32(0x7FFFFF)
    if small.any():
        return np.where(small, bits & U32(0x80000000), bits).view(F32)
    return x


def from_bf16(bits: Any) -> Any:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: Any) -> Any:
    """Round to nearest even; every NaN becomes the canonical one."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def fma64(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of narrower floats, as float64 rounded to odd: to round it once more is exact."""
    product, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(U64) & U64(1)) == 0
    nudged = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(even & (error != 0) & np.isfinite(total), nudged, total)


def fma32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once. float64 is wide enough but for sums that it rounds to a tie."""
    total = a.astype(F64) * b.astype(F64) + c.astype(F64)
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    return (fma64(a, b, c) if tie.any() else total).astype(F32)


class Half:
    """A pair of packed values of f16x2 or bf16x2, or one of f16 or bf16, as float32."""

    def __init__(self, kind: str) -> None:
        self.pair = kind.endswith("x2")
        self.brain = kind.startswith("bf")

    def read(self, block: Block, operand: Any) -> np.ndarray:
        """float32 [threads, values]."""
        bits = block.read_array(operand, U32 if self.pair else U16)
        bits = np.ascontiguousarray(bits).view(U16).reshape(-1, 2 if self.pair else 1)
        return from_bf16(bits) if self.brain else bits.view(F16).astype(F32)

    def bits(self, x: np.ndarray) -> np.ndarray:
        """Of float32 or float64 [threads, values]; float64 must be exact or rounded once."""
        x32 = _odd(x) if x.dtype == F64 and self.brain else x
        half = np.ascontiguousarray(to_bf16(x32) if self.brain else x.astype(F16).view(U16))
        return half.view(U32)[:, 0] if self.pair else half[:, 0]


def _odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded to odd: a second rounding then is as good as a single one."""
    near = x.astype(F32)
    toward = np.where(np.abs(near.astype(F64)) > np.abs(x), np.nextafter(near, F32(0)), near)
    inexact = (toward.astype(F64) != x) & np.isfinite(x)
    return np.where(inexact, toward.view(U32) | U32(1), toward.view(U32)).view(F32)


HALVES = {name: Half(name) for name in ("f16", "bf16", "f16x2", "bf16x2")}


def _floats(block: Block, at: Instruction, operands: list[Any]) -> list[Any]:
    dtype = at.type
    values = [block.read(operand, dtype) for operand in operands]
    return [flush(v) for v in values] if "ftz" in at.words and dtype is F32 else values


def _write_float(block: Block, at: Instruction, value: Any) -> None:
    if at.type is F32:
        if "ftz" in at.words:
            value = flush(value)
        if "sat" in at.words:
            value = np.where(np.isnan(value), F32(0), np.clip(value, F32(0), F32(1)))
    block.write(at.operands[0], value)


def _nearest_only(at: Instruction) -> None:
    if {"rz", "rm", "rp"} & set(at.words):
        raise NotImplementedError(at.opcode)


@handles("add", "sub", "mul", "fma", "mad")
def _arithmetic(block: Block, at: Instruction) -> None:
    name, kind = at.words[0], at.words[-1]
    if kind in HALVES:
        half = HALVES[kind]
        values = [half.read(block, o).astype(F64) for o in at.operands[1:]]
        result = fma64(*values) if len(values) == 3 else _combine(name, *values)
        if "sat" in at.words:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
        if "relu" in at.words:
            result = np.maximum(result, 0)
        block.write(at.operands[0], half.bits(result))
        return
    dtype = TYPES[kind]
    if dtype is F32 or dtype is F64:
        _nearest_only(at)
        values = _floats(block, at, at.operands[1:])
        if dtype is F32 and len(values) == 3:
            result = fma32(*values)
        elif dtype is F64 and len(values) == 3:
            raise NotImplementedError(at.opcode)
        else:
            result = _combine(name, *values)
        _write_float(block, at, result)
        return
    if "cc" in at.words or "sat" in at.words:
        raise NotImplementedError(at.opcode)
    a, b = block.read(at.operands[1], dtype), block.read(at.operands[2], dtype)
    if name in ("add", "sub"):
        block.write(at.operands[0], _combine(name, a, b))
        return
    result = _product(at, dtype, a, b)
    if name == "mad":
        result = result + block.read(at.operands[3], result.dtype.type)
    block.write(at.operands[0], result)


def _combine(name: str, a: Any, b: Any) -> Any:
    if name == "mul":
        return a * b
    return a + b if name == "add" else a - b


def _product(at: Instruction, dtype: Any, a: Any, b: Any) -> Any:
    size = np.dtype(dtype).itemsize
    if "lo" in at.words:
        return a * b
    if size == 8:
        return _high_product(dtype, a, b)
    wide = {U16: U32, I16: I32, U32: U64, I32: I64}[dtype]
    product = a.astype(wide) * b.astype(wide)
    return product if "wide" in at.words else (product >> wide(8 * size)).astype(dtype)


def _high_product(dtype: Any, a: Any, b: Any) -> Any:
    """The upper half of the 128 bits."""
    x, y = a.view(U64), b.view(U64)
    low, half = U64(0xFFFFFFFF), U64(32)
    cross = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if dtype is I64:
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(dtype)


@handles("div", "rem")
def _divide(block: Block, at: Instruction) -> None:
    dtype = at.type
    if dtype is F32 or dtype is F64:
        _nearest_only(at)
        a, b = _floats(block, at, at.operands[1:])
        _write_float(block, at, a / b)
        return
    a, b = block.read_array(at.operands[1], dtype), block.read_array(at.operands[2], dtype)
    zero = b == 0
    unsigned = UNSIGNED[np.dtype(dtype).itemsize]
    x = np.where(a < 0, -a, a).view(unsigned)  # the least integer is its own magnitude
    y = np.where(zero, 1, np.where(b < 0, -b, b)).astype(dtype).view(unsigned)
    if at.words[0] == "div":
        result = (x // y).view(dtype)
        result = np.where((a < 0) != (b < 0), -result, result)
        result = np.where(zero, dtype(0) - dtype(1), result)
    else:
        result = (x % y).view(dtype)
        result = np.where(zero, a, np.where(a < 0, -result, result))
    block.write(at.operands[0], result.astype(dtype))


@handles("min", "max")
def _min_max(block: Block, at: Instruction) -> None:
    kind = at.words[-1]
    if "xorsign" in at.words or (kind not in HALVES and kind.endswith("x2")):
        raise NotImplementedError(at.opcode)
    if kind in HALVES:
        values: list[Any] = [HALVES[kind].read(block, o) for o in at.operands[1:]]
    elif at.type in (F32, F64):
        values = _floats(block, at, at.operands[1:])
    else:
        values = [block.read(o, at.type) for o in at.operands[1:]]
    name = at.words[0]
    result = values[0]
    for value in values[1:]:
        result = _extreme(name, "NaN" in at.words, result, value)
    if kind in HALVES:
        block.write(at.operands[0], HALVES[kind].bits(result))
    else:
        block.write(at.operands[0], result)


def _extreme(name: str, keep_nan: bool, a: Any, b: Any) -> Any:
    """PTX's: of numbers unless NaN is asked for; +0 is greater than -0."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if name == "max" else np.minimum(a, b)
    if keep_nan:
        result = np.maximum(a, b) if name == "max" else np.minimum(a, b)
    else:
        result = np.fmax(a, b) if name == "max" else np.fmin(a, b)
    if (zeros := (a == 0) & (b == 0)).any():
        negative = np.signbit(a) & np.signbit(b) if name == "max" else np.signbit(a) | np.signbit(b)
        result = np.where(zeros, np.where(negative, -0.0, 0.0).astype(result.dtype), result)
    return result


@handles("abs", "neg")
def _sign(block: Block, at: Instruction) -> None:
    kind = at.words[-1]
    absolute = at.words[0] == "abs"
    if kind in HALVES:
        bits = block.read(at.operands[1], at.type if at.type is not F16 else U16)
        mask = bits.dtype.type(0x80008000 if HALVES[kind].pair else 0x8000)
        block.write(at.operands[0], bits & ~mask if absolute else bits ^ mask)
    elif at.type in (F32, F64):
        (x,) = _floats(block, at, at.operands[1:])
        block.write(at.operands[0], np.abs(x) if absolute else -x)
    else:
        x = block.read(at.operands[1], at.type)
        block.write(at.operands[0], np.abs(x) if absolute else at.type(0) - x)


@handles("sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh")
def _function(block: Block, at: Instruction) -> None:
    if at.type is not F32:
        raise NotImplementedError(at.opcode)
    _nearest_only(at)
    (x,) = _floats(block, at, at.operands[1:])
    wide = x.astype(F64)
    result = {
        "sqrt": lambda: np.sqrt(wide),
        "rsqrt": lambda: 1 / np.sqrt(wide),
        "rcp": lambda: 1 / wide,
        "ex2": lambda: np.exp2(wide),
        "lg2": lambda: np.log2(wide),
        "tanh": lambda: np.tanh(wide),
    }[at.words[0]]()
    _write_float(block, at, result.astype(F32))


@handles("copysign")
def _copysign(block: Block, at: Instruction) -> None:
    sign, value = (block.read(o, F32) for o in at.operands[1:])
    block.write(at.operands[0], np.copysign(value, sign))


# Integers and bits


@handles("and", "or", "xor", "not", "cnot")
def _logic(block: Block, at: Instruction) -> None:
    values = [block.read(o, at.type) for o in at.operands[1:]]
    name = at.words[0]
    if name == "not":
        result = ~values[0]
    elif name == "cnot":
        result = (values[0] == 0).astype(at.type)
    else:
        function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
        result = function(*values)
    block.write(at.operands[0], result)


@handles("shl", "shr")
def _shift(block: Block, at: Instruction) -> None:
    dtype = at.type
    bits = 8 * np.dtype(dtype).itemsize
    x, amount = block.read(at.operands[1], dtype), block.read(at.operands[2], U32)
    few = np.minimum(amount, U32(bits - 1)).astype(dtype)
    if at.words[0] == "shl":
        result = np.where(amount >= bits, dtype(0), x << few)
    elif np.dtype(dtype).kind == "i":
        result = x >> few  # all are the sign from bits - 1 on
    else:
        result = np.where(amount >= bits, dtype(0), x >> few)
    block.write(at.operands[0], result)


@handles("shf")
def _funnel_shift(block: Block, at: Instruction) -> None:
    low, high, amount = (block.read(o, U32).astype(U64) for o in at.operands[1:])
    amount = amount & U64(31) if "wrap" in at.words else np.minimum(amount, U64(32))
    both = (high << U64(32)) | low
    result = (both << amount) >> U64(32) if at.words[1] == "l" else both >> amount
    if at.words[1] == "l":  # at 32 the upper word has left
        result = np.where(amount == 32, low, result)
    block.write(at.operands[0], (result & U64(0xFFFFFFFF)).astype(U32))


@handles("bfe")
def _extract(block: Block, at: Instruction) -> None:
    """Bit i is bit start + i of x where i < length, and the field's sign (or 0) elsewhere."""
    unsigned = UNSIGNED[np.dtype(at.type).itemsize]
    top = 8 * np.dtype(at.type).itemsize - 1
    x = block.read_array(at.operands[1], unsigned)[:, None]
    start = (block.read_array(at.operands[2], U32) & U32(255)).astype(I64)[:, None]
    length = (block.read_array(at.operands[3], U32) & U32(255)).astype(I64)[:, None]
    bit = np.arange(top + 1)
    source = start + bit
    sign = _bit(x, np.clip(start + length - 1, 0, top)) * (length > 0)
    fill = sign if np.dtype(at.type).kind == "i" else 0 * sign
    bits = np.where((bit < length) & (source <= top), _bit(x, np.minimum(source, top)), fill)
    block.write(at.operands[0], _assemble(bits, unsigned))


@handles("bfi")
def _insert(block: Block, at: Instruction) -> None:
    """The lowest length bits of new in place of old's from start on."""
    unsigned = UNSIGNED[np.dtype(at.type).itemsize]
    top = 8 * np.dtype(at.type).itemsize - 1
    new, old = (block.read_array(o, unsigned)[:, None] for o in at.operands[1:3])
    start = (block.read_array(at.operands[3], U32) & U32(255)).astype(I64)[:, None]
    length = (block.read_array(at.operands[4], U32) & U32(255)).astype(I64)[:, None]
    bit = np.arange(top + 1)
    source = bit - start
    inside = (source >= 0) & (source < length)
    bits = np.where(inside, _bit(new, np.clip(source, 0, top)), _bit(old, bit))
    block.write(at.operands[0], _assemble(bits, unsigned))


def _bit(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return x >> index.astype(x.dtype) & x.dtype.type(1)


def _assemble(bits: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers of their bits, lowest first."""
    return (bits.astype(dtype) << np.arange(bits.shape[1], dtype=dtype)).sum(1, dtype=dtype)


@handles("lop3")
def _logic3(block: Block, at: Instruction) -> None:
    a, b, c = (block.read_array(o, U32) for o in at.operands[1:4])
    table = int(at.operands[4].read(U32))
    result = np.zeros(a.size, U32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    block.write(at.operands[0], result)


@handles("prmt")
def _permute(block: Block, at: Instruction) -> None:
    if at.words[-1] != "b32":
        raise NotImplementedError(at.opcode)
    a, b, selector = (block.read_array(o, U32) for o in at.operands[1:])
    source = np.ascontiguousarray(np.stack([a, b], 1)).view(U8)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=U32)) & U32(15)
    chosen = np.take_along_axis(source, (nibbles & U32(7)).astype(I64), 1)
    signs = np.where(chosen >> 7, U8(0xFF), U8(0))
    result = np.where(nibbles & U32(8), signs, chosen).astype(U8)
    block.write(at.operands[0], result.view(U32)[:, 0])


@handles("popc", "clz", "brev", "bfind")
def _count(block: Block, at: Instruction) -> None:
    size = np.dtype(at.type).itemsize
    x = np.ascontiguousarray(block.read_array(at.operands[1], UNSIGNED[size]))
    bits = np.unpackbits(x.view(U8).reshape(-1, size)[:, ::-1], axis=1)  # highest first
    leading = np.where(bits.any(1), bits.argmax(1), 8 * size)
    name = at.words[0]
    if name == "popc":
        block.write(at.operands[0], bits.sum(1, dtype=U32))
    elif name == "clz":
        block.write(at.operands[0], leading.astype(U32))
    elif name == "brev":
        flipped = np.packbits(bits[:, ::-1], axis=1)[:, ::-1]
        block.write(at.operands[0], np.ascontiguousarray(flipped).view(UNSIGNED[size])[:, 0])
    else:
        raise NotImplementedError(at.opcode)


# Comparisons and moves

_ORDERED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
            "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
            "hi": np.greater, "hs": np.greater_equal}  # fmt: skip


def compare(name: str, a: Any, b: Any) -> Any:
    """PTX's comparisons: of floats, eq .. ge are false for NaN and equ .. geu are true."""
    if a.dtype.kind != "f":
        return _ORDERED[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return ~unordered if name == "num" else unordered
    if name.endswith("u"):
        return _ORDERED[name[:-1]](a, b) | unordered
    return _ORDERED[name](a, b) & ~unordered


@handles("setp")
def _set_predicate(block: Block, at: Instruction) -> None:
    kind = at.words[-1]
    combine = next((w for w in at.words[2:-1] if w in ("and", "or", "xor")), None)
    target = at.operands[0]
    if kind in HALVES:
        a, b = (HALVES[kind].read(block, o) for o in at.operands[1:3])
        result = compare(at.words[1], a, b)
        if HALVES[kind].pair:
            if combine:
                raise NotImplementedError(at.opcode)
            for item, column in zip(target.items, result.T, strict=True):
                block.write(item, column)
            return
        result = result[:, 0]
    else:
        a, b = _floats(block, at, at.operands[1:3])
        result = compare(at.words[1], a, b)
    inverse = ~result
    if combine:
        function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
        other = block.read(at.operands[3], np.bool_)
        result, inverse = function(result, other), function(inverse, other)
    if isinstance(target, Vector):
        block.write(target.items[0], result)
        block.write(target.items[1], inverse)
    else:
        block.write(target, result)


@handles("selp")
def _select(block: Block, at: Instruction) -> None:
    dtype = U16 if at.type is F16 else at.type
    a, b = block.read(at.operands[1], dtype), block.read(at.operands[2], dtype)
    block.write(at.operands[0], np.where(block.read(at.operands[3], np.bool_), a, b))


@handles("slct")
def _select_by_sign(block: Block, at: Instruction) -> None:
    dtype = TYPES[at.words[-2]]
    a, b = block.read(at.operands[1], dtype), block.read(at.operands[2], dtype)
    block.write(at.operands[0], np.where(block.read(at.operands[3], at.type) >= 0, a, b))


@handles("mov")
def _move(block: Block, at: Instruction) -> None:
    target, source = at.operands
    dtype = U16 if at.type is F16 else at.type
    if isinstance(source, Vector):
        part = UNSIGNED[np.dtype(dtype).itemsize // len(source.items)]
        parts = [block.read_array(item, part) for item in source.items]
        value = np.ascontiguousarray(np.stack(parts, 1)).view(dtype)[:, 0]
    else:
        value = block.read(source, dtype)
    if isinstance(target, Vector):
        part = UNSIGNED[np.dtype(dtype).itemsize // len(target.items)]
        value = np.ascontiguousarray(np.broadcast_to(value, block.active.size))
        columns = value.view(part).reshape(-1, len(target.items)).T.copy()
        for item, column in zip(target.items, columns, strict=True):
            block.write(item, column)
    else:
        block.write(target, value)


@handles("cvta")
def _convert_address(block: Block, at: Instruction) -> None:
    value = block.read(at.operands[1], U64)
    if any(w.startswith("shared") for w in at.words):
        window = U64(SHARED_WINDOW)
        value = value - window if "to" in at.words else value + window
    block.write(at.operands[0], value)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@handles("cvt")
def _convert(block: Block, at: Instruction) -> None:
    words = set(at.words[1:-2])
    to, of = at.words[-2:]
    if to in HALVES and HALVES[to].pair and of == "f32":
        high, low = (block.read_array(o, F32) for o in at.operands[1:])
        value = np.stack([low, high], 1)
        if "relu" in words:
            value = np.where(value > 0, value, F32(0))
        if "rz" in words:
            value = _toward_zero(value, to)
        elif "rn" not in words:
            raise NotImplementedError(at.opcode)
        block.write(at.operands[0], HALVES[to].bits(value))
        return
    if to not in TYPES or of not in TYPES or len(at.operands) != 2 or "pack" in words:
        raise NotImplementedError(at.opcode)
    if of == "bf16":
        x: Any = from_bf16(block.read(at.operands[1], U16))
    else:
        x = block.read(at.operands[1], TYPES[of])
        if "ftz" in words and of == "f32":
            x = flush(x)
    for name, function in _ROUND.items():
        if name in words:
            x = function(x)
    if to in ("f16", "bf16", "f32", "f64"):
        block.write(at.operands[0], _to_float(x, to, of, words, at))
    else:
        block.write(at.operands[0], _to_integer(x, TYPES[to], words))


def _to_float(x: Any, to: str, of: str, words: set[str], at: Instruction) -> Any:
    directed = {"rz", "rm", "rp"} & words
    if directed - {"rz"} or (directed and (to not in ("f16", "bf16") or of != "f32")):
        raise NotImplementedError(at.opcode)
    if "relu" in words:
        x = np.where(x > 0, x, x.dtype.type(0))
    if "sat" in words:
        x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)
    if directed:
        x = _toward_zero(x, to)
    if to == "bf16":
        if x.dtype.kind != "f":
            x = x.astype(F64)
        return to_bf16(_odd(np.asarray(x)) if x.dtype == F64 else x.astype(F32))
    if to == "f16" and x.dtype.kind != "f":
        x = x.astype(F64)
    result = x.astype(TYPES[to])
    return flush(result) if to == "f32" and "ftz" in words else result


def _toward_zero(x: Any, to: str) -> Any:
    """float32 cut to the precision of f16 or bf16."""
    if HALVES[to].brain:
        return np.where(np.isnan(x), x, (x.view(U32) & U32(0xFFFF0000)).view(F32))
    near = x.astype(F16)
    beyond = np.abs(near.astype(F32)) > np.abs(x)
    return np.where(beyond, np.nextafter(near, F16(0)), near).astype(F32)


def _to_integer(x: Any, dtype: Any, words: set[str]) -> Any:
    limits = np.iinfo(dtype)
    if x.dtype.kind == "f":
        wide = np.asarray(x).astype(F64)
        top = float(limits.max)
        above, below = wide >= top, wide <= float(limits.min)
        inside = np.where(above | below | np.isnan(wide), 0.0, wide).astype(dtype)
        result = np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), inside))
        if limits.bits == 64 and np.isnan(wide).any():
            return np.where(np.isnan(wide), U64(1 << 63).view(dtype), result).astype(dtype)
        return result.astype(dtype)
    if "sat" in words:
        source = np.iinfo(x.dtype)
        low, high = max(limits.min, source.min), min(limits.max, source.max)
        x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
    return x.astype(dtype)


# Memory


@handles("ld", "ldu")
def _load(block: Block, at: Instruction) -> None:
    dtype = U16 if at.type is F16 else at.type
    item = np.dtype(dtype).itemsize
    targets = at.operands[0].items if isinstance(at.operands[0], Vector) else (at.operands[0],)
    size = item * len(targets)
    address = at.operands[1]
    if "param" in at.words:
        start = address.offset
        data = block.parameters[address.base][start : start + size]
        for target, value in zip(targets, np.frombuffer(data, dtype), strict=True):
            block.write(target, value)
        return
    raw = block.load(at.words, block.address(address), size, at)
    values = raw.view(dtype)
    for i, target in enumerate(targets):
        block.write(target, values[:, i])


@handles("st")
def _store(block: Block, at: Instruction) -> None:
    dtype = U16 if at.type is F16 else at.type
    sources = at.operands[1].items if isinstance(at.operands[1], Vector) else (at.operands[1],)
    data = np.empty((block.active.size, len(sources)), dtype)
    for i, source in enumerate(sources):
        data[:, i] = block.read(source, dtype)
    block.store(at.words, block.address(at.operands[0]), data.view(U8), at)


@handles("atom", "red")
def _atomic(block: Block, at: Instruction) -> None:
    operation = next((w for w in at.words if w in _ATOMIC), None)
    if operation is None or at.words[-1] in HALVES:
        raise NotImplementedError(at.opcode)
    returns = at.words[0] == "atom"
    place, *sources = at.operands[1:] if returns else at.operands
    dtype = at.type
    size = np.dtype(dtype).itemsize
    address = block.address(place)
    block.aligned(address, size, at)
    space, address = block.space(at.words, address)
    values = [block.read_array(source, dtype) for source in sources]
    before = np.empty(block.active.size, dtype)
    for i in range(block.active.size):
        one = address[i : i + 1]
        if space == "shared":
            offset = block.shared_offset(one, size, at)
            old = _gather(block.shared.bytes, offset, size).view(dtype)[0]
        else:
            old = block.memory.load(one, size, at).view(dtype)[0]
        before[i] = old[0]
        new = np.asarray(_ATOMIC[operation](old, *(v[i] for v in values))).astype(dtype)
        if space == "shared":
            _scatter(block.shared.bytes, offset, new.reshape(1, 1).view(U8))
            index = block.shared.granules(offset, size)  # atomics do not race with one another
            block.shared.written[index] = np.maximum(block.shared.written[index], 0)
        else:
            block.memory.store(one, new.reshape(1, 1).view(U8), at)
    if returns:
        block.write(at.operands[0], before)


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: np.minimum(old, x),
    "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, expected, x: np.where(old == expected, x, old),
}


@handles("cp")
def _copy_async(block: Block, at: Instruction) -> None:
    if at.words[1] != "async" or "bulk" in at.words or "mbarrier" in at.words:
        raise NotImplementedError(at.opcode)
    if at.words[2] == "commit_group":
        block.committed[block.lanes] += 1
        return
    if at.words[2] == "wait_group":
        _wait(block, block.committed - int(at.operands[0].read(U32)))
        return
    if at.words[2] == "wait_all":
        _wait(block, np.full(block.threads, IN_FLIGHT, I64))
        return
    size = int(at.operands[2].read(U32))
    target, source = block.address(at.operands[0]), block.address(at.operands[1])
    block.aligned(target, size, at)
    offset = block.shared_offset(target, size, at)
    count = np.full(block.active.size, size)
    if len(at.operands) > 3:
        last = at.operands[3]
        if isinstance(last, Not) or (isinstance(last, Register) and last.storage is np.bool_):
            count = np.where(block.read(last, np.bool_), 0, size)
        else:
            count = block.read_array(last, U32).astype(I64)
            if (count > size).any():
                raise KernelError(f"a source size above {size} at {at}")
    data = np.zeros((block.active.size, size), U8)
    for length in np.unique(count[count > 0]).tolist():
        lanes = count == length
        block.aligned(source[lanes], size, at)
        block.touches(source[lanes], at)
        data[lanes, :length] = _load_any(block, source[lanes], length, at)
    warp = block.active >> 5
    block.raced(block.shared.note_write(offset, size, block.active, warp, in_flight=True), at)
    block.statistics.other_conflicts += block.conflicts(offset, size)
    group = np.full(block.threads, -1, I64)
    group[block.active] = block.committed[block.active]
    full_offset = np.zeros(block.threads, I64)
    full_offset[block.active] = offset
    full_data = np.zeros((block.threads, size), U8)
    full_data[block.active] = data
    block.copies.append(Copy(group, full_offset, full_data, at))


def _load_any(block: Block, address: np.ndarray, length: int, at: Instruction) -> np.ndarray:
    """Global bytes of a length that need not be a power of two."""
    if length in (4, 8, 16):
        return block.memory.load(address, length, at)
    return np.concatenate(
        [block.memory.load(address + U64(i), 1, at) for i in range(length)], axis=1
    )


def _wait(block: Block, before: np.ndarray) -> None:
    """Let the copies of the active threads arrive whose group is below before[thread]."""
    waits = np.zeros(block.threads, np.bool_)
    waits[block.active] = True
    for copy in block.copies:
        done = waits & (copy.group >= 0) & (copy.group < before)
        if done.any():
            block.shared.landed(copy.target[done], copy.data.shape[1], copy.data[done])
            copy.group[done] = -1
    block.copies = [copy for copy in block.copies if (copy.group >= 0).any()]


# Control


@handles("bra")
def _branch(block: Block, at: Instruction) -> None:
    block.next = {at.operands[0].target: block.active}


@handles("brx")
def _branch_indexed(block: Block, at: Instruction) -> None:
    index = block.read_array(at.operands[0], U32)
    labels = block.program.tables_of_labels[at.operands[1].name]
    block.next = {}
    for i in np.unique(index).tolist():
        if i >= len(labels):
            raise KernelError(f"index {i} of {len(labels)} branch targets at {at}")
        target = labels[i].target
        group = block.active[index == i]
        if target in block.next:
            group = np.sort(np.append(block.next[target], group))
        block.next[target] = group


@handles("ret", "exit")
def _return(block: Block, at: Instruction) -> None:
    block.exited += block.active.size
    block.next = {}


@handles("trap")
def _trap(block: Block, at: Instruction) -> None:
    raise KernelError(f"trap: {at}")


@handles("griddepcontrol")
def _wait_for_previous(block: Block, at: Instruction) -> None:
    if at.words[1] == "wait":
        block.has_waited[block.active] = True


@handles("nanosleep", "prefetch", "discard", "applypriority")
def _nothing(block: Block, at: Instruction) -> None:
    pass


@handles("bar", "barrier")
def _barrier(block: Block, at: Instruction) -> None:
    words = at.words
    if words[1] == "warp":  # bar.warp.sync
        _warp_mask(block, at.operands[0], at)
        for warp in np.unique(block.warp()):
            block.shared.barrier(np.array([warp]))
        return
    if "red" in words or "cluster" in words:
        raise NotImplementedError(at.opcode)
    arrives_only = "arrive" in words
    if words[0] == "bar" or "aligned" in words:
        _whole_or_last_warp(block, at)
    numbers, together = block.read_array(at.operands[0], U32), block.active
    number = int(numbers[0])
    if (numbers != number).any():  # the others come here again
        block.active = block.lanes = together[numbers == number]
    _arrive_at_barrier(block, at, number, arrives_only)
    if block.active is not together:
        assert block.next is not None
        block.next[at.index] = together[numbers != number]
        block.active = together


def _arrive_at_barrier(block: Block, at: Instruction, number: int, arrives_only: bool) -> None:
    count = block.threads
    if len(at.operands) > 1:
        count = int(np.asarray(block.read(at.operands[1], U32)).flat[0])
    elif block.exited:
        raise KernelError(f"{block.exited} threads have exited before a barrier of all at {at}")
    pc = at.index + 1
    waits = block.waiting.setdefault(number, [])
    waits.append((block.active, pc, count, arrives_only))
    block.next = {pc: block.active} if arrives_only else {}
    arrived = sum(wait[0].size for wait in waits)
    if any(wait[2] != count for wait in waits) or arrived > count:
        raise KernelError(f"barrier {number} with different or wrong numbers of threads at {at}")
    if arrived == count:
        everyone = np.concatenate([wait[0] for wait in waits])
        block.shared.barrier(np.unique(everyone >> 5))
        del block.waiting[number]
        for threads, target, _, arrived_only in waits:
            if not arrived_only:
                if target in block.next:
                    block.next[target] = np.sort(np.append(block.next[target], threads))
                else:
                    block.next[target] = threads


def _whole_or_last_warp(block: Block, at: Instruction) -> None:
    warps, counts = np.unique(block.warp(), return_counts=True)
    full = np.minimum(block.threads - warps * WARP, WARP)
    if (counts != full).any():
        raise KernelError(f"only some threads of a warp reach the barrier at {at}")


def _warp_mask(block: Block, operand: Any, at: Instruction) -> None:
    """All threads that the mask names must be there, and those there must be named."""
    mask = block.read_array(operand, U32)
    lane = (block.active % WARP).astype(U32)
    present = np.zeros(block.warps, U32)
    np.bitwise_or.at(present, block.warp(), U32(1) << lane)
    width = np.minimum(block.threads - block.warp() * WARP, WARP).astype(U64)
    exists = ((U64(1) << width) - U64(1)).astype(U32)
    if (present[block.warp()] != mask & exists).any():
        raise KernelError(f"the threads of a warp's mask are not those that execute {at}")


# Warps


@handles("shfl")
def _shuffle(block: Block, at: Instruction) -> None:
    if at.words[1] != "sync":
        raise NotImplementedError(at.opcode)
    mode = at.words[2]
    target, source, b, c, mask = at.operands
    _warp_mask(block, mask, at)
    lane = block.active % WARP
    amount = block.read_array(b, U32).astype(I64) & 31
    packed = block.read_array(c, U32).astype(I64)
    clamp, segment = packed & 31, packed >> 8 & 31
    highest = (lane & segment) | (clamp & ~segment)
    lowest = lane & segment
    if mode == "up":
        wanted = lane - amount
        inside = wanted >= highest
    elif mode == "down":
        wanted = lane + amount
        inside = wanted <= highest
    elif mode == "bfly":
        wanted = lane ^ amount
        inside = wanted <= highest
    else:
        wanted = lowest | (amount & ~segment)
        inside = wanted <= highest
    wanted = np.where(inside, wanted, lane)
    values = np.zeros(block.warps * WARP, U32)
    present = np.zeros(block.warps * WARP, np.bool_)
    values[block.active] = block.read(source, U32)
    present[block.active] = True
    index = (block.active & ~31) | wanted
    if not present[index].all():
        raise KernelError(f"a value of a thread that does not take part at {at}")
    if isinstance(target, Vector):
        block.write(target.items[0], values[index])
        block.write(target.items[1], inside)
    else:
        block.write(target, values[index])


@handles("vote", "activemask")
def _vote(block: Block, at: Instruction) -> None:
    lane = (block.active % WARP).astype(U32)
    warp = block.warp()
    chosen = np.ones(block.active.size, np.bool_)
    if at.words[0] == "vote":
        _warp_mask(block, at.operands[2], at)
        chosen = np.broadcast_to(block.read(at.operands[1], np.bool_), block.active.size)
    ballot = np.zeros(block.warps, U32)
    np.bitwise_or.at(ballot, warp, np.where(chosen, U32(1) << lane, U32(0)))
    present = np.zeros(block.warps, U32)
    np.bitwise_or.at(present, warp, U32(1) << lane)
    if at.words[0] == "activemask" or at.words[2] == "ballot":
        block.write(at.operands[0], ballot[warp])
    elif at.words[2] == "any":
        block.write(at.operands[0], (ballot != 0)[warp])
    elif at.words[2] == "all":
        block.write(at.operands[0], (ballot == present)[warp])
    else:
        block.write(at.operands[0], ((ballot == present) | (ballot == 0))[warp])


@handles("redux")
def _reduce(block: Block, at: Instruction) -> None:
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                "or": np.bitwise_or, "xor": np.bitwise_xor}.get(at.words[2])  # fmt: skip
    if function is None or at.type is F32:
        raise NotImplementedError(at.opcode)
    _warp_mask(block, at.operands[2], at)
    values, warp = block.read_array(at.operands[1], at.type), block.warp()
    result = np.empty(values.size, at.type)
    for w in np.unique(warp):
        result[warp == w] = function.reduce(values[warp == w])
    block.write(at.operands[0], result)


# Matrices. A lane's place in a fragment is l / 4 (its row, or the column of b) and 2 (l % 4).


@handles("ldmatrix", "stmatrix")
def _matrix(block: Block, at: Instruction) -> None:
    loads = at.words[0] == "ldmatrix"
    if "m8n8" not in at.words or at.words[-1] != "b16":
        raise NotImplementedError(at.opcode)
    warps = block.whole_warps(at)
    registers, place = at.operands if loads else at.operands[::-1]
    items = registers.items if isinstance(registers, Vector) else (registers,)
    count = len(items)
    address = block.address(place).reshape(warps, WARP)[:, : 8 * count].reshape(-1)
    block.aligned(address, 16, at)
    space, address = block.space(at.words, address)
    if space != "shared":
        raise KernelError(f"an address that is not in shared memory at {at}")
    offset = block.shared_offset(address, 16, at)
    warp = np.repeat(block.warp()[::WARP], 8 * count)
    nobody = np.full(offset.size, -1 if loads else -2)
    rows = np.arange(offset.size, dtype=I64)  # eight to a matrix, which is a phase
    start = int(offset[0]) & ~3
    block.statistics.bank_conflicts += _conflicts((offset - start).tobytes(), 16, rows.tobytes())
    transposed = "trans" in at.words
    if loads:
        races, uninitialised = block.shared.note_read(offset, 16, nobody, warp)
        block.statistics.uninitialised += uninitialised
        matrices = _gather(block.shared.bytes, offset, 16).view(U16).reshape(warps, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        fragments = matrices.view(U32).reshape(warps, count, WARP)
        for i, item in enumerate(items):
            block.write(item, fragments[:, i].reshape(-1))
    else:
        fragments = np.stack([block.read_array(i, U32).reshape(warps, WARP) for i in items], 1)
        matrices = np.ascontiguousarray(fragments).view(U16).reshape(warps, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        data = np.ascontiguousarray(matrices).reshape(-1, 8).view(U8)
        races = block.shared.note_write(offset, 16, nobody, warp)
        _scatter(block.shared.bytes, offset, data)
    block.raced(races, at)


def _fragment_places() -> tuple[Any, ...]:
    lane = np.arange(WARP)[:, None]
    group, pair = lane >> 2, (lane & 3) * 2
    i = np.arange(8)  # value of a: of register i / 2
    a_row, a_column = group + (i >> 1 & 1) * 8, pair + (i >> 2) * 8 + (i & 1)
    i = np.arange(4)
    b_row, b_column = pair + (i >> 1) * 8 + (i & 1), group + 0 * i
    c_row, c_column = group + (i >> 1) * 8, pair + (i & 1)
    return a_row, a_column, b_row, b_column, c_row, c_column


A_ROW, A_COLUMN, B_ROW, B_COLUMN, C_ROW, C_COLUMN = _fragment_places()
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(f16|bf16)\.(f16|bf16)\.f32")


@handles("mma")
def _mma(block: Block, at: Instruction) -> None:
    match = _MMA.fullmatch(at.opcode)
    if not match or match[2] != match[3]:
        raise NotImplementedError(at.opcode)
    depth, half = int(match[1]), HALVES[match[2]]
    warps = block.whole_warps(at)
    block.statistics.mma += warps

    def halves(vector: Vector) -> np.ndarray:
        registers = np.stack([block.read_array(item, U32) for item in vector.items], 1)
        bits = registers.view(U16).reshape(warps, WARP, -1)
        return from_bf16(bits) if half.brain else bits.view(F16).astype(F32)

    a, b = halves(at.operands[1]), halves(at.operands[2])
    c = np.stack([block.read_array(item, F32) for item in at.operands[3].items], 1)
    rows = np.empty((warps, 16, depth), F32)
    columns = np.empty((warps, depth, 8), F32)
    sums = np.empty((warps, 16, 8), F32)
    rows[:, A_ROW[:, : depth // 2], A_COLUMN[:, : depth // 2]] = a
    columns[:, B_ROW[:, : depth // 4], B_COLUMN[:, : depth // 4]] = b
    sums[:, C_ROW, C_COLUMN] = c.reshape(warps, WARP, 4)
    result = (rows @ columns + sums)[:, C_ROW, C_COLUMN].reshape(-1, 4)
    for i, item in enumerate(at.operands[0].items):
        block.write(item, result[:, i])
