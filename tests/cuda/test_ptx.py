"""Tests of the tester: ptx.py runs right kernels rightly and finds the bugs planted in them.

Single instructions are compared with Python's integers and NumPy's floats on random operands; they
are written in PTX and need no compiler.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest
from cuda import ptx

from npclip import nvrtc
from npclip.cuda_launch import Launch

needs_nvrtc = pytest.mark.skipif(not nvrtc.libraries(), reason="NVRTC is not installed")
COUNT = 256  # operands per instruction: threads of one block


@dataclass(frozen=True)
class Inline:
    """A kernel whose source stands in the test."""

    text: str
    symbol: str = "test_f16"
    dtype: str = "F16"

    @property
    def source(self):
        common = (files("npclip.kernels") / "common.cuh").read_text()
        return f"#define DTYPE {self.dtype}\n{common}{self.text}"


def launch(kernel, *arguments, grid=(1, 1, 1), block=128, shared=0):
    return Launch(kernel, grid, block, shared, arguments)


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


# Single instructions


def evaluate(instruction, result, **operands):
    """What an instruction writes to %d, a register of the type result, for COUNT threads.

    operands: arrays, for the registers %a, %b, ...; booleans are predicates.
    """
    declare, load, pointers, arrays = [], [], [], []
    for i, (name, values) in enumerate(operands.items()):
        array = np.ascontiguousarray(np.broadcast_to(values, COUNT))
        bits = 8 * array.itemsize
        pointers.append(f".param .u64 p{i}")
        load.append(f"ld.param.u64 %p, [p{i}];")
        load.append(f"mad.wide.u32 %p, %t, {array.itemsize}, %p;")
        if array.dtype == bool:
            array = array.astype(np.uint32)
            declare.append(f".reg .pred %{name};")
            load[-1] = "mad.wide.u32 %p, %t, 4, %p;"
            load.append(f"ld.global.u32 %w, [%p]; setp.ne.u32 %{name}, %w, 0;")
        else:
            declare.append(f".reg .b{max(bits, 16)} %{name};")
            load.append(f"ld.global.b{bits} %{name}, [%p];")
        arrays.append(array)
    out = np.zeros(COUNT, np.uint32 if result is bool else result)
    bits = 8 * out.itemsize
    pointers.append(".param .u64 out")
    store = "" if result is not bool else "selp.b32 %o, 1, 0, %d;"
    text = f"""
        .version 8.0
        .target sm_90
        .address_size 64
        .visible .entry test_f16({", ".join(pointers)}) {{
            .reg .b64 %p; .reg .b32 %t, %w, %o;
            {"".join(declare)} .reg .{"pred" if result is bool else f"b{max(bits, 16)}"} %d;
            mov.u32 %t, %tid.x;
            {" ".join(load)}
            {instruction}
            {store}
            ld.param.u64 %p, [out];
            mad.wide.u32 %p, %t, {out.itemsize}, %p;
            st.global.b{bits} [%p], {"%o" if result is bool else "%d"};
            ret;
        }}"""
    ptx.execute(text, launch(Inline(""), *arrays, out, block=COUNT))
    return out.astype(bool) if result is bool else out


INTEGERS = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64,
    "s64": np.int64,
}  # fmt: skip


def integers(rng, dtype, count=COUNT):
    """Some from the whole range, some small, some at its ends."""
    limits = np.iinfo(dtype)
    whole = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    small = rng.integers(0, 70, count).astype(dtype)
    ends = rng.choice(np.array([limits.min, limits.max, 0, 1, limits.max - 1], dtype), count)
    return np.choose(rng.integers(0, 3, count), [whole, small, ends])


def wrap(x, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    x &= (1 << bits) - 1
    return x - (1 << bits) if np.iinfo(dtype).min < 0 and x >> (bits - 1) else x


def per_lane(function, result, *arrays):
    columns = [array.tolist() for array in arrays]
    return np.array([wrap(function(*row), result) for row in zip(*columns, strict=True)], result)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name, function", [
    ("add", lambda a, b: a + b),
    ("sub", lambda a, b: a - b),
    ("min", min),
    ("max", max),
    ("mul.lo", lambda a, b: a * b),
])  # fmt: skip
def test_integer_arithmetic(rng, kind, name, function):
    dtype = INTEGERS[kind]
    a, b = integers(rng, dtype), integers(rng, dtype)
    found = evaluate(f"{name}.{kind} %d, %a, %b;", dtype, a=a, b=b)
    np.testing.assert_array_equal(found, per_lane(function, dtype, a, b))


@pytest.mark.parametrize("kind", INTEGERS)
def test_products_and_their_sums(rng, kind):
    dtype = INTEGERS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a, b, c = (integers(rng, dtype) for _ in range(3))
    found = evaluate(f"mul.hi.{kind} %d, %a, %b;", dtype, a=a, b=b)
    np.testing.assert_array_equal(found, per_lane(lambda a, b: a * b >> bits, dtype, a, b))
    found = evaluate(f"mad.lo.{kind} %d, %a, %b, %c;", dtype, a=a, b=b, c=c)
    np.testing.assert_array_equal(found, per_lane(lambda a, b, c: a * b + c, dtype, a, b, c))
    if bits < 64:
        wide = INTEGERS[f"{kind[0]}{2 * bits}"]
        c = integers(rng, wide)
        found = evaluate(f"mad.wide.{kind} %d, %a, %b, %c;", wide, a=a, b=b, c=c)
        np.testing.assert_array_equal(found, per_lane(lambda a, b, c: a * b + c, wide, a, b, c))


@pytest.mark.parametrize("kind", INTEGERS)
def test_division_truncates(rng, kind):
    dtype = INTEGERS[kind]
    a, b = integers(rng, dtype), integers(rng, dtype)
    b[b == 0] = 3
    found = evaluate(f"div.{kind} %d, %a, %b;", dtype, a=a, b=b)
    np.testing.assert_array_equal(found, per_lane(truncated, dtype, a, b))
    found = evaluate(f"rem.{kind} %d, %a, %b;", dtype, a=a, b=b)
    remainder = per_lane(lambda a, b: a - b * truncated(a, b), dtype, a, b)
    np.testing.assert_array_equal(found, remainder)


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts(rng, kind):
    dtype = INTEGERS[kind]
    a, b = integers(rng, dtype), integers(rng, np.uint32)
    left = evaluate(f"shl.b{kind[1:]} %d, %a, %b;", dtype, a=a, b=b)
    np.testing.assert_array_equal(left, per_lane(lambda a, b: a << min(b, 64), dtype, a, b))
    right = evaluate(f"shr.{kind} %d, %a, %b;", dtype, a=a, b=b)
    np.testing.assert_array_equal(right, per_lane(lambda a, b: a >> min(b, 64), dtype, a, b))


def test_funnel_shifts(rng):
    low, high, count = (integers(rng, np.uint32) for _ in range(3))
    for mode, limit in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        found = evaluate(f"shf.l.{mode}.b32 %d, %a, %b, %c;", np.uint32, a=low, b=high, c=count)
        np.testing.assert_array_equal(
            found,
            per_lane(
                lambda a, b, c, limit=limit: ((b << 32 | a) << limit(c)) >> 32,
                np.uint32, low, high, count,
            ),
        )  # fmt: skip
        found = evaluate(f"shf.r.{mode}.b32 %d, %a, %b, %c;", np.uint32, a=low, b=high, c=count)
        np.testing.assert_array_equal(
            found,
            per_lane(
                lambda a, b, c, limit=limit: (b << 32 | a) >> limit(c), np.uint32, low, high, count
            ),
        )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(rng, kind):
    dtype, top = INTEGERS[kind], int(kind[1:]) - 1
    a, b = integers(rng, dtype), integers(rng, dtype)
    start = rng.integers(0, top + 10, COUNT).astype(np.uint32)
    length = rng.integers(0, top + 10, COUNT).astype(np.uint32)

    def extract(a, start, length):
        sign = a >> min(start + length - 1, top) & 1 if kind[0] == "s" and length else 0
        return sum(
            (a >> (start + i) & 1 if i < length and start + i <= top else sign) << i
            for i in range(top + 1)
        )

    def insert(new, old, start, length):
        for i in range(length):
            if start + i <= top:
                old = old & ~(1 << (start + i)) | (new >> i & 1) << (start + i)
        return old

    found = evaluate(f"bfe.{kind} %d, %a, %b, %c;", dtype, a=a, b=start, c=length)
    np.testing.assert_array_equal(found, per_lane(extract, dtype, a, start, length))
    instruction = f"bfi.b{kind[1:]} %d, %a, %b, %c, %e;"
    found = evaluate(instruction, dtype, a=a, b=b, c=start, e=length)
    np.testing.assert_array_equal(found, per_lane(insert, dtype, a, b, start, length))


def test_permutation_of_bytes(rng):
    a, b, selector = (integers(rng, np.uint32) for _ in range(3))

    def permute(a, b, selector):
        source = (b << 32 | a).to_bytes(8, "little")
        result = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            result.append((0xFF if byte >> 7 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(result), "little")

    found = evaluate("prmt.b32 %d, %a, %b, %c;", np.uint32, a=a, b=b, c=selector)
    np.testing.assert_array_equal(found, per_lane(permute, np.uint32, a, b, selector))


def test_logic(rng):
    a, b, c = (integers(rng, np.uint32) for _ in range(3))
    for table, function in (
        (0x80, lambda a, b, c: a & b & c),
        (0xFE, lambda a, b, c: a | b | c),
        (0x96, lambda a, b, c: a ^ b ^ c),
        (0xCA, lambda a, b, c: a & b | ~a & c),
        (0x2A, lambda a, b, c: c & ~(a & b)),
    ):
        found = evaluate(f"lop3.b32 %d, %a, %b, %c, {table};", np.uint32, a=a, b=b, c=c)
        np.testing.assert_array_equal(found, per_lane(function, np.uint32, a, b, c))
    for name, function in (
        ("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b),
    ):  # fmt: skip
        found = evaluate(f"{name}.b32 %d, %a, %b;", np.uint32, a=a, b=b)
        np.testing.assert_array_equal(found, per_lane(function, np.uint32, a, b))
    found = evaluate("not.b32 %d, %a;", np.uint32, a=a)
    np.testing.assert_array_equal(found, ~a)


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_of_bits(rng, bits):
    dtype = INTEGERS[f"u{bits}"]
    a = integers(rng, dtype)
    for name, function in (
        ("popc", int.bit_count), ("clz", lambda a: bits - a.bit_length()),
    ):  # fmt: skip
        found = evaluate(f"{name}.b{bits} %d, %a;", np.uint32, a=a)
        np.testing.assert_array_equal(found, per_lane(function, np.uint32, a))
    found = evaluate(f"brev.b{bits} %d, %a;", dtype, a=a)
    np.testing.assert_array_equal(
        found, per_lane(lambda a: int(f"{a:0{bits}b}"[::-1], 2), dtype, a)
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs_of_integers(rng, kind):
    a = integers(rng, INTEGERS[kind])
    found = evaluate(f"abs.{kind} %d, %a;", INTEGERS[kind], a=a)
    np.testing.assert_array_equal(found, per_lane(abs, INTEGERS[kind], a))
    found = evaluate(f"neg.{kind} %d, %a;", INTEGERS[kind], a=a)
    np.testing.assert_array_equal(found, per_lane(lambda a: -a, INTEGERS[kind], a))


def floats(rng, dtype=np.float32):
    """Of all magnitudes, with zeros, infinities, NaN and ties."""
    bits = {np.float16: np.uint16, np.float32: np.uint32}[dtype]
    anything = rng.integers(0, np.iinfo(bits).max, COUNT, bits, endpoint=True).view(dtype)
    ordinary = (rng.standard_normal(COUNT) * 10).astype(dtype)
    special = rng.choice(
        np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 0.5, 1.5, 2.5, -2.5], dtype), COUNT
    )
    return np.choose(rng.integers(0, 3, COUNT), [anything, ordinary, special])


def same(found, expected):
    """Bit for bit, but for the payload of NaNs."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[number], expected[number])
    np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(expected[number]))


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("name, function", [
    ("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide),
])  # fmt: skip
def test_float_arithmetic(rng, name, function, ftz):
    a, b = floats(rng), floats(rng)
    found = evaluate(f"{name}{ftz}.f32 %d, %a, %b;", np.float32, a=a, b=b)
    with np.errstate(all="ignore"):
        if ftz:
            same(found, flushed(function(flushed(a), flushed(b))))
        else:
            same(found, function(a, b))


def rounded(x: Fraction, mantissa: int) -> Fraction:
    """To nearest even, with this many bits behind the first and no bound on the exponent."""
    if x == 0:
        return x
    exponent = math.floor(math.log2(abs(x)))
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - mantissa)
    return round(x / unit) * unit


