"""preprocess.py against pixels that openai/CLIP gave; tests/parity compares with its code."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npclip.errors import ImageError, InputError, InputTypeError
from npclip.preprocess import OPENAI_MEAN, OPENAI_STD, load_image, preprocess

# (mode, width, height, size) -> SHA-256, first 16 digits, of openai/CLIP's float32 [3, size, size]
# for noise(mode, width, height). Not PA and I;16, which Pillow 10 and 13 treat differently.
GOLDEN = {
    ("1", 70, 47, 32): "10dff5ddf17e64e5",
    ("L", 70, 47, 32): "4f38b42bccc69237",
    ("LA", 70, 47, 32): "e28277d76dbe84c3",
    ("P", 70, 47, 32): "02311003fccc4fb4",
    ("RGB", 70, 47, 32): "84635f47628a5852",
    ("RGBA", 70, 47, 32): "3a6bf44df36bbbcb",
    ("RGBa", 70, 47, 32): "21919f7bd97d4dab",
    ("RGBX", 70, 47, 32): "c2884dccb2daaa28",
    ("CMYK", 70, 47, 32): "60142142fa419ccf",
    ("YCbCr", 70, 47, 32): "c8186cee41cbc48b",
    ("HSV", 70, 47, 32): "e86f3647a346232d",
    ("I", 70, 47, 32): "11a9eb4816fdce1d",
    ("RGB", 640, 427, 224): "478a30d19727a292",
    ("RGB", 427, 640, 224): "e834643fb29e64a7",
    ("RGB", 224, 224, 224): "29eada27f3a9ccf4",
    ("RGB", 1, 1, 224): "88f87424a29ce6a9",
    ("RGB", 1, 50, 32): "62c02ef1a7b4c7d8",
    ("RGB", 1000, 3, 32): "bfee8c33c42f6e7f",
    ("RGB", 337, 336, 336): "e7238549b331cb9c",
    ("RGBA", 2162, 762, 224): "131bf6d46ec64277",
    ("P", 20, 20, 224): "4388ca12ba04fc16",
}
FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]


def noise(mode, width, height):
    """A picture of RandomState(0)'s bytes, which NumPy keeps the same for ever."""
    random_state = np.random.RandomState(0)
    image = PIL.Image.new(mode, (width, height))
    image.frombytes(random_state.bytes(len(image.tobytes())))
    if mode in ("P", "PA"):
        image.putpalette(random_state.bytes(3 * 256))
    return image


def normalized(rgb):
    """uint8 [H, W, 3] -> float32 [3, H, W], as ToTensor and Normalize compute it."""
    pixels = rgb.astype(np.float32) / np.float32(255)
    pixels = (pixels - np.float32(OPENAI_MEAN)) / np.float32(OPENAI_STD)
    return pixels.transpose(2, 0, 1)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# What comes out


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "{}-{}x{}-{}".format(*case))
def test_golden_pixels(case):
    mode, width, height, size = case
    pixels = preprocess(noise(mode, width, height), size)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == GOLDEN[case]


def test_result_is_contiguous_float32():
    pixels = preprocess(noise("RGBA", 50, 40), 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32
    assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_all_256_values_at_the_exact_size():
    rgb = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert (preprocess(rgb, 16) == normalized(rgb)).all()


@pytest.mark.parametrize(
    ("long_side", "offset"),
    [(16, 0), (17, 0), (18, 1), (19, 2), (20, 2), (21, 2), (23, 4)],  # halves go to the even number
)
def test_crop_offset(long_side, offset):
    rgb = np.random.RandomState(1).randint(0, 256, (16, long_side, 3)).astype(np.uint8)
    assert (preprocess(rgb, 16) == normalized(rgb[:, offset : offset + 16])).all()
    tall = rgb.transpose(1, 0, 2)
    assert (preprocess(tall, 16) == normalized(tall[offset : offset + 16])).all()


def test_long_side_is_rounded_down():
    image = noise("RGB", 640, 427)  # 224 * 640 / 427 = 335.7
    resized = image.resize((335, 224), PIL.Image.Resampling.BICUBIC)
    assert (preprocess(image, 224) == normalized(np.asarray(resized)[:, 56:280])).all()
    image = noise("RGB", 55, 11)  # 24 * 55 / 11 = 120, but 55 * (24 / 11) = 119.99...
    resized = image.resize((120, 24), PIL.Image.Resampling.BICUBIC)
    assert (preprocess(image, 24) == normalized(np.asarray(resized)[:, 48:72])).all()


def test_rgb_after_the_resize():
    palette = preprocess(noise("P", 90, 90), 30)  # nearest neighbour: colours are picked, not mixed
    colors = set(map(tuple, np.asarray(noise("P", 90, 90).convert("RGB")).reshape(-1, 3)))
    picked = np.rint((palette.transpose(1, 2, 0) * OPENAI_STD + OPENAI_MEAN) * 255).astype(int)
    assert set(map(tuple, picked.reshape(-1, 3))) <= colors

    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, ::2] = 255, 255, 255, 255  # white between invisible black: stays white
    assert preprocess(rgba, 4).min() > 1.9


