"""attention.cu against kernels/reference.py in float64, on the shim, as PTX, and through NVRTC.

The rule: a kernel errs by at most one rounding of its dtype and twice what the reference errs in
float32 where it rounds the weights of the keys as the kernel does; and twice what one rounding of
the largest score does, since few queries may be lucky in the reference. Rows outside the sequences
are NaN in the inputs, so that reading one shows, and must stay NaN in the results.
"""

from itertools import pairwise

import numpy as np
import pytest
from cuda import gate, ptx, shim

from npclip import cuda_attention
from npclip.cuda_launch import Launch
from npclip.kernels import reference
from npclip.weights import from_bfloat16, to_bfloat16

EPSILON = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}  # half of a step between values
TINY = {"f16": 2.0**-25, "bf16": 0.0, "f32": 0.0}  # the same of subnormal values
OUTSIDE = 2  # rows before the first and after the last sequence
HEADS = 2


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def on_shim(order=0):
    def run(launch: Launch) -> None:
        statistics = shim.run(launch, order=order)
        assert statistics.bank_conflicts == 0

    return run


def on_ptx(arch, other_conflicts=None):
    """other_conflicts: how many there may be, None: any number"""

    def run(launch: Launch) -> None:
        statistics = ptx.run(launch, arch)
        assert statistics.races == 0, statistics.race_at
        assert statistics.uninitialised == 0
        assert statistics.bank_conflicts == 0
        assert other_conflicts is None or statistics.other_conflicts <= other_conflicts

    return run


def narrow(x, kind):
    """As a kernel of that kind stores it."""
    if kind == "bf16":
        return to_bfloat16(np.asarray(x, np.float32))
    return np.ascontiguousarray(x, {"f16": np.float16, "f32": np.float32}[kind])


def widen(x, dtype=np.float64):
    return (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(dtype)


def rounded(x, kind):
    return widen(narrow(x, kind), np.float32)


def baselines(q, k, v, kind, causal):
    """Attention of one head in float32, whose weights are rounded to a kind before they weigh.

    For the largest weight being 1, 2^1/4, 2^1/2 and 2^3/4: a kernel may weigh by any score that it
    has seen, and the rounding of a weight of 1, which is exact, says nothing of another.
    """
    s = q @ k.T * np.float32(q.shape[1] ** -0.5)
    if causal:
        s[np.triu_indices(len(s), 1)] = -np.inf
    weights = np.exp(s - s.max(1, keepdims=True))
    scaled = [weights * np.float32(2 ** (i / 4)) for i in range(4)]
    return np.array([rounded(w, kind) @ v / w.sum(1, keepdims=True) for w in scaled])


def rounding_of_scores(q, k, v):
    """What o can be off where the largest score of one head is off by a rounding to float32."""
    largest = np.abs(q @ k.T).max() * q.shape[1] ** -0.5
    return 2.0**-24 * largest * np.abs(v).max()


def assert_close(found, wanted, base, kind, scores):
    error, slack = np.abs(widen(found) - wanted), 2 * np.abs(base - wanted).max(initial=0)
    slack += 2 * scores
    slack += 4 * 2.0**-24 * np.abs(wanted).max(initial=0)
    bound = slack + EPSILON[kind] * (np.abs(wanted) + slack) + TINY[kind]
    assert np.isfinite(error).all(), "reads what is not its own, or leaves something unwritten"
    assert (error <= bound).all(), f"error {error.max():.3g}, slack {slack:.3g}"


def sequences(lengths):
    """cu_seqlens, and the number of rows."""
    seqs = np.cumsum([OUTSIDE, *lengths], dtype=np.int32)
    return seqs, int(seqs[-1]) + OUTSIDE


def packed(rng, kind, seqs, n, width, scale):
    x = np.full((n, width), np.nan, np.float32)
    x[seqs[0] : seqs[-1]] = rng.standard_normal((seqs[-1] - seqs[0], width)) * scale
    return narrow(x, kind)


def check_attention(run, rng, kind, width, lengths, causal=False, scale=1.0, longest=None,
                    few_blocks=(0, cuda_attention.FEW_BLOCKS)):  # fmt: skip
    """few_blocks: with which FEW_BLOCKS; 0: as if there were many sequences."""
    longest = longest or max(lengths)
    if longest <= cuda_attention.SHORT_KEYS[-1] or width > 64 or kind == "f32":
        few_blocks = few_blocks[:1]  # it makes no difference
    for few in few_blocks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_attention, "FEW_BLOCKS", few)
            check_one_attention(run, rng, kind, width, lengths, causal, scale, longest)