def test_fma_rounds_once(rng):
    a, b = rng.standard_normal((2, COUNT)).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # much cancels
    c[::2] = rng.standard_normal(c[::2].shape)
    a[:4], b[:4] = 1 + 2**-12, 1 + 2**-12  # 1 + 2^-11 + 2^-24: a tie but for c
    c[:4] = [2**-60, -(2**-60), 2**-100, 0]
    found = evaluate("fma.rn.f32 %d, %a, %b, %c;", np.float32, a=a, b=b, c=c)
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    exact = [rounded(Fraction(x) * Fraction(y) + Fraction(z), 23) for x, y, z in rows]
    assert [Fraction(x) for x in found.tolist()] == exact


def test_fma_of_bfloat16_rounds_once(rng):
    a, b, c = (ptx.to_bf16(rng.standard_normal(COUNT).astype(np.float32)) for _ in range(3))
    wide = [ptx.from_bf16(x).tolist() for x in (a, b, c)]
    found = evaluate("fma.rn.bf16 %d, %a, %b, %c;", np.uint16, a=a, b=b, c=c)
    exact = [
        rounded(Fraction(x) * Fraction(y) + Fraction(z), 7) for x, y, z in zip(*wide, strict=True)
    ]
    assert [Fraction(x) for x in ptx.from_bf16(found).tolist()] == exact


