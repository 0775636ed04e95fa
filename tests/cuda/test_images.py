"""cuda_images.py: its kernels on the CPU, against reference.py, reference_resize.py and Pillow."""

from functools import partial

import numpy as np
import PIL.Image
import pytest
from cuda import gate, ptx, shim

from npclip import cuda_images
from npclip.kernels import reference, reference_resize
from npclip.preprocess import OPENAI_MEAN, OPENAI_STD, preprocess
from npclip.weights import to_bfloat16

DTYPES = ["f16", "bf16", "f32"]
NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}
ROUNDING = {"f16": 2**-11, "bf16": 2**-8, "f32": 2**-23}
TABLE = reference_resize.normalize_table(OPENAI_MEAN, OPENAI_STD)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def aligned(array):
    """A copy whose address is a multiple of 256, and of nothing greater by chance."""
    memory = np.empty(array.nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def poisoned(shape, dtype):
    """NaN, or 255, everywhere."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return aligned(np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape))


def as_kind(x, kind):
    return aligned(to_bfloat16(x) if kind == "bf16" else x.astype(NUMPY[kind]))


def widened(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def expected_windows(x, k, stride, width):
    """What conv2d multiplies: that of a weight which takes out every value."""
    size = k * k * x.shape[3]
    weight = np.eye(size, dtype=np.float32).reshape(size, k, k, x.shape[3])
    rows = reference.conv2d(widened(x).astype(np.float32), weight, None, stride).reshape(-1, size)
    return np.pad(rows, ((0, 0), (0, width - size)))


WINDOWS = [  # batch, height, width, channels, k, stride
    (2, 9, 9, 3, 3, 2),  # the stem
    (1, 8, 5, 16, 3, 1),
    (3, 4, 6, 8, 3, 2),
    (2, 3, 3, 24, 1, 2),
    (1, 1, 1, 8, 3, 1),
    (1, 7, 2, 5, 5, 1),
    (1, 3, 40, 12, 3, 1),
]


def check_windows(run, shape, kind, rng):
    *x_shape, k, stride = shape
    x = as_kind(rng.standard_normal(x_shape, np.float32), kind)
    width = -(-k * k * x_shape[3] // 16) * 16
    expected = expected_windows(x, k, stride, width)
    rows = poisoned(expected.shape, x.dtype)
    run(cuda_images.windows(x, k, stride, rows))
    assert (widened(rows) == expected).all()


@pytest.mark.parametrize("shape", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_windows(shape, kind, rng):
    check_windows(partial(shim.run, order=3), shape, kind, rng)


@pytest.mark.parametrize("shape", WINDOWS[:3], ids=str)
@pytest.mark.parametrize("arch", ["75", "80", "90"])
def test_windows_in_ptx(shape, arch, rng):
    check_windows(partial(ptx.run, arch=arch), shape, "f16", rng)


POOLS = [(2, 4, 6, 16, 2), (1, 7, 7, 8, 7), (3, 6, 3, 5, 3), (1, 2, 2, 2560, 2), (2, 3, 3, 12, 1)]


def check_pool(run, shape, kind, rng):
    *x_shape, k = shape
    x = as_kind(rng.standard_normal(x_shape, np.float32), kind)
    expected = reference.avg_pool2d(widened(x).astype(np.float64), k)
    y = poisoned(expected.shape, x.dtype)
    run(cuda_images.avg_pool2d(x, k, y))
    sums = reference.avg_pool2d(np.abs(widened(x)).astype(np.float64), k)  # of float, each rounded
    allowed = ROUNDING[kind] * np.abs(expected) + k * k * 2**-24 * sums + 2**-25
    assert (np.abs(widened(y) - expected) <= allowed).all()


@pytest.mark.parametrize("shape", POOLS, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_avg_pool2d(shape, kind, rng):
    check_pool(shim.run, shape, kind, rng)


@pytest.mark.parametrize("shape", POOLS[:3], ids=str)
@pytest.mark.parametrize("arch", ["75", "90"])
def test_avg_pool2d_in_ptx(shape, arch, rng):
    check_pool(lambda launch: ptx.run(launch, arch), shape, "f16", rng)


@pytest.mark.parametrize("sanitizer", shim.SANITIZERS)
def test_sanitized(sanitizer, rng):
    run = partial(shim.run, sanitizer=sanitizer)
    for shape in (WINDOWS[0], WINDOWS[2]):
        check_windows(run, shape, "f16", rng)
    for shape in (POOLS[0], POOLS[2]):
        check_pool(run, shape, "f16", rng)
    batch, old, *arguments, channels = RESIZES[0]
    images = noise(rng, batch, *old, channels)
    assert (resized(run, images, *arguments) == by_reference(images, *arguments)).all()


def resized(run, images, new, corner, size, interpolation="bicubic", kind="f32"):
    plan = cuda_images.resize_plan(images.shape[2:0:-1], new, corner, size, interpolation)
    scratch = poisoned(plan.scratch_shape(len(images)), np.uint8)
    out = poisoned((len(images), 3, size, size), NUMPY[kind])
    axes = aligned(plan.x_axis), aligned(plan.y_axis)
    launches = cuda_images.resize(aligned(images), plan, *axes, aligned(TABLE), scratch, out)
    assert len(launches) == 2
    for launch in launches:
        run(launch)
    return out


def noise(rng, batch, width, height, channels=3):
    """Of full contrast in its right half, so that sums are clipped at both ends."""
    images = rng.integers(0, 256, (batch, height, width, channels), dtype=np.uint8)
    images[:, :, width // 2 :] = np.where(images[:, :, width // 2 :] > 127, 255, 0)
    return images


def by_reference(images, *arguments):
    (width, height), (left, top), size, interpolation = arguments
    return np.stack(
        [
            reference_resize.resize(
                image[..., :3], TABLE, width, height, left, top, size, interpolation
            )
            for image in images
        ]
    )


RESIZES = [  # batch, old, new, corner, size, interpolation, channels
    (1, (37, 53), (16, 22), (0, 3), 16, "bicubic", 3),
    (2, (37, 53), (64, 91), (0, 14), 64, "bicubic", 4),
    (1, (53, 37), (45, 32), (6, 0), 32, "bilinear", 3),
    (1, (640, 427), (67, 45), (11, 0), 45, "bicubic", 3),
    (1, (45, 45), (45, 45), (0, 0), 45, "bicubic", 3),  # both passes are skipped
    (1, (45, 60), (45, 60), (0, 7), 45, "bicubic", 4),
    (3, (20, 20), (224, 224), (0, 0), 224, "bicubic", 3),  # two tiles
    (1, (64, 8), (32, 32), (0, 0), 32, "bilinear", 4),  # squashed
    (1, (9, 30), (30, 100), (0, 35), 30, "bicubic", 3),  # tall
    (1, (3000, 3), (7, 7), (0, 0), 7, "bicubic", 3),  # wide
    (1, (1, 1), (1, 1), (0, 0), 1, "bicubic", 3),
]


@pytest.mark.parametrize("case", RESIZES, ids=str)
def test_resize(case, rng):
    batch, old, *arguments, channels = case
    images = noise(rng, batch, *old, channels)
    found = resized(shim.run, images, *arguments)
    differing = np.argwhere(found != by_reference(images, *arguments))
    assert not len(differing), f"{len(differing)} values differ, first {differing[0]}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_resize_rounds_the_table(kind, rng):
    images, arguments = noise(rng, 1, 31, 20), ((18, 12), (3, 0), 12, "bicubic")
    found = resized(shim.run, images, *arguments, kind)
    assert (found == as_kind(by_reference(images, *arguments), kind)).all()


@pytest.mark.parametrize("case", RESIZES[:3], ids=str)
@pytest.mark.parametrize("arch", ["75", "90"])
def test_resize_in_ptx(case, arch, rng):
    batch, old, *arguments, channels = case
    images, statistics = noise(rng, batch, *old, channels), []
    found = resized(lambda launch: statistics.append(ptx.run(launch, arch)), images, *arguments)
    assert (found == by_reference(images, *arguments)).all()
    assert all(s.races == s.uninitialised == 0 for s in statistics)


@pytest.mark.parametrize("old", [(640, 427), (224, 224), (100, 130), (300, 224)])
def test_resize_equals_pillow(old, rng):
    (image,) = noise(rng, 1, *old)
    scale = 224 / min(old)
    new = tuple(int(scale * side) for side in old)
    corner = tuple(round((side - 224) / 2) for side in new)
    expected = preprocess(PIL.Image.fromarray(image), 224)
    assert reference_resize.is_x_first(old, new)
    assert (resized(shim.run, image[None], new, corner, 224)[0] == expected).all()


def test_tiles_fit_in_shared_memory():
    for old, size in [
        ((16384, 100), 1),
        ((16384, 100), 2),
        ((16384, 9000), 224),
        ((640, 427), 224),
    ]:
        plan = cuda_images.resize_plan(old, (size, size), (0, 0), size, "bicubic")
        assert plan.columns <= cuda_images.MAX_COLUMNS
        for begin in range(0, size, plan.tile):
            end = min(begin + plan.tile, size)
            reach = int(plan.x_axis[0, end - 1]) + len(plan.x_axis) - 1
            assert reach - plan.x_axis[0, begin] <= plan.columns
            assert reach <= old[0]
    assert cuda_images.resize_plan((640, 427), (335, 224), (56, 0), 224).tile == 128


@pytest.mark.parametrize("old", [(20000, 10), (10, 70000)])
def test_too_large(old):
    with pytest.raises(ValueError, match="too large"):
        cuda_images.resize_plan(old, (1, 1), (0, 0), 1)


KERNELS = {
    (launch.kernel.dtype, launch.kernel.file, launch.kernel.defines): launch.kernel
    for kind in DTYPES
    for channels in (3, 8)
    for x in [np.zeros((1, 2, 2, channels), NUMPY[kind])]
    for launch in [
        cuda_images.windows(x, 3, 1, np.zeros((4, 80), NUMPY[kind])),
        cuda_images.resize(
            np.zeros((1, 2, 2, 3), np.uint8),
            cuda_images.resize_plan((2, 2), (2, 2), (0, 0), 2),
            *(np.zeros((2, 2), np.int32),) * 2,
            TABLE,
            None,
            np.zeros((1, 3, 2, 2), NUMPY[kind]),
        )[0],
    ]
}


@gate.each_cuda
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=["-".join(map(str, k)) for k in KERNELS])
def test_compiles_without_spills(kernel, cuda):
    gate.assert_compiles(kernel, cuda)