def check_one_attention(run, rng, kind, width, lengths, causal, scale, longest):
    seqs, n = sequences(lengths)
    qkv = packed(rng, kind, seqs, n, 3 * HEADS * width, scale)
    o = narrow(np.full((n, HEADS * width), np.nan), kind)
    run(cuda_attention.attention(qkv, seqs, o, HEADS, longest, causal))
    inside = slice(seqs[0], seqs[-1])
    assert np.isnan(widen(o[: seqs[0]])).all()
    assert np.isnan(widen(o[seqs[-1] :])).all()
    filled = np.append(0, np.cumsum([length for length in lengths if length]))
    if len(filled) == 1:
        return
    wanted = reference.attention(widen(qkv[inside]), filled, HEADS, causal)
    heads = widen(qkv[inside], np.float32).reshape(-1, 3, HEADS, width)
    base = np.empty((4, len(heads), HEADS, width), np.float32)
    rounding = "f32" if width % 8 else kind  # on tensor cores only
    scores = 0.0
    for i, j in pairwise(filled):
        for head in range(HEADS):
            q, k, v = heads[i:j, :, head].transpose(1, 0, 2)
            scores = max(scores, rounding_of_scores(q, k, v))
            base[:, i:j, head] = baselines(q, k, v, rounding, causal)
    assert_close(o[inside], wanted, base.reshape(4, *wanted.shape), kind, scores)


def check_pool(run, rng, kind, width, lengths, scale=1.0):
    seqs, n = sequences(lengths)
    kv = packed(rng, kind, seqs, n, 2 * HEADS * width, scale)
    q = narrow(rng.standard_normal((len(lengths), HEADS * width)) * scale, kind)
    o = narrow(np.full(q.shape, np.nan), kind)
    run(cuda_attention.attention_pool(q, kv, seqs, o, HEADS, max(lengths)))
    has_keys = np.array(lengths) > 0
    assert not o[~has_keys].any()
    if not has_keys.any():
        return
    filled = np.append(0, np.cumsum([length for length in lengths if length]))
    wanted, base = (
        reference.attention_pool(
            widen(q[has_keys], dtype), widen(kv[seqs[0] : seqs[-1]], dtype), filled, HEADS
        )
        for dtype in (np.float64, np.float32)
    )
    heads = widen(kv[seqs[0] : seqs[-1]]).reshape(-1, 2, HEADS, width)
    queries = widen(q[has_keys]).reshape(-1, HEADS, width)
    scores = max(
        rounding_of_scores(queries[b : b + 1, head], *heads[i:j, :, head].transpose(1, 0, 2))
        for b, (i, j) in enumerate(pairwise(filled))
        for head in range(HEADS)
    )
    assert_close(o[has_keys], wanted, base, kind, scores)