@pytest.mark.parametrize("name", ["min", "max"])
def test_float_extremes(rng, name):
    a, b = floats(rng), floats(rng)
    a[:4], b[:4] = [0, -0.0, np.nan, np.nan], [-0.0, 0, 1, np.nan]
    found = evaluate(f"{name}.f32 %d, %a, %b;", np.float32, a=a, b=b)
    np.testing.assert_array_equal(found, (np.fmax if name == "max" else np.fmin)(a, b))
    assert not np.signbit(found[:2]).any() if name == "max" else np.signbit(found[:2]).all()
    found = evaluate(f"{name}.NaN.f32 %d, %a, %b;", np.float32, a=a, b=b)
    np.testing.assert_array_equal(found, (np.maximum if name == "max" else np.minimum)(a, b))


@pytest.mark.parametrize("name, function", [
    ("ex2.approx.ftz", np.exp2), ("lg2.approx.ftz", np.log2), ("sqrt.rn", np.sqrt),
    ("sqrt.approx.ftz", np.sqrt), ("rsqrt.approx.ftz", lambda x: 1 / np.sqrt(x)),
    ("rcp.rn", lambda x: 1 / x), ("rcp.approx.ftz", lambda x: 1 / x),
])  # fmt: skip
def test_functions(rng, name, function):
    a = floats(rng)
    found = evaluate(f"{name}.f32 %d, %a;", np.float32, a=a)
    with np.errstate(all="ignore"):
        wide = (flushed(a) if "ftz" in name else a).astype(np.float64)
        expected = function(wide).astype(np.float32)
        same(found, flushed(expected) if "ftz" in name else expected)


def test_half_arithmetic(rng):
    a, b = floats(rng, np.float16), floats(rng, np.float16)
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        found = evaluate(f"{name}.f16 %d, %a, %b;", np.float16, a=a, b=b)
        with np.errstate(all="ignore"):
            same(found, function(a, b))
    x, y = (np.repeat(v, 2)[:COUNT].copy() for v in (a, b))
    packed = [np.resize(v, 2 * COUNT).view(np.uint32) for v in (x, y)]
    found = evaluate("mul.f16x2 %d, %a, %b;", np.uint32, a=packed[0], b=packed[1])
    with np.errstate(all="ignore"):
        same(found.view(np.float16), packed[0].view(np.float16) * packed[1].view(np.float16))


def bf16_of(x):
    """Round to nearest even by way of Python's fractions."""
    return np.array([float(rounded(Fraction(v), 7)) for v in x.tolist()], np.float32)


