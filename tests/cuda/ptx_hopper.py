"""Hopper's asynchronous instructions for ptx.py: wgmma, mbarrier, bulk copies, clusters, fences.

wgmma         computed when it is waited for, from shared memory as it is then, so that a missing
              wait gives stale accumulators and a stage overwritten too early is a race. A and B
              in shared memory, K-major, in any of the four swizzles; or A in registers.
mbarrier      a thread that waits is put aside until the phase is complete; arrivals and waits order
              accesses as barriers do.
proxy fences  wgmma reads through the async proxy: after ordinary stores or cp.async, some thread
              that has seen what they wrote must execute fence.proxy.async, else it is a race.

bulk copies   land at once, and what they write must have been seen by the thread that asks: a slot
              that is filled too early is a race. Of tensor maps: two dimensions, 128-byte swizzle,
              zeros outside, multicast to blocks of the cluster.
clusters      the blocks of a cluster take turns, each until all of its threads wait. Arrivals at
              mbarriers of other blocks, and barrier.cluster, order accesses across blocks.

Not here: other accesses to the shared memory of other blocks, tensor maps of other kinds,
MN-major operands, the rule that registers of a wgmma under way are not touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda import ptx
from cuda.ptx import F16, F32, I32, I64, U8, U16, U32, U64, WARP, Block, Instruction, KernelError

from npclip.cuda_launch import TensorMap

WARPS = 4  # of a warpgroup
BLOCK_SHIFT = 24  # of 1 + a block's rank, in an address of its shared memory that mapa gives
NOBODY = -3  # the writer of what a copy wrote at a time of its own
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # a descriptor's layout -> bytes of a row
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.(f16|bf16)")


@dataclass(eq=False)
class Product:
    """A wgmma under way, of one warpgroup."""

    at: Instruction
    threads: np.ndarray
    group: int | None  # None until it is committed
    depth: int  # n: the rows of b
    a: Any  # a descriptor, or values [64, 16]
    b: int
    keep: bool  # whether the accumulators are added to
    signs: tuple[int, int]


@dataclass
class State:
    """What a block knows of wgmma and mbarriers."""

    committed: dict[int, int] = field(default_factory=dict)  # by warpgroup
    barriers: dict[int, Barrier] = field(default_factory=dict)  # by address


@dataclass
class Barrier:
    """An mbarrier: a phase ends when as many threads as count arrived and all bytes came."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    seen: Any = None  # what the threads that arrived in this phase had seen
    published: Any = None  # of the last complete phase


@dataclass
class Meeting:
    """barrier.cluster: a phase ends when all threads of the cluster have arrived."""

    phase: int = 0
    arrived: int = 0
    seen: Any = None
    published: Any = None
    arrived_in: dict[int, np.ndarray] = field(default_factory=dict)  # by rank: phase of each thread


def _state(block: Block) -> State:
    if block.hopper is None:
        block.hopper = State()
    return block.hopper


# Warpgroup matrix products


@ptx.handles("wgmma")
def _wgmma(block: Block, at: Instruction) -> None:
    words = at.words
    if words[1] == "fence":
        block.whole_warps(at)
        return
    groups = _warpgroups(block, at)
    state = _state(block)
    if words[1] == "commit_group":
        for number, _ in groups:
            for product in _of(block, number):
                if product.group is None:
                    product.group = state.committed.get(number, 0)
            state.committed[number] = state.committed.get(number, 0) + 1
    elif words[1] == "wait_group":
        keep = int(at.operands[0].read(U32))
        for number, _ in groups:
            last = state.committed.get(number, 0) - keep
            for product in _of(block, number):
                if product.group is not None and product.group < last:
                    _finish(block, product)
                    block.unfinished.remove(product)
    else:
        for _, threads in groups:
            _issue(block, at, threads)