def test_squash_and_bilinear():
    image = noise("RGB", 61, 40)
    bilinear = PIL.Image.Resampling.BILINEAR
    squashed = preprocess(image, 24, resize="squash", interpolation="bilinear")
    assert (squashed == normalized(np.asarray(image.resize((24, 24), bilinear)))).all()
    cropped = preprocess(image, 24, interpolation="bilinear")
    assert (cropped == normalized(np.asarray(image.resize((36, 24), bilinear))[:, 6:30])).all()


def test_mean_and_std():
    rgb = noise("RGB", 16, 16)
    pixels = preprocess(rgb, 16, mean=[0.5, 0.5, 0.5], std=[0.5, 0.25, 1.0])
    expected = (np.asarray(rgb) / np.float32(255) - np.float32(0.5)) / np.float32([0.5, 0.25, 1])
    assert (pixels == expected.transpose(2, 0, 1)).all()


def test_the_image_is_left_alone():
    image = noise("P", 30, 20)
    before = image.copy()
    preprocess(image, 16)
    assert image == before


def test_a_too_elongated_image_is_refused_before_it_takes_the_memory():
    with pytest.raises(ImageError, match=r"1 x 20000 .* 224 x 4480000"):
        preprocess(noise("L", 1, 20_000), 224)
    assert preprocess(noise("L", 1, 20_000), 224, resize="squash").shape == (3, 224, 224)


def test_a_mode_without_rgb_is_refused():
    with pytest.raises(ImageError, match="mode La into RGB"):
        preprocess(noise("La", 8, 8), 4)


@pytest.mark.parametrize(
    "arguments",
    [{"resize": "crop"}, {"interpolation": "nearest"}, {"size": 0}, {"std": (1.0,)}, {"mean": ()}],
)
def test_wrong_arguments(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        preprocess(noise("RGB", 8, 8), **{"size": 4, **arguments})


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]),
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 40),
    st.sampled_from(["shortest", "squash"]),
)
def test_every_mode_and_size(mode, width, height, size, resize):
    pixels = preprocess(noise(mode, width, height), size, resize=resize)
    assert pixels.shape == (3, size, size)
    black, white = (normalized(np.full((1, 1, 3), value, np.uint8)) for value in (0, 255))
    assert (pixels >= black).all() and (pixels <= white).all()


# What goes in


def test_every_kind_of_source_gives_the_same(pictures):
    path = pictures / "chelsea.png"
    rgb = np.asarray(load_image(path))
    assert rgb.shape == (300, 451, 3)
    for source in (
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        load_image(path),
        rgb,
    ):
        assert (np.asarray(load_image(source)) == rgb).all()
        assert (preprocess(source, 32) == preprocess(path, 32)).all()
    assert (np.asarray(load_image(rgb[::-1, ::2])) == rgb[::-1, ::2]).all()


@pytest.mark.parametrize(
    ("shape", "mode", "pixel"),
    [
        ((5, 7), "L", 9),
        ((5, 7, 1), "L", 9),
        ((5, 7, 3), "RGB", (9, 9, 9)),
        ((5, 7, 4), "RGBA", (9, 9, 9, 9)),
        ((3, 7, 3), "RGB", (9, 9, 9)),
        ((1, 1, 1), "L", 9),
    ],
)
def test_arrays(shape, mode, pixel):
    image = load_image(np.full(shape, 9, np.uint8))
    assert image.mode == mode and image.size == (shape[1], shape[0])
    assert image.getpixel((0, 0)) == pixel