def test_conversion_to_narrow_floats(rng):
    a = floats(rng)
    with np.errstate(all="ignore"):
        same(evaluate("cvt.rn.f16.f32 %d, %a;", np.float16, a=a), a.astype(np.float16))
        found = evaluate("cvt.rz.f16.f32 %d, %a;", np.float16, a=a)
        near = a.astype(np.float16)
        beyond = np.abs(near.astype(np.float32)) > np.abs(a)
        same(found, np.where(beyond, np.nextafter(near, np.float16(0)), near))
        b = floats(rng)
        found = evaluate("cvt.rn.f16x2.f32 %d, %a, %b;", np.uint32, a=a, b=b)
        same(found.view(np.float16)[1::2], a.astype(np.float16))
        same(found.view(np.float16)[::2], b.astype(np.float16))
    x = rng.standard_normal(COUNT).astype(np.float32)
    found = evaluate("cvt.rn.bf16.f32 %d, %a;", np.uint16, a=x)
    same(ptx.from_bf16(found), bf16_of(x))
    found = evaluate("cvt.rn.bf16x2.f32 %d, %a, %b;", np.uint32, a=x, b=x[::-1])
    same(ptx.from_bf16(found.view(np.uint16)[1::2]), bf16_of(x))
    same(ptx.from_bf16(found.view(np.uint16)[::2]), bf16_of(x[::-1]))
    halves = floats(rng, np.float16)
    same(evaluate("cvt.f32.f16 %d, %a;", np.float32, a=halves), halves.astype(np.float32))
    bits = integers(rng, np.uint16)
    same(evaluate("cvt.f32.bf16 %d, %a;", np.float32, a=bits), ptx.from_bf16(bits))
    ends = np.resize(np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38], np.float32), COUNT)
    found = ptx.from_bf16(evaluate("cvt.rn.bf16.f32 %d, %a;", np.uint16, a=ends))
    same(found[:5], np.array([np.inf, -np.inf, np.nan, np.inf, -np.inf], np.float32))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_conversion_of_floats_to_integers_saturates(rng, kind):
    dtype = INTEGERS[kind]
    limits = np.iinfo(dtype)
    a = floats(rng)
    a[np.isnan(a)] = 0
    for mode, function in (
        ("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil),
    ):  # fmt: skip
        found = evaluate(f"cvt.{mode}.{kind}.f32 %d, %a;", dtype, a=a)
        expected = [
            max(limits.min, min(limits.max, function(x)))
            if math.isfinite(x)
            else (limits.max if x > 0 else limits.min)
            for x in a.tolist()
        ]
        assert found.tolist() == expected


@pytest.mark.parametrize("of", ["u8", "s8", *INTEGERS])
@pytest.mark.parametrize("to", ["u8", "s8", *INTEGERS])
def test_conversion_of_integers(rng, of, to):
    source = INTEGERS.get(of) or {"u8": np.uint8, "s8": np.int8}[of]
    target = INTEGERS.get(to) or {"u8": np.uint8, "s8": np.int8}[to]
    a = integers(rng, source)
    found = evaluate(f"cvt.{to}.{of} %d, %a;", target, a=a)
    np.testing.assert_array_equal(found, per_lane(lambda x: x, target, a))
    found = evaluate(f"cvt.sat.{to}.{of} %d, %a;", target, a=a)
    limits = np.iinfo(target)
    expected = per_lane(lambda x: max(limits.min, min(limits.max, x)), target, a)
    np.testing.assert_array_equal(found, expected)


def test_conversion_of_integers_to_floats(rng):
    for kind in ("s32", "u32", "s64", "u64"):
        a = integers(rng, INTEGERS[kind])
        found = evaluate(f"cvt.rn.f32.{kind} %d, %a;", np.float32, a=a)
        assert [Fraction(x) for x in found.tolist()] == [
            rounded(Fraction(x), 23) for x in a.tolist()
        ]


@pytest.mark.parametrize("kind", [*INTEGERS, "f32"])
@pytest.mark.parametrize("name, function", [
    ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal),
    ("gt", np.greater), ("ge", np.greater_equal),
])  # fmt: skip
def test_comparisons(rng, kind, name, function):
    if kind == "f32":
        a, b = floats(rng), floats(rng)
    else:
        a, b = integers(rng, INTEGERS[kind]), integers(rng, INTEGERS[kind])
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    found = evaluate(f"setp.{name}.{kind} %d, %a, %b;", bool, a=a, b=b)
    np.testing.assert_array_equal(found, function(a, b) & ~unordered)
    if kind == "f32":
        found = evaluate(f"setp.{name}u.f32 %d, %a, %b;", bool, a=a, b=b)
        np.testing.assert_array_equal(found, function(a, b) | unordered)
    p = rng.integers(0, 2, COUNT).astype(bool)
    found = evaluate(f"setp.{name}.or.{kind} %d, %a, %b, !%p0;", bool, a=a, b=b, p0=p)
    np.testing.assert_array_equal(found, (function(a, b) & ~unordered) | ~p)
    pair = f"setp.{name}.and.{kind} %q|%d, %a, %b, %p0;"
    found = evaluate(f"{{ .reg .pred %q; {pair} }}", bool, a=a, b=b, p0=p)
    np.testing.assert_array_equal(found, ~(function(a, b) & ~unordered) & p)