def _warpgroups(block: Block, at: Instruction) -> list[tuple[int, np.ndarray]]:
    block.whole_warps(at)
    size = WARPS * WARP
    if block.active.size % size or (block.active[::size] % size).any():
        raise KernelError(f"only some warps of a warpgroup execute {at}")
    return [(int(t[0]) // size, t) for t in block.active.reshape(-1, size)]


def _of(block: Block, number: int) -> list[Product]:
    """The warpgroup's products under way, oldest first."""
    first = number * WARPS * WARP
    return [p for p in block.unfinished if isinstance(p, Product) and p.threads[0] == first]


def _issue(block: Block, at: Instruction, threads: np.ndarray) -> None:
    match = _WGMMA.fullmatch(at.opcode)
    if not match or match[2] != match[3]:
        raise NotImplementedError(at.opcode)
    _, a, b, keep, *flags = at.operands
    values = [int(flag.read(I64)) for flag in flags]
    block.active, active = threads, block.active
    block.lanes, lanes = threads, block.lanes
    try:
        in_registers = isinstance(a, ptx.Vector)
        if any(values[2:]):
            raise NotImplementedError("MN-major operands")
        first = _a_fragments(block, a, match[2]) if in_registers else _uniform(block, a, at)
        accumulate = bool(np.broadcast_to(block.read(keep, np.bool_), threads.size)[0])
        product = Product(
            at, threads, None, int(match[1]), first, _uniform(block, b, at), accumulate,
            (values[0], values[1]),
        )  # fmt: skip
        block.unfinished.append(product)
        for descriptor, rows in _sources(product):
            _note(block, product, _offsets(block, descriptor, rows, at))
    finally:
        block.active, block.lanes = active, lanes


def _uniform(block: Block, operand: Any, at: Instruction) -> int:
    values = block.read_array(operand, U64)
    if (values != values[0]).any():
        raise KernelError(f"the descriptors of a warpgroup differ at {at}")
    return int(values[0])


def _a_fragments(block: Block, vector: Any, kind: str) -> np.ndarray:
    """[64, 16] of the fragments of mma.m16n8k16, a warp to 16 rows."""
    registers = np.stack([block.read_array(item, U32) for item in vector.items], 1)
    values = _widen(registers.view(U16), kind).reshape(WARPS, WARP, 8)
    rows = np.empty((WARPS, 16, 16), F32)
    rows[:, ptx.A_ROW, ptx.A_COLUMN] = values
    return rows.reshape(64, 16)


def _widen(bits: np.ndarray, kind: str) -> np.ndarray:
    return ptx.from_bf16(bits) if kind == "bf16" else bits.view(F16).astype(F32)


def _sources(product: Product) -> list[tuple[int, int]]:
    """(descriptor, rows) of the operands in shared memory."""
    a = [] if isinstance(product.a, np.ndarray) else [(product.a, 64)]
    return [*a, (product.b, product.depth)]


def _offsets(block: Block, descriptor: int, rows: int, at: Instruction) -> np.ndarray:
    """Where the chunks of 16 bytes are, [rows, 2]: 16 values of k, which is contiguous."""
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4  # from chunk to chunk, where nothing is swizzled
    stride = (descriptor >> 32 & 0x3FFF) << 4  # from eight rows to the next eight
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    width = SWIZZLES[descriptor >> 62]
    row, chunk = np.arange(rows)[:, None], np.arange(2)
    step = 16 if width > 16 else leading
    linear = start + row // 8 * stride + row % 8 * width + chunk * step
    offset = linear ^ (linear >> 7 & (width // 16 - 1)) << 4
    block.shared_offset(offset.astype(U64).reshape(-1), 16, at)
    return offset


def _note(block: Block, product: Product, offset: np.ndarray) -> None:
    """All four warps read these chunks, through the async proxy."""
    flat = np.unique(offset)
    nobody = np.full(flat.size, -1)
    for warp in np.unique(product.threads >> 5):
        races, uninitialised = block.shared.note_read(flat, 16, nobody, np.full(flat.size, warp))
        block.raced(races, product.at)
        block.statistics.uninitialised += uninitialised
    index = block.shared.granules(flat, 16)
    unfenced = (block.shared.written[index] >= 0) & ~block.shared.fenced[index]
    block.raced(int(unfenced.any(1).sum()), product.at)


def _finish(block: Block, product: Product) -> None:
    kind = product.at.words[-1]
    operands = []
    if isinstance(product.a, np.ndarray):
        operands.append(product.a)
    for descriptor, rows in _sources(product):
        offset = _offsets(block, descriptor, rows, product.at)
        _note(block, product, offset)
        chunks = ptx._gather(block.shared.bytes, offset.reshape(-1), 16)
        operands.append(_widen(chunks.view(U16), kind).reshape(rows, 16))
    a, b = operands[0] * F32(product.signs[0]), operands[1] * F32(product.signs[1])
    result = (a @ b.T).reshape(WARPS, 16, product.depth)
    lane = np.arange(WARP)
    block.active, active = product.threads, block.active
    block.lanes, lanes = product.threads, block.lanes
    for i, register in enumerate(product.at.operands[0].items):
        row, column = lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
        value = np.ascontiguousarray(result[:, row, column]).reshape(-1)
        if product.keep:
            value = value + block.read(register, F32)
        block.write(register, value)
    block.active, block.lanes = active, lanes
    block.statistics.mma += WARPS * product.depth // 8


# Fences and hints


@ptx.handles("fence", "membar")
def _fence(block: Block, at: Instruction) -> None:
    """A proxy fence is for the writes that its threads did or, through barriers, have seen."""
    if "proxy" in at.words:
        shared = block.shared
        seen = shared.seen(np.unique(block.warp()))
        own = np.isin(shared.writer, block.active) & (shared.written != ptx.IN_FLIGHT)
        shared.fenced[own | (shared.written <= seen[shared.writer_warp])] = True


@ptx.handles("setmaxnreg")
def _registers(block: Block, at: Instruction) -> None:
    _warpgroups(block, at)


@ptx.handles("elect")
def _elect(block: Block, at: Instruction) -> None:
    """The lowest lane of each warp."""
    first = np.zeros(block.active.size, np.bool_)
    first[np.unique(block.warp(), return_index=True)[1]] = True
    lane = (block.active[first] % WARP).astype(U32)
    target = at.operands[0]
    block.write(target.items[0], lane[np.cumsum(first) - 1])
    block.write(target.items[1], first)


# Barriers in shared memory


def _barrier_at(block: Block, address: int, at: Instruction) -> Barrier:
    if address % 8:
        raise KernelError(f"an mbarrier's address is no multiple of 8 at {at}")
    try:
        return _state(block).barriers[address]
    except KeyError:
        raise KernelError(f"no mbarrier was initialised at {address}: {at}") from None


@ptx.handles("mbarrier")
def _mbarrier(block: Block, at: Instruction) -> None:
    words = at.words
    operation = words[1]
    place = next(o for o in at.operands if isinstance(o, ptx.Address))
    addresses = block.address(place).tolist()
    after = at.operands[at.operands.index(place) + 1 :]
    if operation == "init":
        for address, count in zip(addresses, block.read_array(after[0], U32).tolist(), strict=True):
            block.shared_offset(np.array([address], U64), 8, at)
            _state(block).barriers[address] = Barrier(count, count)
    elif operation == "inval":
        for address in addresses:
            _state(block).barriers.pop(address, None)
    elif operation in ("arrive", "expect_tx"):
        _arrive(block, at, addresses, after)
    elif operation in ("try_wait", "test_wait"):
        if "parity" not in words:
            raise NotImplementedError(at.opcode)
        _wait(block, at, np.array(addresses), block.read_array(after[0], U32))
    else:
        raise NotImplementedError(at.opcode)


def _arrive(block: Block, at: Instruction, addresses: list[int], after: list[Any]) -> None:
    expects = "expect_tx" in at.words
    if "noComplete" in at.words or (at.words[1] == "arrive" and at.operands[0] is not ptx.SINK):
        target = at.operands[0]
        if not isinstance(target, ptx.Address):  # the state, which only wait without parity uses
            block.write(target, np.zeros(block.active.size, U64))
    amounts = block.read_array(after[0], U32).tolist() if after else [0 if expects else 1]
    amounts = amounts * (len(addresses) // len(amounts))
    for thread, place, amount in zip(block.active, addresses, amounts, strict=True):
        owner, address = _owner(block, place, at)
        barrier = _barrier_at(owner, address, at)
        if expects:
            barrier.bytes += amount
        if at.words[1] == "arrive":
            seen = block.shared.release(np.array([int(thread) >> 5]))
            _count(owner, barrier, address, 1 if expects else amount, seen, at)


def _owner(block: Block, address: int, at: Instruction) -> tuple[Block, int]:
    """Whose shared memory an address is of, and where in it."""
    rank = (address >> BLOCK_SHIFT) - 1
    owner = block if rank < 0 else block.cluster.blocks[rank]
    if owner.exited == owner.threads:
        raise KernelError(f"shared memory of a block that has ended at {at}")
    return owner, address & (1 << BLOCK_SHIFT) - 1


@ptx.handles("mapa")
def _map_address(block: Block, at: Instruction) -> None:
    target, source, rank = at.operands
    ranks = block.read_array(rank, U32)
    if (ranks >= len(block.cluster.blocks)).any():
        raise KernelError(f"a block that is not of the cluster at {at}")
    own = block.read_array(source, U32)
    block.write(target, own | (ranks + U32(1)) << U32(BLOCK_SHIFT))


def _count(
    block: Block, barrier: Barrier, address: int, arrivals: int, seen: np.ndarray, at: Instruction
) -> None:
    barrier.seen = seen if barrier.seen is None else np.maximum(barrier.seen, seen)
    barrier.pending -= arrivals
    if barrier.pending < 0:
        raise KernelError(f"more arrivals than the mbarrier expects at {at}")
    _complete(block, barrier, address)


def _complete(block: Block, barrier: Barrier, address: int) -> None:
    if barrier.pending or barrier.bytes:
        return
    barrier.pending = barrier.count
    barrier.phase += 1
    barrier.published, barrier.seen = barrier.seen, None
    for threads, at in block.parked.pop(address, []):
        block.join(at.index, threads)


def _wait(block: Block, at: Instruction, addresses: np.ndarray, parity: np.ndarray) -> None:
    """True where the phase of that parity is over; other threads wait to execute this again."""
    over = np.empty(addresses.size, np.bool_)
    for address in np.unique(addresses).tolist():
        here = addresses == address
        barrier = _barrier_at(block, address, at)
        over[here] = (barrier.phase & 1) != parity[here]
        if barrier.published is not None and over[here].any():
            warps = np.unique(block.warp()[here & over])
            block.shared.acquire(warps, barrier.published)
    block.write(at.operands[0], over)
    if at.words[1] == "test_wait" or over.all():
        return
    block.next = {}
    for address in np.unique(addresses[~over]).tolist():
        held = block.active[~over & (addresses == address)]
        block.parked.setdefault(address, []).append((held, at))
    if over.any():
        block.next[at.index + 1] = block.active[over]


_block_barrier = ptx.HANDLERS["barrier"]


@ptx.handles("barrier")
def _cluster_barrier(block: Block, at: Instruction) -> None:
    if at.words[1] != "cluster":
        _block_barrier(block, at)
        return
    cluster = block.cluster
    meeting = cluster.hopper = cluster.hopper or Meeting()
    arrived_in = meeting.arrived_in.setdefault(block.rank, np.full(block.threads, -1))
    warps = np.unique(block.warp())
    if at.words[2] == "arrive":
        if (arrived_in[block.active] == meeting.phase).any():
            raise KernelError(f"a thread arrives twice at {at}")
        seen = block.shared.release(warps)
        meeting.seen = seen if meeting.seen is None else np.maximum(meeting.seen, seen)
        meeting.arrived += block.active.size
        arrived_in[block.active] = meeting.phase
        if meeting.arrived == len(cluster.blocks) * block.threads:
            meeting.published, meeting.seen = meeting.seen, None
            meeting.phase, meeting.arrived = meeting.phase + 1, 0
            for other in cluster.blocks:
                for threads, waiting in other.parked.pop("cluster", []):
                    other.join(waiting.index, threads)
        return
    over = arrived_in[block.active] < meeting.phase
    if (arrived_in[block.active] < 0).any():
        raise KernelError(f"a thread waits that has not arrived at {at}")
    if over.any():
        block.shared.acquire(np.unique(block.warp()[over]), meeting.published)
    if not over.all():
        block.parked.setdefault("cluster", []).append((block.active[~over], at))
        block.next = {at.index + 1: block.active[over]} if over.any() else {}


# Copies that an mbarrier counts

_copy_async = ptx.HANDLERS["cp"]


@ptx.handles("cp")
def _copy(block: Block, at: Instruction) -> None:
    if "bulk" in at.words:
        _bulk(block, at)
    elif "mbarrier" in at.words:
        _arrive_after_copies(block, at)
    else:
        _copy_async(block, at)


def _bulk(block: Block, at: Instruction) -> None:
    """One run of bytes from global memory, counted by an mbarrier; it arrives at once."""
    if "tensor" in at.words:
        _bulk_tensor(block, at)
        return
    if "global" not in at.words or len(at.operands) != 4:
        raise NotImplementedError(at.opcode)
    target, source, amount, place = at.operands
    columns = (
        block.address(target), block.address(source), block.read_array(amount, U32),
        block.address(place), block.active,
    )  # fmt: skip
    for to, origin, size, address, thread in zip(*(c.tolist() for c in columns), strict=True):
        if to % 16 or origin % 16 or size % 16:
            raise KernelError(f"an address or size is no multiple of 16 at {at}")
        offset = to + 16 * np.arange(size // 16)
        data = block.memory.load((origin + 16 * np.arange(size // 16)).astype(U64), 16, at)
        _deliver(block, block, thread, offset, data, address, at)


def _deliver(
    block: Block,
    to: Block,
    thread: int,
    offset: np.ndarray,
    data: np.ndarray,
    address: int,
    at: Any,
) -> None:
    """Chunks of 16 bytes that a thread of `block` asked for arrive in the block `to`."""
    to.shared_offset(offset.astype(U64), 16, at)
    apart = block.rank - to.rank
    who = np.full(offset.size, thread + apart * 1024)  # no thread of that block
    warp = np.full(offset.size, (thread >> 5) + apart * block.warps)
    block.raced(to.shared.note_write(offset, 16, who, warp), at)
    to.shared.fenced[to.shared.granules(offset, 16)] = True
    ptx._scatter(to.shared.bytes, offset, data.view(U8))
    barrier = _barrier_at(to, address, at)
    seen = block.shared.release(np.array([thread >> 5]))
    barrier.seen = seen if barrier.seen is None else np.maximum(barrier.seen, seen)
    barrier.bytes -= data.nbytes
    _complete(to, barrier, address)


def _bulk_tensor(block: Block, at: Instruction) -> None:
    """A box of a tensor map."""
    target, element, place, *mask = at.operands
    if "2d" not in at.words or "global" not in at.words or len(element.coordinates) != 2:
        raise NotImplementedError(at.opcode)
    if bool(mask) != ("multicast__cluster" in at.words):
        raise NotImplementedError(at.opcode)
    masks = block.read_array(mask[0], U16) if mask else np.full(block.active.size, 1 << block.rank)
    columns = (
        block.address(target), block.read_array(element.map, U64),
        *(block.read_array(c, I32) for c in element.coordinates), block.address(place), masks,
        block.active,
    )  # fmt: skip
    for to, origin, x, y, address, blocks, thread in zip(
        *(c.tolist() for c in columns), strict=True
    ):
        if not isinstance(tensor := block.parameters.get(origin), TensorMap):
            raise KernelError(f"no tensor map at {origin:#x}: {at}")
        if blocks >> len(block.cluster.blocks) or not blocks:
            raise KernelError(f"blocks {blocks:#b} of {len(block.cluster.blocks)} at {at}")
        offset, data = _box(tensor, to, x, y, at)
        for owner in block.cluster.blocks:
            if blocks >> owner.rank & 1:
                _owner(block, owner.rank + 1 << BLOCK_SHIFT, at)
                _deliver(block, owner, thread, offset, data, address, at)


def _box(tensor: TensorMap, to: int, x: int, y: int, at: Instruction) -> tuple[Any, np.ndarray]:
    """Where its chunks of 16 bytes go, and what is in them."""
    array, (rows, width) = tensor.array, tensor.box
    if to % 128 or width * 2 != 128 or rows > 256:
        raise KernelError(f"a misplaced box, or one of {rows} x {width} values, at {at}")
    if array.ctypes.data % 16 or array.strides[0] % 16 or array.strides[1] != array.itemsize:
        raise KernelError(f"a tensor map of a misaligned array at {at}")
    box = np.zeros((rows, width), U16)
    inside = array.view(U16)[max(y, 0) : max(y + rows, 0), max(x, 0) : max(x + width, 0)]
    top, left = max(-y, 0), max(-x, 0)
    box[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    offset = to + 16 * np.arange(rows * 8)
    return offset ^ (offset >> 7 & 7) << 4, box.view(U8).reshape(-1, 16)


def _arrive_after_copies(block: Block, at: Instruction) -> None:
    """cp.async.mbarrier.arrive.noinc: arrives when the thread's copies so far have landed."""
    if "noinc" not in at.words:
        raise NotImplementedError(at.opcode)
    places = [
        block.shared.granules(copy.target[block.active], copy.data.shape[1])[
            copy.group[block.active] >= 0
        ]
        for copy in block.copies
    ]
    ptx._wait(block, np.full(block.threads, ptx.IN_FLIGHT, I64))
    for place in places:  # seen by those who wait for the mbarrier only, not by this thread
        block.shared.writer[place] = NOBODY
    addresses = block.address(at.operands[0]).tolist()
    for thread, address in zip(block.active, addresses, strict=True):
        seen = block.shared.release(np.array([int(thread) >> 5]))
        _count(block, _barrier_at(block, address, at), address, 1, seen, at)
