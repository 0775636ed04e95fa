"""Pixels of 2,600 pictures, against openai/CLIP's own transform: not one value may differ.

Where its Pillow calls raise (a mode without conversion to RGB, say), npclip must raise ImageError.
"""

import random
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from npclip.errors import ImageError
from npclip.preprocess import load_image, preprocess

SEED = 224
PER_MODE = 110
MODES = [
    *(
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
    ),
    *("I", "F", "I;16", "I;16L", "I;16B", "I;16N"),
]
NO_RGB = {"La"}  # modes that Pillow cannot resize or turn into RGB
SIDES = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 100, 223, 224, 225, 335, 337]
SIZES = [1, 7, 32, 64, 224]  # of the result

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")


def make(mode, width, height, rng):
    """A picture of noise, or of smooth gradients, in the given mode."""
    random_state = np.random.RandomState(rng.randrange(2**32))
    image = PIL.Image.new(mode, (width, height))
    if mode == "F":
        data = random_state.uniform(-50, 300, width * height).astype(np.float32).tobytes()
    elif mode == "I":
        data = random_state.randint(-50, 70_000, width * height).astype(np.int32).tobytes()
    elif rng.random() < 0.3 and mode not in ("1", "P", "PA"):
        ramp = np.linspace(0, 255, len(image.tobytes()))
        data = np.uint8(127 + 127 * np.sin(ramp * rng.random())).tobytes()
    else:
        data = random_state.bytes(len(image.tobytes()))
    image.frombytes(data)
    if mode in ("P", "PA"):
        image.putpalette(random_state.bytes(3 * 256))
    if mode in ("P", "L") and rng.random() < 0.4:
        image.info["transparency"] = rng.choice([0, 255, 7])
    if mode == "P" and rng.random() < 0.3:
        image.info["transparency"] = random_state.bytes(256)
    return image


def sides(rng):
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(SIDES), rng.choice(SIDES)
    if kind < 0.5:  # elongated
        return rng.sample([rng.randint(1, 4), rng.randint(200, 1500)], 2)
    return rng.randint(1, 400), rng.randint(1, 400)


def outcome(function):
    try:
        return np.asarray(function())
    except (ValueError, OSError) as error:
        return error


def assert_equal(transform, image, size, label):
    """Both sides give the same values, or both raise; says whether there were values."""
    expected = outcome(lambda: transform(image.copy()))
    result = outcome(lambda: preprocess(image, size))
    label = f"seed {SEED}, {label}: {image.mode} {image.size} -> {size}"
    if isinstance(expected, Exception) or isinstance(result, Exception):
        assert isinstance(expected, Exception), f"{label}: only npclip raised {result}"
        assert isinstance(result, ImageError), f"{label}: only openai/CLIP raised {expected}"
        return False
    assert result.dtype == expected.dtype == np.float32 and result.shape == expected.shape, label
    differing = int((result != expected).sum())
    assert not differing, f"{label}: {differing} of {result.size} values differ"
    return True


@pytest.fixture(scope="session")
def transforms(openai_clip):
    return {size: openai_clip.clip._transform(size) for size in [*SIZES, 288, 336]}


@pytest.mark.parametrize("mode", MODES)
def test_generated_pictures_equal_openai_clip(mode, transforms):
    rng = random.Random(f"{SEED} {mode}")
    worked = Counter()
    for number in range(PER_MODE):
        width, height = sides(rng)
        size = rng.choice([s for s in SIZES if s * max(width, height) / min(width, height) < 5e4])
        image = make(mode, width, height, rng)
        worked[assert_equal(transforms[size], image, size, f"picture {number}")] += 1
    assert worked[mode not in NO_RGB] == PER_MODE, f"{mode}: {worked}"


@pytest.mark.parametrize("name", ["chelsea.png", "rocket.jpg"])
def test_photos_equal_openai_clip(name, pictures, transforms):
    rng = random.Random(f"{SEED} {name}")
    photo = load_image(pictures / name)
    for size in (224, 288, 336):
        assert assert_equal(transforms[size], photo, size, "photo")
    for number in range(150):
        left, top = rng.randrange(photo.width - 9), rng.randrange(photo.height - 9)
        right, bottom = rng.randint(left + 9, photo.width), rng.randint(top + 9, photo.height)
        image = photo.crop((left, top, right, bottom))
        if rng.random() < 0.5:
            image = image.resize((rng.randint(9, 700), rng.randint(9, 700)))
        mode = rng.choice(["RGB", "RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA"])
        image = image.convert(mode)
        if mode == "RGBA":
            image.putalpha(image.getchannel("G"))
        assert assert_equal(transforms[224], image, 224, f"variant {number}")


def test_exif_rotation_is_ignored_as_openai_clip_does(pictures, transforms, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    path = tmp_path / "rotated.jpg"
    with PIL.Image.open(pictures / "rocket.jpg") as photo:
        photo.save(path, exif=exif)
    with PIL.Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
        assert (preprocess(path, 224) == transforms[224](image).numpy()).all()