def test_selection_and_moves(rng):
    a, b = integers(rng, np.uint32), integers(rng, np.uint32)
    p = rng.integers(0, 2, COUNT).astype(bool)
    found = evaluate("selp.b32 %d, %a, %b, %p0;", np.uint32, a=a, b=b, p0=p)
    np.testing.assert_array_equal(found, np.where(p, a, b))
    found = evaluate("mov.b64 %d, {%a, %b};", np.uint64, a=a, b=b)
    np.testing.assert_array_equal(found, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    swap = "{ .reg .b16 %l, %h; mov.b32 {%l, %h}, %a; mov.b32 %d, {%h, %l}; }"
    found = evaluate(swap, np.uint32, a=a)
    np.testing.assert_array_equal(found, a >> np.uint32(16) | a << np.uint32(16))
    found = evaluate("@%p0 mov.b32 %d, %a; @!%p0 mov.b32 %d, -7;", np.int32, a=a, p0=p)
    np.testing.assert_array_equal(found, np.where(p, a.view(np.int32), -7))
    found = evaluate("mov.f32 %d, 0f3FC00000;", np.float32)
    assert (found == 1.5).all()


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
def test_shuffles(rng, mode):
    a = integers(rng, np.uint32)
    for amount in (1, 5, 16, 31):
        clamp = 0 if mode == "up" else 31
        instruction = f"shfl.sync.{mode}.b32 %d, %a, {amount}, {clamp}, -1;"
        found = evaluate(instruction, np.uint32, a=a).reshape(-1, 32)
        lane = np.arange(32)
        wanted = {
            "bfly": lane ^ amount, "up": lane - amount, "down": lane + amount,
            "idx": np.full(32, amount),
        }[mode]  # fmt: skip
        wanted = np.where((wanted < 0) | (wanted > 31), lane, wanted)
        np.testing.assert_array_equal(found, a.reshape(-1, 32)[:, wanted])
    # Segments of eight lanes.
    amount = 3
    clamp = (0x18 << 8) | (0 if mode == "up" else 7)
    found = evaluate(f"shfl.sync.{mode}.b32 %d, %a, {amount}, {clamp}, -1;", np.uint32, a=a)
    lane = np.arange(8)
    wanted = {
        "bfly": lane ^ amount, "up": lane - amount, "down": lane + amount,
        "idx": np.full(8, amount),
    }[mode]  # fmt: skip
    wanted = np.where((wanted < 0) | (wanted > 7), lane, wanted)
    np.testing.assert_array_equal(found.reshape(-1, 8), a.reshape(-1, 8)[:, wanted])


def test_votes_and_reductions(rng):
    p = rng.integers(0, 2, COUNT).astype(bool)
    p[:32], p[32:64] = True, False
    rows = p.reshape(-1, 32)
    for name, function in (("all", rows.all(1)), ("any", rows.any(1))):
        found = evaluate(f"vote.sync.{name}.pred %d, %p0, -1;", bool, p0=p)
        np.testing.assert_array_equal(found, np.repeat(function, 32))
    found = evaluate("vote.sync.ballot.b32 %d, %p0, -1;", np.uint32, p0=p)
    ballots = [sum(int(bit) << i for i, bit in enumerate(row)) for row in rows]
    np.testing.assert_array_equal(found, np.repeat(ballots, 32))
    a = integers(rng, np.int32)
    found = evaluate("redux.sync.max.s32 %d, %a, -1;", np.int32, a=a)
    np.testing.assert_array_equal(found, np.repeat(a.reshape(-1, 32).max(1), 32))


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"sin\.approx\.f32"):
        evaluate("sin.approx.f32 %d, %a;", np.float32, a=np.zeros(COUNT, np.float32))


# Matrix instructions, by their definitions in the PTX manual