@pytest.mark.parametrize("file_format", FORMATS)
def test_files_are_decoded_and_closed(file_format, tmp_path):
    path = tmp_path / "picture"
    noise("RGB", 20, 10).save(path, file_format)
    image = load_image(path)
    path.unlink()
    assert image.size == (20, 10) and getattr(image, "fp", None) is None
    assert preprocess(image, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("file_format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(file_format, tmp_path):
    path = tmp_path / "picture"
    frames = [PIL.Image.new("L", (16, 16), value) for value in (255, 0)]
    frames[0].save(path, file_format, save_all=True, append_images=frames[1:])
    image = load_image(path)
    path.unlink()
    assert preprocess(image, 8).min() > 1.9


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"\[3, 32, 32\].*looks like \[C, H, W\]: transpose"),
        (np.zeros((3, 32, 32), np.float32), r"float32 \[3, 32, 32\].*transpose"),
        (np.zeros((32, 32, 3), np.float32), r"float32 \[32, 32, 3\].*scale"),
        (np.zeros((32, 32), bool), "bool"),
        (np.zeros((32, 32), np.uint16), "uint16"),
        (np.zeros((2, 32, 32, 3), np.uint8), "one by one"),
        (np.zeros((32, 32, 2), np.uint8), r"\[32, 32, 2\]"),
        (np.zeros(32, np.uint8), r"\[32\]"),
        (np.zeros((), np.uint8), r"\[\]"),
        (np.zeros((0, 32, 3), np.uint8), r"empty.*\[0, 32, 3\]"),
        (np.zeros((32, 0), np.uint8), r"empty.*\[32, 0\]"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


@pytest.mark.parametrize("source", [None, 5, 1.5, [1, 2], {}, object()])
def test_wrong_types(source):
    with pytest.raises(InputTypeError, match=type(source).__name__):
        load_image(source)


def test_missing_files(tmp_path):
    with pytest.raises(ImageError, match=r"missing\.png: No such file") as error:
        load_image(tmp_path / "missing.png")
    assert isinstance(error.value.__cause__, FileNotFoundError)
    for source in (tmp_path, "", "null\0byte"):
        with pytest.raises(ImageError):
            load_image(source)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
)
def test_not_an_image(data, tmp_path):
    path = tmp_path / "data.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"image of {len(data)} bytes"):
        load_image(data)
    with pytest.raises(ImageError, match=r"data\.jpg"):
        load_image(path)


def test_no_program_is_started_for_an_image(monkeypatch, tmp_path):
    """Pillow has Ghostscript run the program that an EPS file is."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program"))
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(noise("RGB", 20, 20), "EPS"))
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="EPS is a program"):
            load_image(source)


@pytest.mark.parametrize("file_format", FORMATS)
def test_truncated_files(file_format, tmp_path):
    data = encoded(noise("RGB", 60, 60), file_format)
    path = tmp_path / "cut"
    for share in (0.02, 0.3, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match="cut"):
            load_image(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_corrupt_files_raise_nothing_else(file_format):
    data = encoded(noise("RGB", 20, 20), file_format)
    random_state = np.random.RandomState(0)
    failures = 0
    for _ in range(300):
        corrupt = np.frombuffer(data, np.uint8).copy()
        where = random_state.randint(0, min(len(data), 200), size=random_state.randint(1, 6))
        corrupt[where] = random_state.randint(0, 256, len(where))
        try:
            preprocess(corrupt.tobytes(), 8)
        except ImageError:
            failures += 1
    assert failures > 5


def test_a_lazily_opened_truncated_image(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(noise("RGB", 60, 60), "PNG")[:5000])
    with PIL.Image.open(path) as image, pytest.raises(ImageError, match="truncated"):
        preprocess(image, 8)


def test_empty_and_closed_images():
    with pytest.raises(ImageError, match="empty, 0 x 5"):
        load_image(PIL.Image.new("RGB", (0, 5)))
    image = PIL.Image.open(io.BytesIO(encoded(noise("RGB", 6, 6), "PNG")))
    image.close()
    with pytest.raises(ImageError):
        load_image(image)


def test_decompression_bomb(monkeypatch):
    data = encoded(noise("RGB", 60, 60), "PNG")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="exceeds limit"):
        load_image(data)


def test_import_does_not_load_pillow():
    code = "import sys, npclip.preprocess; print('PIL' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
