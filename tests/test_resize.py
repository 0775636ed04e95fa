"""The resize against Pillow, to the bit: kernels/reference_resize.py, and resize.c on every ISA."""

import secrets
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest

from npclip import cpu_library
from npclip.kernels import reference_resize
from npclip.kernels.reference_resize import (
    axis_tables,
    coefficients,
    is_x_first,
    scratch_bytes,
)
from npclip.preprocess import OPENAI_MEAN, OPENAI_STD

FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}
TABLE = reference_resize.normalize_table(OPENAI_MEAN, OPENAI_STD)
GUARD = 4096  # bytes on either side of what a kernel may write

# (width, height) of the image, size of the output, how it is resized
EDGES = [
    ((1, 1), 1, "shortest"),
    ((1, 1), 224, "shortest"),
    ((1, 2000), 7, "shortest"),
    ((2000, 1), 7, "shortest"),
    ((1, 2000), 16, "squash"),
    ((2000, 1), 16, "squash"),
    ((2, 3), 2, "shortest"),
    ((3, 5), 33, "shortest"),
    ((5, 4), 3, "shortest"),
    ((6, 7), 1, "shortest"),
    ((7, 6), 5, "squash"),
    ((224, 224), 224, "shortest"),
    ((224, 300), 224, "shortest"),
    ((301, 224), 224, "shortest"),
    ((224, 100), 224, "squash"),  # the pass in x is skipped
    ((100, 224), 224, "squash"),  # the pass in y is skipped
    ((223, 225), 224, "shortest"),
    ((448, 448), 224, "shortest"),
    ((640, 427), 224, "shortest"),
    ((1024, 768), 224, "shortest"),
    ((1999, 17), 17, "shortest"),
    ((17, 1999), 64, "squash"),
    ((2000, 1500), 1, "squash"),
    ((1777, 2000), 13, "shortest"),
    ((40, 30), 1000, "shortest"),
]


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)  # shown if the test fails
    return np.random.default_rng(seed)


@pytest.fixture(params=["avx2", "avx512"])
def resize_u8(request):
    """The C function resize_u8_{isa}."""
    if reason := cpu_library.why_unavailable():
        pytest.skip(f"no C kernels: {reason}")
    if request.param not in cpu_library.machine_isas():
        pytest.skip(f"this machine has no {request.param}")
    return cpu_library.kernel("resize", "u8", request.param)


def geometry(old, size, resize):
    """width, height, left, top as npclip.preprocess chooses them"""
    width, height = (size if resize == "squash" else int(size * n / min(old)) for n in old)
    return width, height, round((width - size) / 2), round((height - size) / 2)


def pillow(image, width, height, left, top, size, interpolation):
    """x, then y; Pillow itself chooses the order where it does both in one go"""
    resized = PIL.Image.fromarray(image).resize((width, image.shape[0]), FILTERS[interpolation])
    resized = resized.resize((width, height), FILTERS[interpolation])
    levels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return np.stack([TABLE[c][levels[..., c]] for c in range(3)])


def guarded(bytes_, rng):
    """Memory of that many bytes, and a function that tells whether only that was written."""
    memory = rng.integers(0, 256, bytes_ + 2 * GUARD + 64, dtype=np.uint8)
    start = GUARD + int(rng.integers(64)) // 4 * 4  # floats are aligned
    before = memory.copy()
    inside = memory[start : start + bytes_]

    def intact():
        rest = np.ones(len(memory), bool)
        rest[start : start + bytes_] = False
        return (memory == before)[rest].all()

    return inside, intact


