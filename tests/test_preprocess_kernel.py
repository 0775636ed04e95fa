"""The C kernel in preprocess.py: equal to Pillow there to the bit, and used where it may be."""

import gc
import io
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from PIL import _imaging

from npclip import cpu, cpu_library, pil_pixels
from npclip import preprocess as module
from npclip.errors import ImageError
from npclip.preprocess import preprocess

if reason := cpu_library.why_unavailable():
    pytest.skip(f"no C kernels: {reason}", allow_module_level=True)

ISAS = [isa for isa in cpu_library.machine_isas() if cpu_library.kernel("resize", "u8", isa)]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F"]
EXPORTS = tuple(map(int, PIL.__version__.split(".")[:2])) >= (11, 3)
needs_export = pytest.mark.skipif(not EXPORTS, reason="this Pillow exports no pixels")


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)  # shown if the test fails
    return np.random.default_rng(seed)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu_library, "isas", lambda: (request.param,))
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Of the kernel: (thread, image, begin, end) each."""
    made, resize = [], cpu.resize

    def recorded(image, x, y, begin, end, table, out):
        made.append((threading.get_ident(), image, begin, end))
        resize(image, x, y, begin, end, table, out)

    monkeypatch.setattr(cpu, "resize", recorded)
    return made


@pytest.fixture
def small_blocks():
    """Pillow divides images into blocks of at most 128 KiB, and the strips fit."""
    before = _imaging.get_block_size()
    _imaging.set_block_size(1 << 17)
    with mock.patch.object(module, "BLOCK_BYTES", 1 << 17):
        yield
    _imaging.set_block_size(before)


def noise(rng, width, height, channels=3):
    """Of full contrast half of the time, so that sums are clipped at both ends."""
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if rng.random() < 0.5 else image


def outcome(*arguments, **options):
    try:
        return preprocess(*arguments, **options)
    except ImageError as error:
        return error


def by_pillow(*arguments, **options):
    with mock.patch.object(module, "_has_kernels", lambda: False):
        return outcome(*arguments, **options)


def check(image, size=224, **options):
    actual, expected = outcome(image, size, **options), by_pillow(image, size, **options)
    if isinstance(expected, ImageError):
        assert str(actual) == str(expected)
        return
    what = getattr(image, "mode", None), getattr(image, "size", None), size, options
    assert actual.shape == (3, size, size) and actual.dtype == np.float32
    assert actual.flags.c_contiguous and actual.flags.writeable
    differing = np.argwhere(actual != expected)
    assert not len(differing), f"{what}: {len(differing)} values differ, first {differing[0]}"


def random_side(rng, largest):
    return int(np.exp(rng.uniform(0, np.log(largest + 0.999))))


def random_options(rng):
    options = {
        "size": random_side(rng, 400),
        "resize": str(rng.choice(["shortest", "squash"])),
        "interpolation": str(rng.choice(["bicubic", "bilinear"])),
    }
    if rng.random() < 0.3:
        options |= {"mean": rng.random(3), "std": rng.random(3) + 0.1}
    return options


def encoded(image, file_format):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    buffer.seek(0)
    return PIL.Image.open(buffer)


def random_source(rng, width, height):
    """An RGB image, or an array of one, by one of the ways that lead to one."""
    array = noise(rng, width, height)
    image = PIL.Image.fromarray(array)
    kind = rng.integers(7)
    if kind == 0:
        return encoded(image, "PNG")
    if kind == 1:
        return encoded(image, "JPEG")
    if kind == 2:
        left, top = int(rng.integers(width)), int(rng.integers(height))
        return image.crop((left, top, width, height))
    if kind == 3:
        return image.transpose(PIL.Image.Transpose.ROTATE_90)
    return array if kind < 6 else image


# Equal to Pillow


def test_random_rgb(isa, calls, rng):
    for _ in range(300):
        width, height = random_side(rng, 2000), random_side(rng, 2000)
        if width * height < 2_000_000:
            check(random_source(rng, width, height), **random_options(rng))
    assert len(calls) > 40


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, calls, rng):
    for _ in range(15):
        width, height = rng.integers(1, 200, 2)
        image = PIL.Image.fromarray(noise(rng, width, height)).convert("RGB")
        image = image.convert(mode) if mode not in ("PA", "RGBa") else image.convert("RGBA")
        image = image.quantize() if mode == "PA" else image
        check(image if mode != "RGBa" else image.convert("RGBa"), **random_options(rng))
    assert bool(calls) == (mode == "RGB" and EXPORTS)


@pytest.mark.parametrize(
    "old",
    [(1, 1), (1, 300), (300, 1), (224, 224), (224, 300), (300, 224), (224, 1), (1, 224), (223, 225),
     (448, 448), (16384, 2), (16384, 300), (2, 16384), (5000, 40), (40, 5000), (2000, 2000)],
)  # fmt: skip
def test_edges(old, isa, rng):
    array = noise(rng, *old)
    for image in (array, PIL.Image.fromarray(array)):
        for size in (1, 32, 224):
            for resize in ("shortest", "squash"):
                for interpolation in ("bicubic", "bilinear"):
                    check(image, size, resize=resize, interpolation=interpolation)


ARRAYS = {
    "plain": lambda a: a,
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.uint8).reshape(a.shape),
    "odd address": lambda a: np.frombuffer(b"?" + a.tobytes(), np.uint8)[1:].reshape(a.shape),
    "every other row": lambda a: a[::2],
    "some columns": lambda a: a[:, 5:70],
    "upside down": lambda a: a[::-1],
    "mirrored": lambda a: a[:, ::-1],
    "every other column": lambda a: a[:, ::2],
    "BGR": lambda a: a[..., ::-1],
    "RGB of RGBA": lambda a: np.concatenate([a, a], axis=2)[..., :3],
    "transposed": lambda a: a.transpose(1, 0, 2),
    "channels first": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "one row": lambda a: np.broadcast_to(a[:1], a.shape),
    "one pixel": lambda a: np.broadcast_to(a[:1, :1], a.shape),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_strides(kind, isa, calls, rng):
    array = ARRAYS[kind](noise(rng, 161, 101))
    before = array.copy()
    for size in (24, 200):
        check(array, size, resize="squash")
    assert len(calls) == 2 and (array == before).all()


@needs_export
@pytest.mark.parametrize("old", [(2400, 1800), (2100, 2100), (5000, 1000), (16384, 300)])
def test_images_of_several_blocks(old, isa, calls, rng):
    image = PIL.Image.fromarray(noise(rng, *old))
    assert pil_pixels.view(image) is None
    check(image)
    assert [begin for _, _, begin, _ in calls] == [0, *(end for *_, end in calls)][:-1]
    assert calls[-1][3] == 224
    calls.clear()
    check(image, interpolation="bilinear", resize="squash")
    assert len(calls) > 1


@needs_export
def test_random_images_of_several_blocks(small_blocks, isa, calls, rng):
    several = 0
    for _ in range(150):
        width, height = (int(side) for side in rng.integers(1, 700, 2))
        calls.clear()
        check(PIL.Image.fromarray(noise(rng, width, height)), **random_options(rng))
        several += len(calls) > 1
    assert several > 20


# Used where it may be, and nowhere else


@needs_export
def test_images_are_read_where_they_lie(calls, rng):
    image = PIL.Image.fromarray(noise(rng, 300, 200))
    preprocess(image, 50)
    [(thread, pixels, begin, end)] = calls
    assert thread == threading.get_ident() and (begin, end) == (0, 50)
    assert np.shares_memory(pixels, pil_pixels.view(image))


def test_arrays_are_read_where_they_lie(calls, rng):
    array = noise(rng, 300, 200)
    preprocess(array[::-2, 10:], 50)
    assert len(calls) == 1 and np.shares_memory(calls[0][1], array)


def test_files_use_it(calls, pictures):
    expected = by_pillow(pictures / "rocket.jpg", 224)
    assert (preprocess(pictures / "rocket.jpg", 224) == expected).all()
    assert len(calls) == EXPORTS


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: noise(rng, 90, 80)[..., 0],
        lambda rng: noise(rng, 90, 80, 1),
        lambda rng: noise(rng, 90, 80, 4),
        lambda rng: noise(rng, 100, 251),  # Pillow 13 begins with y
        lambda rng: noise(rng, 16385, 50),
        lambda rng: PIL.Image.fromarray(noise(rng, 100, 251)),
        lambda rng: PIL.Image.fromarray(noise(rng, 16385, 50)),
        lambda rng: PIL.Image.fromarray(noise(rng, 90, 80)).convert("RGBX"),
    ],
)
def test_other_images_go_to_pillow(make, calls, rng):
    image = make(rng)
    check(image, 24)
    assert not calls


def test_images_that_arrow_made_go_to_pillow(calls, rng):
    if not hasattr(PIL.Image, "fromarrow"):
        pytest.skip("this Pillow takes no Arrow arrays")
    image = PIL.Image.fromarray(noise(rng, 90, 80))
    check(PIL.Image.fromarrow(image, "RGB", image.size), 24)
    assert not calls


@pytest.mark.parametrize("version", ["10.0.0", "11.1.0", "11.2.1"])
def test_old_pillows_export_nothing(version, calls, monkeypatch, rng):
    monkeypatch.setattr(PIL, "__version__", version)
    check(PIL.Image.fromarray(noise(rng, 90, 80)), 24)
    assert not calls


def test_aligned_rows_go_to_pillow(calls, rng):
    _imaging.set_alignment(16)
    try:
        image = PIL.Image.fromarray(noise(rng, 91, 80))
        assert not pil_pixels.are_exported(image)
        check(image, 24)
    finally:
        _imaging.set_alignment(1)
    assert not calls


@needs_export
def test_strips_larger_than_a_block_go_to_pillow(small_blocks, calls, rng):
    image = PIL.Image.fromarray(noise(rng, 1000, 900))
    crop = PIL.Image.Image.crop
    with mock.patch.object(PIL.Image.Image, "crop", autospec=True, side_effect=crop) as copies:
        preprocess(image, 10)  # an output reads 360 rows
    assert copies.call_count == 1  # the centre crop: no strip was tried
    with mock.patch.object(module, "BLOCK_BYTES", 1 << 30):  # more than Pillow's blocks hold
        check(image)
    assert not calls


@needs_export
def test_a_low_limit_of_pixels_is_no_error(small_blocks, calls, monkeypatch, rng):
    image = PIL.Image.fromarray(noise(rng, 300, 200))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    check(image, 24)
    assert not calls


def test_the_reference_backend_does_not_use_it(calls, monkeypatch, rng):
    image = noise(rng, 90, 80)
    monkeypatch.setenv("NPCLIP_BACKEND", "reference")
    module._has_kernels.cache_clear()
    try:
        preprocess(image, 24)
    finally:
        module._has_kernels.cache_clear()
    assert not calls


# Memory and threads


@needs_export
def test_a_view_keeps_the_memory_alive(rng):
    array = noise(rng, 301, 203)
    image = PIL.Image.fromarray(array)
    pixels = pil_pixels.view(image)
    assert pixels.shape == (203, 301, 4) and not pixels.flags.writeable
    del image
    gc.collect()
    others = [PIL.Image.new("RGB", (301, 203)) for _ in range(20)]
    assert (pixels[..., :3] == array).all() and len(others) == 20


@needs_export
def test_no_memory_is_lost():
    resource = pytest.importorskip("resource")
    peaks = []
    for count in (5, 100):
        for _ in range(count):
            preprocess(PIL.Image.new("RGB", (1000, 1000)), 32)  # 4 MB
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 100_000  # kB


def test_several_threads_at_once(small_blocks, calls, rng):
    cases = [
        (random_source(rng, int(width), int(height)), size, interpolation)
        for width, height in rng.integers(100, 700, (12, 2))
        for size, interpolation in ((32, "bicubic"), (224, "bilinear"))
    ]
    for image, *_ in cases:
        getattr(image, "load", bool)()
    expected = [by_pillow(image, size, interpolation=name) for image, size, name in cases]
    barrier = threading.Barrier(6)

    def work(seed):
        barrier.wait()
        for i in np.random.default_rng(seed).permutation(len(cases)):
            image, size, name = cases[i]
            if not (preprocess(image, size, interpolation=name) == expected[i]).all():
                return f"case {i} differs"
        return None

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [None] * 6
    assert len({thread for thread, *_ in calls}) == 6
