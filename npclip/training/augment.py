"""Random changes to the images of training, by torchvision's laws, on PIL images.

Crop, then flip, then colours, as torchvision's RandomResizedCrop, RandomHorizontalFlip and
ColorJitter; then what is transparent gets a background. All randomness is the generator's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from .settings import AugmentSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom
Augmentation: TypeAlias = (  # (image, its text, size, rng) -> [size, size, 3]
    "Callable[[Image, str, int, np.random.Generator], NDArray[np.uint8]]"
)
SIDES = re.compile(r"\b(left|right|east|west|(anti|counter)?clockwise)\b", re.IGNORECASE)
TRIES = 10  # to find a crop that fits
WHITE = "#ffffff"


def augment(
    image: Image,
    text: str,
    size: int,
    rng: np.random.Generator,
    *,
    settings: AugmentSettings,
    interpolation: str = "bicubic",
) -> NDArray[np.uint8]:
    """RGB [size, size, 3] of a part of the image, changed at random.

    text: its own; where that names a side, the image is not flipped. interpolation: "bicubic" or
    "bilinear". Raises ImageError for an image that Pillow cannot turn into RGB.
    """
    import PIL.Image
    from PIL.Image import Resampling, Transpose

    box = random_box(image.size, settings.scale, settings.ratio, rng)
    is_flipped = rng.random() < settings.flip and not SIDES.search(text)
    try:
        is_transparent = settings.background is not None and has_alpha(image)
        image = image.crop(box).convert("RGBA" if is_transparent else "RGB")
        image = image.resize((size, size), Resampling[interpolation.upper()])
        if is_flipped:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        image = jitter(image, settings, rng)
        if is_transparent:
            assert settings.background is not None
            ground = background(settings.background, size, rng)
            image = PIL.Image.alpha_composite(ground.convert("RGBA"), image).convert("RGB")
    except Exception as error:  # Pillow's modes fail in many ways
        raise ImageError(f"cannot use an image of mode {image.mode}: {error}") from error
    return np.asarray(image)


def random_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A part of an image of that (width, height).

    scale: of its share of the area, uniform. ratio: of its width to its height, uniform in the
    logarithm. Where none of TRIES fits: the largest in the centre whose ratio is allowed.
    """
    width, height = size
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jitter(image: Image, settings: AugmentSettings, rng: np.random.Generator) -> Image:
    """Brightness, contrast and saturation times a factor within 1 - s .. 1 + s, in random order.

    An alpha channel stays as it is.
    """
    from PIL import ImageEnhance

    enhancers = (
        (ImageEnhance.Brightness, settings.brightness),
        (ImageEnhance.Contrast, settings.contrast),
        (ImageEnhance.Color, settings.saturation),
    )
    for i in rng.permutation(len(enhancers)):
        enhancer, strength = enhancers[i]
        if strength:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            image = enhancer(image).enhance(factor)
    return image


def has_alpha(image: Image) -> bool:
    """Whether any of its pixels may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def background(name: str, size: int, rng: np.random.Generator) -> Image:
    """RGB, of the colour; "random" is any colour, or, as often, a gradient from one to another."""
    import PIL.Image

    if name != "random":
        return PIL.Image.new("RGB", (size, size), name)
    first, second = rng.integers(0, 256, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    if rng.random() < 0.5:
        second = first
    steps = np.linspace(-0.5, 0.5, size)
    share = steps[:, None] * math.sin(angle) + steps * math.cos(angle)
    share = (share / (2 * max(np.abs(share).max(), 1e-9)) + 0.5)[..., None]
    return PIL.Image.fromarray(np.round(first + share * (second - first)).astype(np.uint8))


def on_ground(image: Image, name: str | None) -> Image:
    """What is evaluated: without randomness, "random" is white; None leaves the image alone.

    Raises ImageError as augment() does.
    """
    import PIL.Image

    if name is None or not has_alpha(image):
        return image
    ground = PIL.Image.new("RGBA", image.size, WHITE if name == "random" else name)
    try:
        return PIL.Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # likewise
        raise ImageError(f"cannot use an image of mode {image.mode}: {error}") from error