@pytest.mark.parametrize("kind, depth", [("f16", 8), ("f16", 16), ("bf16", 16)])
def test_mma(rng, kind, depth):
    a = rng.standard_normal((16, depth)).astype(np.float16)
    b = rng.standard_normal((8, depth)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    if kind == "bf16":
        a, b = (ptx.from_bf16(ptx.to_bf16(x.astype(np.float32))) for x in (a, b))

    def bits(x):
        return ptx.to_bf16(np.float32(x)) if kind == "bf16" else np.float16(x).view(np.uint16)

    def pair(low, high):
        return int(bits(low)) | int(bits(high)) << 16

    lanes = [(lane // 4, lane % 4 * 2) for lane in range(32)]
    a_rows = [(0, 0), (8, 0), (0, 8), (8, 8)][: depth // 4]
    operands = {}
    for i, (row, column) in enumerate(a_rows):
        operands[f"a{i}"] = [
            pair(*a[group + row, q + column : q + column + 2]) for group, q in lanes
        ]
    for i in range(depth // 8):
        operands[f"b{i}"] = [pair(*b[group, q + 8 * i : q + 8 * i + 2]) for group, q in lanes]
    operands = {k: np.resize(np.array(v, np.uint32), COUNT) for k, v in operands.items()}
    for i in range(4):
        values = [c[group + i // 2 * 8, q + i % 2] for group, q in lanes]
        operands[f"c{i}"] = np.resize(np.array(values, np.float32), COUNT)
    names = [", ".join(f"%{x}" for x in operands if x[0] == letter) for letter in "abc"]
    product = a.astype(np.float64) @ b.astype(np.float64).T + c
    opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    for i in range(4):
        outputs = ", ".join("%d" if j == i else "_" for j in range(4))
        line = f"{opcode} {{{outputs}}}, {{{names[0]}}}, {{{names[1]}}}, {{{names[2]}}};"
        found = evaluate(line, np.float32, **operands)
        expected = [product[group + i // 2 * 8, q + i % 2] for group, q in lanes]
        np.testing.assert_allclose(found, np.resize(expected, COUNT), rtol=1e-5, atol=1e-5)


@needs_nvrtc
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(rng, transposed):
    x = rng.standard_normal((32, 8)).astype(np.float16)
    out = np.zeros((4, 32, 2), np.float16)
    kernel = Inline(f"""
        KERNEL(32) test_f16(const value *x, uint32_t *out) {{
            __shared__ Chunk rows[32];
            rows[threadIdx.x] = load_chunk(x + 8 * threadIdx.x);
            __syncthreads();
            uint32_t r[4];
            ldmatrix_x4{"_trans" if transposed else ""}(r, &rows[threadIdx.x]);
            for (int i = 0; i < 4; i++) out[32 * i + threadIdx.x] = r[i];
        }}""")
    statistics = ptx.run(launch(kernel, x, out.view(np.uint32), block=32))
    assert (statistics.bank_conflicts, statistics.races, statistics.uninitialised) == (0, 0, 0)
    matrices = x.reshape(4, 8, 8)
    for lane in range(32):
        row, q = lane // 4, lane % 4 * 2
        expected = matrices[:, q : q + 2, row] if transposed else matrices[:, row, q : q + 2]
        np.testing.assert_array_equal(out[:, lane], expected)


# Whole kernels, right and wrong


TILES = """
// out [16 m, 8 n] = a [16 m, k] b [8 n, k]^T, a warp to a tile of [16, 8]; two stages of 16 of k.
KERNEL(64) test_f16(const value *a, const value *b, float *out, int k) {
    DYNAMIC_SHARED(value, tiles);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = 8 * (2 * blockIdx.x + warp), m = 16 * blockIdx.y;
    value *mine = tiles + warp * 2 * 24 * PITCH;
    float sum[4] = {0, 0, 0, 0};
    auto load = [&](int stage, int start) {
        for (int i = lane; i < 48; i += 32) {
            int row = i / 2, column = start + i % 2 * 8;
            const value *from = row < 16 ? a + (m + row) * k : b + (n + row - 16) * k;
            copy_async(mine + (stage * 24 + row) * PITCH + i % 2 * 8, from + column, column < k);
        }
        commit_async();
    };
    load(0, 0);
    for (int start = 0, stage = 0; start < k; start += 16, stage ^= 1) {
        load(stage ^ 1, start + 16);
        wait_async<1>();
        __syncthreads();
        value *tile = mine + stage * 24 * PITCH;
        uint32_t x[4], y[4];
        ldmatrix_x4(x, tile + (lane & 15) * PITCH + lane / 16 * 8);
        ldmatrix_x4(y, tile + (16 + (lane & 7)) * PITCH + (lane / 8 & 1) * 8);
        mma_16816(sum, x, y[0], y[1]);
        __syncthreads();
    }
    wait_async<0>();
    for (int i = 0; i < 4; i++)
        out[(m + lane / 4 + i / 2 * 8) * (16 * gridDim.x) + n + lane % 4 * 2 + i % 2] = sum[i];
}
"""


def run_tiles(rng, pitch=24, edit=None, arch="80", dtype="F16", library=None):
    """(relative error, statistics) of the kernel above on 32 x 48, k = 64."""
    a, b = (rng.standard_normal((rows, 64)).astype(np.float32) for rows in (32, 48))
    if dtype == "BF16":
        stored = [ptx.to_bf16(x) for x in (a, b)]
        a, b = (ptx.from_bf16(x) for x in stored)
    else:
        stored = [x.astype(np.float16) for x in (a, b)]
        a, b = (x.astype(np.float32) for x in stored)
    out = np.full((32, 48), np.nan, np.float32)
    kernel = Inline(f"#define PITCH {pitch}\n{TILES}", dtype=dtype)
    shared = 2 * 2 * 24 * pitch * 2
    work = launch(kernel, *stored, out, np.int32(64), grid=(3, 2, 1), block=64, shared=shared)
    statistics = ptx.run(work, arch, library, edit)
    expected = a.astype(np.float64) @ b.T.astype(np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected), statistics


def without(pattern, count=0):
    """An edit that takes lines out of the PTX."""

    def edit(text):
        changed, found = re.subn(pattern, "", text, count=count)
        assert found
        return changed

    return edit


@needs_nvrtc
@pytest.mark.parametrize("library", nvrtc.libraries(), ids=str)
@pytest.mark.parametrize("arch, dtype", [
    ("75", "F16"), ("80", "F16"), ("80", "BF16"), ("90", "F16"), ("100", "BF16"),
])  # fmt: skip
def test_a_right_kernel_is_right(rng, arch, dtype, library):
    error, statistics = run_tiles(rng, arch=arch, dtype=dtype, library=library)
    assert error < 1e-6
    assert statistics.races == statistics.uninitialised == 0, statistics.race_at
    assert statistics.bank_conflicts == 0
    assert statistics.mma == 12 * 64 // (8 if arch == "75" else 16)


@needs_nvrtc
def test_a_missing_barrier_is_a_race(rng):
    error, statistics = run_tiles(rng, edit=without(r"bar\.sync\s+0;"))
    assert error < 1e-6  # by luck
    assert statistics.races > 0
    assert any("ldmatrix" in place and "line" in place for place in statistics.race_at)


@needs_nvrtc
def test_a_missing_barrier_of_a_stage_is_a_race(rng):
    def second_only(text):  # the barrier before the stage is written again
        places = [m.span() for m in re.finditer(r"bar\.sync\s+0;", text)]
        start, end = places[-1]
        return text[:start] + text[end:]

    _, statistics = run_tiles(rng, edit=second_only)
    assert statistics.races > 0
    assert any("cp.async" in place for place in statistics.race_at)


@needs_nvrtc
def test_a_wait_that_waits_for_too_little_is_a_race(rng):
    _, statistics = run_tiles(rng, edit=lambda text: text.replace("wait_group 1", "wait_group 2"))
    assert statistics.races > 0


@needs_nvrtc
def test_a_copy_that_is_never_waited_for_is_an_error(rng):
    with pytest.raises(ptx.KernelError, match="never waited for"):
        run_tiles(rng, edit=without(r"cp\.async\.wait_group \d;"))


@needs_nvrtc
def test_rows_without_padding_are_bank_conflicts(rng):
    error, statistics = run_tiles(rng, pitch=16)
    assert error < 1e-6
    assert statistics.bank_conflicts > 0


@needs_nvrtc
def test_swapped_fragments_give_a_wrong_result(rng):
    def swap(text):
        pattern = r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)"
        changed, found = re.subn(pattern, r"\1\2, \4, \3, \5", text)
        assert found
        return changed

    error, _ = run_tiles(rng, edit=swap)
    assert error > 0.1


SIMPLE = """
KERNEL(128) test_f16(const float *x, float *y, int n) {
    __shared__ float tile[132];
    int i = blockIdx.x * 128 + threadIdx.x;
    BODY
}
"""


def run_simple(body, n=100, length=100, arch="80", **sizes):
    x = np.arange(length, dtype=np.float32)
    y = np.full(length, np.nan, np.float32)
    kernel = Inline(SIMPLE.replace("BODY", body))
    return y, ptx.run(launch(kernel, x, y, np.int32(n), **sizes), arch)


@needs_nvrtc
def test_divergent_threads_meet_again():
    body = """
        if (i >= n) return;
        float s = 0;
        for (int j = 0; j < i % 7; j++) s += j % 2 ? x[j] : -x[j];
        y[i] = i % 3 ? s : -s;"""
    y, _ = run_simple(body)
    signed = [sum(j if j % 2 else -j for j in range(i % 7)) for i in range(100)]
    np.testing.assert_array_equal(y, [s if i % 3 else -s for i, s in enumerate(signed)])


@needs_nvrtc
def test_a_grid_of_three_dimensions_and_tables():
    source = """
        __device__ const float table[4] = {1, 20, 300, 4000};
        KERNEL(32) test_f16(float *y, int64_t wide, float f) {
            int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
            y[block * 32 + threadIdx.x] = table[threadIdx.x % 4] * f + block + (float)(wide >> 33);
        }"""
    y = np.zeros((24, 32), np.float32)
    work = launch(Inline(source), y, np.int64(3 << 33), np.float32(2), grid=(2, 3, 4), block=32)
    ptx.run(work)
    table = np.resize([1, 20, 300, 4000], 32)
    np.testing.assert_array_equal(y, 2 * table + np.arange(24)[:, None] + 3)


@needs_nvrtc
def test_one_element_out_of_bounds_is_an_error():
    y, _ = run_simple("if (i < n) y[i] = x[i];")
    np.testing.assert_array_equal(y, np.arange(100))
    with pytest.raises(ptx.KernelError, match=r"4 bytes .* beyond array 0 .*ld\.global.*line"):
        run_simple("if (i <= n) y[i] = x[i];")
    with pytest.raises(ptx.KernelError, match=r"(?s)beyond array.*st\.global"):
        run_simple("if (i < n) y[i + 1] = x[i];")
    with pytest.raises(ptx.KernelError, match=r"ld\.global"):
        run_simple("if (i < n) y[i] = x[i - 1];")


@needs_nvrtc
def test_the_gap_between_rows_is_out_of_bounds():
    source = """
        KERNEL(32) test_f16(const float *x, float *y, int width, int pitch) {
            for (int i = threadIdx.x; i < 4 * width; i += 32)
                y[i] = x[(int64_t)(i / width) * pitch + i % width];
        }"""
    x = np.arange(80, dtype=np.float32).reshape(4, 20)
    for width in (12, 13):
        y = np.zeros((4, width), np.float32)
        arguments = (x[:, 4:16], y, np.int32(width), np.int32(20))
        if width == 12:
            ptx.run(launch(Inline(source), *arguments, block=32))
            np.testing.assert_array_equal(y, x[:, 4:16])
        else:
            with pytest.raises(ptx.KernelError, match="between the rows of array 0"):
                ptx.run(launch(Inline(source), *arguments, block=32))


@needs_nvrtc
def test_shared_memory_ends_where_it_was_asked_to():
    body = "tile[threadIdx.x + n] = 1; __syncthreads(); if (i < 100) y[i] = tile[i + n];"
    run_simple(body, n=4)
    with pytest.raises(ptx.KernelError, match="528 of 528 bytes of shared memory"):
        run_simple(body, n=5)


@needs_nvrtc
def test_uninitialised_shared_memory_is_counted():
    body = "if (i < n) tile[i] = x[i]; __syncthreads(); if (i < 100) y[i] = tile[i];"
    y, statistics = run_simple(body, n=99)
    assert statistics.uninitialised == 1
    assert np.isnan(y[99]) and (y[:99] == np.arange(99)).all()


@needs_nvrtc
def test_a_misaligned_access_is_an_error():
    body = """
        if (i < 20) {
            float2 pair = reinterpret_cast<const float2 *>(x + n)[i];
            y[i] = pair.x + pair.y;
        }"""
    run_simple(body, n=2)
    with pytest.raises(ptx.KernelError, match="multiple of 8"):
        run_simple(body, n=1)


@needs_nvrtc
def test_conflicts_of_loads_and_stores():
    body = "tile[threadIdx.x % 32 * n + threadIdx.x / 32] = 1; __syncthreads(); y[0] = tile[0];"
    _, statistics = run_simple(body + "if (!n) y[1] = tile[1];", n=1, block=32)
    assert statistics.other_conflicts == 0
    _, statistics = run_simple(body, n=2, block=32)
    assert statistics.other_conflicts == 1
    _, statistics = run_simple(body, n=4, block=32)
    assert statistics.other_conflicts == 3


@needs_nvrtc
def test_threads_of_a_warp_need_a_barrier_too():
    body = "tile[threadIdx.x] = i; SYNC y[threadIdx.x] = tile[threadIdx.x ^ 1];"
    for sync, races in (("", True), ("__syncwarp();", False), ("__syncthreads();", False)):
        _, statistics = run_simple(body.replace("SYNC", sync), length=128)
        assert (statistics.races > 0) == races, sync
    far = body.replace("SYNC", "__syncwarp();").replace("^ 1", "^ 32")
    _, statistics = run_simple(far, length=128)
    assert statistics.races > 0


@needs_nvrtc
def test_two_writers_of_one_place_are_a_race():
    _, statistics = run_simple("tile[threadIdx.x / 2] = i; __syncthreads(); y[0] = tile[0];")
    assert statistics.races > 0


@needs_nvrtc
def test_a_read_by_several_threads_before_a_write_is_a_race():
    body = """
        tile[threadIdx.x] = i;
        __syncthreads();
        float all = tile[0];
        SYNC
        if (threadIdx.x == n) tile[0] = 7;
        y[threadIdx.x] = all;"""
    for n in (0, 40):
        _, statistics = run_simple(body.replace("SYNC", ""), n=n, length=128)
        assert statistics.races > 0
        _, statistics = run_simple(body.replace("SYNC", "__syncthreads();"), n=n, length=128)
        assert statistics.races == 0


@needs_nvrtc
@pytest.mark.parametrize("body, message", [
    ("if (threadIdx.x < 32) __syncthreads(); y[0] = 1;", "others never reach|have exited"),
    ("if (threadIdx.x % 2) __syncthreads(); y[0] = 1;", "some threads of a warp"),
    ("if (i < 40) y[i] = warp_sum(x[i]);", "mask"),
    ("uint32_t r[4]; if (i < 40) { tile[i] = 1; ldmatrix_x4(r, tile); y[i] = r[0]; }", "some thr"),
    ("if (x[i % 4] > 1) __trap();", "trap"),
])  # fmt: skip
def test_threads_that_miss_what_all_must_do(body, message):
    with pytest.raises(ptx.KernelError, match=message):
        run_simple(body)


@needs_nvrtc
def test_atomic_sums():
    body = """
        if (threadIdx.x == 0) tile[0] = 0;
        __syncthreads();
        atomicAdd(&tile[0], (float)threadIdx.x);
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(&y[1], tile[0]);"""
    x, y = np.zeros(2, np.float32), np.zeros(2, np.float32)
    kernel = Inline(SIMPLE.replace("BODY", body))
    statistics = ptx.run(launch(kernel, x, y, np.int32(0), grid=(3, 1, 1)))
    assert y[1] == 3 * 127 * 64 and statistics.races == 0


@needs_nvrtc
def test_local_memory_is_an_error():
    with pytest.raises(ptx.KernelError, match="local memory"):
        run_simple("float a[8]; for (int j = 0; j < 8; j++) a[j] = x[j]; y[i] = a[n & 7];")


@needs_nvrtc
@pytest.mark.parametrize("arguments, message", [
    (lambda x: (x, x), "2 arguments for 3"),
    (lambda x: (x, x, np.int64(1)), "argument 2 is int64"),
    (lambda x: (x, x, np.float32(1)), "argument 2 is float32"),
    (lambda x: (x, np.int32(0), np.int32(1)), "argument 1 is int32"),
    (lambda x: (x, x, 1), "of type int"),
    (lambda x: (x, x[::2], np.int32(1)), "contiguous"),
])  # fmt: skip
def test_arguments_are_checked(arguments, message):
    kernel = Inline(SIMPLE.replace("BODY", "if (i < n) y[i] = x[i];"))
    with pytest.raises(ptx.KernelError, match=message):
        ptx.run(launch(kernel, *arguments(np.zeros(128, np.float32))))


@needs_nvrtc
def test_a_null_pointer_may_be_passed_but_not_read():
    kernel = Inline(SIMPLE.replace("BODY", "if (i < n) y[i] = x ? x[i] : 5;"))
    y = np.zeros(100, np.float32)
    ptx.run(launch(kernel, None, y, np.int32(100)))
    assert (y == 5).all()
    kernel = Inline(SIMPLE.replace("BODY", "if (i < n) y[i] = x[i];"))
    with pytest.raises(ptx.KernelError, match="outside every array"):
        ptx.run(launch(kernel, None, y, np.int32(100)))


@needs_nvrtc
def test_copies_of_zeros_read_nothing():
    body = """
        copy_async(&tile[4 * threadIdx.x % 128], x + 4 * i, i < n);
        commit_async();
        wait_async<0>();
        y[i] = tile[4 * threadIdx.x + 3];"""
    y, _ = run_simple(body, n=25, length=100, block=32)
    np.testing.assert_array_equal(y[:32], [*np.arange(3, 100, 4), *np.zeros(7)])
    with pytest.raises(ptx.KernelError, match=r"cp\.async"):
        run_simple(body, n=26, length=100, block=32)


# Launches that overlap

WAITING = """
extern "C" __global__ void SYMBOL(test)(const value *x, const value *w, value *y) {
    float a = to_float(w[threadIdx.x]);
    BEFORE
    wait_for_previous();
    y[threadIdx.x] = from_float(to_float(x[threadIdx.x]) + a);
}
"""


@needs_nvrtc
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("before", ["", "a += to_float(x[threadIdx.x]);", "y[threadIdx.x] = x[0];"])
def test_only_weights_are_touched_before_the_wait(rng, before, arch):
    x, w, y = (rng.standard_normal(32).astype(np.float32) for _ in range(3))
    kernel = Inline(WAITING.replace("BEFORE", before), "test_f32", "F32")
    one = launch(kernel, x, w, y, block=32)
    if before and arch == "90":
        with pytest.raises(ptx.KernelError, match=r"touched before griddepcontrol\.wait"):
            ptx.run(one, arch)
    else:
        ptx.run(one, arch)
        np.testing.assert_array_equal(y, x + w if not before.startswith("a +=") else x + (w + x))