SHORT = [1, 2, 7, 15, 16, 17, 0, 50, 64, 65, 77, 80]  # all lengths where something changes
LONG = [1, 17, 0, 64, 65, 81, 197]
CASES = [
    ("f16", 64, [31, 32, 1]),
    ("f16", 16, [50, 64, 33]),
    *(
        (kind, width, SHORT)
        for kind, width in (("f16", 64), ("f16", 88), ("f16", 128), ("bf16", 64))
    ),
    *(("f16", width, LONG) for width in (8, 64, 80, 104, 128)),
    ("bf16", 64, LONG),
    ("f16", 33, [1, 31, 0, 33, 50, 81]),
    ("f32", 33, [1, 31, 32, 33, 65]),
    ("f32", 64, [50, 77, 0, 7]),
    ("f32", 128, [17, 64]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{max(c[2])}")
def test_attention(rng, case):
    kind, width, lengths = case
    for order, causal in ((0, False), (1, True), (7, False)):
        check_attention(on_shim(order), rng, kind, width, rng.permutation(lengths), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(rng, causal):
    check_attention(on_shim(), rng, "f16", 64, [257], causal)
    check_attention(on_shim(), rng, "f16", 64, [50, 1], causal, longest=257)


POOL_LENGTHS = [1, 2, 7, 0, 16, 17, 50, 65, 77, 197, 257]
POOL_CASES = [("f16", 64), ("f16", 80), ("f16", 33), ("bf16", 64), ("f32", 64), ("f32", 104)]


@pytest.mark.parametrize(("kind", "width"), POOL_CASES)
def test_attention_pool(rng, kind, width):
    for order in (0, 1, 7):
        check_pool(on_shim(order), rng, kind, width, rng.permutation(POOL_LENGTHS))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_scores_of_hundreds(rng, kind):
    """Their exponentials overflow where the maximum is not subtracted first."""
    for lengths in ([50, 77], [197]):
        check_attention(on_shim(), rng, kind, 64, lengths, scale=8.0)
    check_attention(on_shim(), rng, kind, 64, [77], True, scale=8.0)
    check_pool(on_shim(), rng, kind, 64, [1, 50, 197], scale=8.0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_scores_that_rise_and_fall(rng, kind):
    """What was summed is rescaled many times, or not at all."""
    rising = np.linspace(0.1, 6, 257)[:, None]
    for scale in (rising, rising[::-1]):
        check_attention(on_shim(), rng, kind, 64, [257], scale=scale)
        check_attention(on_shim(), rng, kind, 80, [60, 197], True, scale=scale)


def test_only_empty_sequences(rng):
    for longest in (1, 77, 257):
        check_attention(on_shim(), rng, "f16", 64, [0, 0], longest=longest)
    check_attention(on_shim(), rng, "f32", 64, [0, 0])
    check_pool(on_shim(), rng, "f16", 64, [0, 0])


def sanitized(sanitizer):
    return lambda launch: shim.run(launch, sanitizer=sanitizer)


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
def test_sanitized(rng, sanitizer):
    """Every variant once, causal and not."""
    run = sanitized(sanitizer)
    for causal in (False, True):
        check_attention(run, rng, "f16", 64, [50, 0, 3], causal)
        check_attention(run, rng, "f16", 80, [97, 1], causal)
        check_attention(run, rng, "f32", 64, [33, 1], causal)
    check_pool(run, rng, "f16", 64, [50, 0, 3])


@pytest.mark.parametrize(
    ("kind", "arch"), [(k, a) for k in EPSILON for a in ("75", "80", "90") if k + a != "bf1675"]
)
def test_as_compiled(rng, kind, arch):
    run = on_ptx(arch)
    check_attention(run, rng, kind, 64, [50, 0, 3])
    check_attention(run, rng, kind, 64, [66], causal=True)
    check_pool(run, rng, kind, 64, [50, 3, 0, 65])
    if kind == "f16":
        check_attention(run, rng, kind, 64, [3, 81])
        check_attention(run, rng, kind, 88, [81], causal=True)
        check_attention(run, rng, kind, 33, [33, 1])
        check_pool(run, rng, kind, 80, [7, 17])
        check_pool(run, rng, kind, 33, [20])


@pytest.fixture
def one_head(monkeypatch):
    """For what takes the interpreter long, and is the same in every head."""
    monkeypatch.setitem(globals(), "HEADS", 1)


@pytest.mark.usefixtures("one_head")
@pytest.mark.parametrize(
    ("kind", "arch"), [("f16", "75"), ("f16", "80"), ("bf16", "80"), ("f16", "90"), ("f32", "80")]
)
def test_heads_of_64_values_have_no_conflicts(rng, kind, arch):
    """Of CLIP's lengths, and no races either."""
    run = on_ptx(arch, other_conflicts=0)
    check_attention(run, rng, kind, 64, [50])
    few_blocks = (0, cuda_attention.FEW_BLOCKS) if kind + arch == "f1680" else (0,)
    if kind != "f32":  # takes long, and every tile is alike
        for length in (197, 257, *((577,) if arch == "90" else ())):
            check_attention(run, rng, kind, 64, [length], few_blocks=few_blocks)
        check_attention(run, rng, kind, 64, [77], causal=True)


@pytest.mark.usefixtures("one_head")
@pytest.mark.parametrize("arch", ["75", "90"])
@pytest.mark.parametrize("width", [80, 88, 104])
def test_few_conflicts_of_wider_heads(rng, width, arch):
    """At most one for every row that is copied to shared memory or stored."""
    length, padded, tiles = 257, 272, 5
    rows = tiles * 2 * padded + length
    check_attention(on_ptx(arch, HEADS * rows), rng, "f16", width, [length])
    rows = 3 * 80 + 77
    check_attention(on_ptx(arch, HEADS * rows), rng, "f16", width, [77], causal=True)
    check_pool(on_ptx(arch, HEADS * width), rng, "f16", width, [length])


def launch_of(kind, width, longest, count=1):
    """A launch for so many sequences up to that length; None: attention_pool."""
    seqs = np.zeros(1 + count, np.int32)
    qkv, kv, o = (narrow(np.zeros((1, parts * width)), kind) for parts in (3, 2, 1))
    if longest is None:
        return cuda_attention.attention_pool(o, kv, seqs, o, 1, 1)
    return cuda_attention.attention(qkv, seqs, o, 1, longest, False)


WIDTHS = 64, 80, 88, 104
LENGTHS = *cuda_attention.SHORT_KEYS, 257, 577, None  # None: attention_pool
# The widest of SHORT is the heaviest; 577 is 257's kernel.
SOME = LENGTHS if gate.EVERYTHING else (cuda_attention.SHORT_KEYS[-1], 257, None)
OF_BF16, OF_F32 = (WIDTHS[1:], WIDTHS) if gate.EVERYTHING else ((88,), (64, 104))
COMPILED = [
    *((kind, 64, x) for kind in ("f16", "bf16") for x in LENGTHS),
    *(("f16", width, x) for width in WIDTHS[1:] for x in SOME),
    *(("bf16", width, x) for width in OF_BF16 for x in SOME),
    *(("f32", width, x) for width in OF_F32 for x in (257, None)),
    ("f16", 128, 257),
]


def most_registers(kernel, width, longest, arch):
    """Enough of an SM's 65536 for 16 warps; 12 of LONG, 8 where shared memory or work is short."""
    if longest is None or longest <= cuda_attention.SHORT_KEYS[-1]:
        return 128 if width <= 112 else 160
    is_few = dict(kernel.defines).get("STEP", 16) > 16
    return 168 if width <= 112 and not is_few and arch in ("80", "90", "100") else 255


@gate.each_cuda
@pytest.mark.parametrize(("kind", "width", "longest"), COMPILED)
def test_compiles(kind, width, longest, cuda):
    counts = 1, cuda_attention.FEW_BLOCKS
    for kernel in {launch_of(kind, width, longest, count).kernel for count in counts}:
        for arch in gate.ARCHS:
            registers = most_registers(kernel, width, longest, arch)
            gate.assert_compiles(kernel, cuda, [arch], max_registers=registers)


def test_shared_memory_fits():
    """64 KB is what the oldest architecture has."""
    for kind in ("f16", "f32"):
        for width in range(1, cuda_attention.MAX_HEAD_WIDTH + 1):
            for longest in (*cuda_attention.SHORT_KEYS, 257, None):
                assert launch_of(kind, width, longest).shared <= 64 << 10


def test_too_wide_heads_are_refused():
    with pytest.raises(ValueError, match="129"):
        launch_of("f16", 129, 80)