def run(resize_u8, image, geometry, size, interpolation, rng, bands=(0, 1)):
    """resize_u8 of an image [H, W, 3 or 4], whole or in bands, which end at these shares of it."""
    height, width, channels = image.shape
    x = axis_tables(width, geometry[0], geometry[2], size, interpolation)
    y = axis_tables(height, geometry[1], geometry[3], size, interpolation)
    out, out_intact = guarded(4 * 3 * size * size, rng)
    scratch, scratch_intact = guarded(scratch_bytes(x, y), rng)
    rows = [round(share * size) for share in bands]
    for begin, end in pairwise(rows):
        if begin == end:
            continue
        first = y[0] - y[0][begin]  # counts from the band's first row
        last = 2 * int(y[0][end - 1]) + 2 * y[1].shape[1]
        strip = image[2 * int(y[0][begin]) : last]
        resize_u8(
            strip.ctypes.data, strip.strides[0], channels, len(strip), width,
            x[0].ctypes.data, x[1].ctypes.data, x[1].shape[1],
            first.ctypes.data, y[1].ctypes.data, y[1].shape[1], size, begin, end,
            TABLE.ctypes.data, scratch.ctypes.data, out.ctypes.data,
        )  # fmt: skip
    assert out_intact() and scratch_intact()
    return out.view(np.float32).reshape(3, size, size)


def random_side(rng, largest):
    return int(np.exp(rng.uniform(0, np.log(largest + 0.999))))


def random_case(rng, largest=2000):
    """((width, height), size, resize, interpolation): every order of magnitude alike."""
    while True:
        old = random_side(rng, largest), random_side(rng, largest)
        size, resize = random_side(rng, 500), str(rng.choice(["shortest", "squash"]))
        width, height = geometry(old, size, resize)[:2]
        if max(old[0] * old[1], width * height) < 3e6:
            return old, size, resize, str(rng.choice(list(FILTERS)))


def random_image(rng, width, height, channels=3):
    """Noise, of full contrast half of the time, so that sums are clipped at both ends."""
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if rng.random() < 0.5 else image


def assert_equal(actual, expected, *case):
    different = actual != expected
    assert actual.shape == expected.shape and not different.any(), (
        f"{case}: {different.sum()} values differ, the first at {np.argwhere(different)[0]}"
    )


# The reference


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("old", "size", "resize"), EDGES)
def test_reference_is_pillow_at_the_edges(old, size, resize, interpolation, rng):
    image, where = random_image(rng, *old), geometry(old, size, resize)
    actual = reference_resize.resize(image, TABLE, *where, size, interpolation)
    assert_equal(actual, pillow(image, *where, size, interpolation))


def test_reference_is_pillow_at_random_sizes(rng):
    for _ in range(150):
        old, size, resize, interpolation = case = random_case(rng, 700)
        image, where = random_image(rng, *old), geometry(old, size, resize)
        actual = reference_resize.resize(image, TABLE, *where, size, interpolation)
        assert_equal(actual, pillow(image, *where, size, interpolation), case)


def test_table_is_to_tensor_and_normalize():
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    for c in range(3):
        expected = (levels - np.float32(OPENAI_MEAN[c])) / np.float32(OPENAI_STD[c])
        assert TABLE.dtype == np.float32 and (TABLE[c] == expected).all()


def test_tables_hold_the_coefficients(rng):
    for _ in range(300):
        old, new = random_side(rng, 2000), random_side(rng, 2000)
        start = int(rng.integers(new))
        size = int(rng.integers(1, new - start + 1))
        interpolation = str(rng.choice(list(FILTERS)))
        first, k = coefficients(old, new, start, size, interpolation)
        first_pair, packed = axis_tables(old, new, start, size, interpolation)
        pairs, taps = packed.shape[1], k.shape[1]
        assert first.min() >= 0 and (first + taps).max() <= old
        assert first_pair.min() >= 0 and (first_pair + pairs).max() <= (old + 1) // 2
        assert (np.diff(first_pair) >= 0).all()

        low, high = np.moveaxis(packed.view(np.int16).reshape(size, pairs, 2, 2), 2, 0)
        row = (low + (high.astype(np.int32) << 16)).reshape(size, -1)
        for i in range(size):
            shift = first[i] - 2 * first_pair[i]
            assert (row[i, shift : shift + taps] == k[i]).all()
            assert np.count_nonzero(row[i]) == np.count_nonzero(k[i])
        assert (np.abs(k).sum(1) < 1 << 23).all()  # so sums of 255 times them fit in 32 bits


def test_a_crop_has_the_coefficients_of_the_whole(rng):
    for _ in range(100):
        old, new = random_side(rng, 2000), random_side(rng, 2000)
        start = int(rng.integers(new))
        first, k = coefficients(old, new, 0, new, "bicubic")
        cut_first, cut_k = coefficients(old, new, start, 1, "bicubic")
        whole, cut = np.zeros((2, old), np.int64)
        whole[first[start] : first[start] + k.shape[1]] = k[start]
        cut[cut_first[0] : cut_first[0] + cut_k.shape[1]] = cut_k[0]
        assert (whole == cut).all()


def test_pillow_does_x_first_where_is_x_first_says_so(rng):
    y_first = 0
    for _ in range(300):
        old, new = ((random_side(rng, 400), random_side(rng, 400)) for _ in range(2))
        image, resample = PIL.Image.fromarray(random_image(rng, *old)), FILTERS["bicubic"]
        x_first = image.resize((new[0], old[1]), resample).resize(new, resample)
        same = np.asarray(image.resize(new, resample)) == np.asarray(x_first)
        assert same.all() or not is_x_first(old, new), (old, new)
        y_first += not is_x_first(old, new)
    assert y_first < 200


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((640, 480), (298, 224), True),
        ((480, 960), (224, 448), True),  # 512 lines are 2 x 256 columns
        ((480, 961), (224, 448), False),
        ((1080, 2400), (224, 497), False),
        ((100, 400), (224, 896), True),  # becomes larger
        ((224, 5000), (224, 224), True),  # along y alone
        ((3, 400), (1, 399), False),  # 101 widths and more
    ],
)
def test_is_x_first(old, new, expected):
    assert is_x_first(old, new) == expected


# The kernel


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(("old", "size", "resize"), EDGES)
def test_kernel_is_pillow_at_the_edges(resize_u8, old, size, resize, channels, rng):
    where = geometry(old, size, resize)
    for interpolation in FILTERS:
        image = random_image(rng, *old, channels)
        actual = run(resize_u8, image, where, size, interpolation, rng)
        rgb = np.ascontiguousarray(image[..., :3])
        assert_equal(actual, pillow(rgb, *where, size, interpolation), interpolation)


def test_kernel_is_pillow_at_random_sizes(resize_u8, rng):
    for _ in range(250):
        old, size, resize, interpolation = case = random_case(rng)
        image = random_image(rng, *old, int(rng.integers(3, 5)))
        where = geometry(old, size, resize)
        actual = run(resize_u8, image, where, size, interpolation, rng)
        rgb = np.ascontiguousarray(image[..., :3])
        assert_equal(actual, pillow(rgb, *where, size, interpolation), case)


def test_kernel_is_the_reference(resize_u8, rng):
    image, where = random_image(rng, 300, 200), geometry((300, 200), 96, "shortest")
    expected = reference_resize.resize(image, TABLE, *where, 96)
    assert_equal(run(resize_u8, image, where, 96, "bicubic", rng), expected)


def test_rows_in_bands_and_with_gaps(resize_u8, rng):
    for _ in range(60):
        old, size, resize, interpolation = case = random_case(rng, 600)
        where, bands = geometry(old, size, resize), [0, *np.sort(rng.random(5)), 1]
        memory = random_image(rng, old[0] + int(rng.integers(9)), 2 * old[1])
        image = memory[:: int(rng.choice([1, 2])), : old[0]][: old[1]]
        actual = run(resize_u8, image, where, size, interpolation, rng, bands)
        rgb = np.ascontiguousarray(image)
        assert_equal(actual, pillow(rgb, *where, size, interpolation), case, bands)


def test_rows_outside_the_band_are_left_alone(resize_u8, rng):
    image, where = random_image(rng, 90, 70), geometry((90, 70), 32, "shortest")
    actual = run(resize_u8, image, where, 32, "bicubic", rng, (0.25, 0.75))
    expected = pillow(image, *where, 32, "bicubic")
    assert_equal(actual[:, 8:24], expected[:, 8:24])
    assert not np.isin(actual[:, [0, 7, 24, 31]].view(np.uint32), expected.view(np.uint32)).all()
