"""A drawing with alpha -> a training picture: any background, place, size, angle and light.

    rgb = augment(rgba, text, 64, np.random.default_rng((seed, epoch, index)))

All randomness is the generator's, so neither threads nor resuming change what is seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from .captions import may_flip, names_colour

WHITE = 0.7  # of the backgrounds, since most drawings are shown on white
GRADIENT, BLOTCHES = 0.2, 0.05  # of the others; the rest is of one colour
CONTRAST = 48.0  # of 255: how far the background's light must be from the drawing's
SCALE = 0.85, 1.08  # of the picture's side; above 1 the drawing is cut
ANGLE = 8.0  # degrees, either way
SHIFT = 0.15  # of the room that is left or cut
COLOUR = 0.15  # brightness, contrast and saturation: 1 - COLOUR .. 1 + COLOUR
HUE, GREY = 0.05, 0.05  # how often another hue, or none, where no colour is named
FLAT = 0.3  # how often in few colours, without shades
CONTOUR, LINES = 0.5, 0.05  # how often with dark contours, and, of what is free, those alone
BLUR = 0.05


def augment(rgba: Image.Image, text: str, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 RGB [size, size, 3] of a square picture, of which transparent parts get a background.

    text: its caption; where that names no side and no writing, half of the pictures are mirrored,
        and where it names no colour, some lose theirs.
    """
    is_free = not names_colour(text)
    rgba = rgba.convert("RGBA")
    if rng.random() < 0.5 and may_flip(text):
        rgba = rgba.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if is_free and is_one_colour(rgba):
        rgba = recoloured(rgba, rng)
    placed = _placed(rgba, rng, 2 * size)
    if is_free and rng.random() < HUE:
        placed = other_hue(placed, rng)
    if rng.random() < FLAT:
        placed = flat(placed, rng)
    if (kind := rng.random()) < CONTOUR + LINES * is_free:
        placed = with_contours(placed, rng, is_filled=kind < CONTOUR)
    placed = placed.reduce(2)
    picture = Image.alpha_composite(background(placed, rng, size), placed).convert("RGB")
    return np.asarray(_jittered(picture, rng, GREY if is_free else 0.0))


def on_white(rgba: Image.Image, size: int, margin: float = 0.06) -> NDArray[np.uint8]:
    """uint8 RGB [size, size, 3] as a measurement shows it: centred on white, nothing random."""
    inner = round(size * (1 - 2 * margin))
    picture = Image.new("RGBA", (size, size), "white")
    drawing = rgba.convert("RGBA").resize((inner, inner), Image.Resampling.LANCZOS)
    corner = (size - inner) // 2
    picture.alpha_composite(drawing, (corner, corner))
    return np.asarray(picture.convert("RGB"))


def _placed(rgba: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """The drawing turned, scaled and shifted on a transparent square."""
    scale = np.exp(rng.uniform(*np.log(SCALE)))
    stretch = np.exp(rng.uniform(-0.1, 0.1))
    angle = np.deg2rad(rng.uniform(-ANGLE, ANGLE))
    scales = scale * np.array([stretch, 1 / stretch])  # of what is shown, along x and y
    middle = 0.5 + rng.uniform(-SHIFT, SHIFT, 2) * np.maximum(abs(1 - scales), 0.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    back = turn / scales * np.array(rgba.size)[:, None] / size  # square -> drawing, in pixels
    start = np.array(rgba.size) / 2 - back @ (size * middle)
    rows = np.column_stack([back, start])
    coefficients = tuple(rows.ravel().tolist())
    affine = Image.Transform.AFFINE
    return rgba.transform((size, size), affine, coefficients, Image.Resampling.BILINEAR)


def background(drawing: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """RGBA, opaque, and apart in light from what the drawing shows, so that it can be seen."""
    light = mean_light(drawing)
    sides = size, size
    if rng.random() < WHITE and abs(255 - light) >= CONTRAST:
        return Image.new("RGBA", sides, "white")
    colours = [Image.new("RGBA", sides, _colour_apart(light, rng)) for _ in range(2)]
    if (kind := rng.random()) < GRADIENT:
        turned = RAMP.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
        amount = turned.resize(sides, box=(75, 75, 181, 181))  # within the circle: no corners
    elif kind < GRADIENT + BLOTCHES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        amount = coarse.resize(sides, Image.Resampling.BICUBIC)
    else:
        return colours[0]
    return Image.composite(*colours, amount)


RAMP = Image.linear_gradient("L")  # 256 x 256


def _colour_apart(light: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """RGB; the best of some where none is apart enough."""
    tried = rng.integers(0, 256, (8, 3))
    apart = abs(tried @ LUMA - light)
    best = np.argmax(apart >= CONTRAST) if apart.max() >= CONTRAST else np.argmax(apart)
    red, green, blue = tried[best].tolist()
    return red, green, blue


LUMA = np.array([0.299, 0.587, 0.114])


def mean_light(rgba: Image.Image) -> float:
    """Of what is shown, more than half, 0 .. 255; 127 of a picture that shows nothing."""
    counts = np.array(rgba.convert("L").histogram(shown(rgba)))
    return float(counts @ np.arange(256) / counts.sum()) if counts.any() else 127.0


def shown(rgba: Image.Image) -> Image.Image:
    """The mask of what is more than half opaque."""
    return rgba.getchannel("A").point([0] * 128 + [255] * 128)


def is_one_colour(rgba: Image.Image) -> bool:
    """Whether all that is shown has one colour, as the icons of a font do."""
    mask = shown(rgba)
    extremes = [channel.histogram(mask) for channel in rgba.split()[:3]]
    ends = [np.flatnonzero(counts)[[0, -1]] for counts in extremes if any(counts)]
    return len(ends) == 3 and all(last - first <= 8 for first, last in ends)


def recoloured(rgba: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A one-coloured drawing in another colour: what it shows has none of its own."""
    pixels = np.asarray(rgba).copy()
    pixels[..., :3] = rng.integers(0, 200, 3) if rng.random() < 0.7 else 32
    return Image.fromarray(pixels)


def other_hue(rgba: Image.Image, rng: np.random.Generator) -> Image.Image:
    """All hues turned by the same angle, of any size."""
    hue, saturation, value = rgba.convert("RGB").convert("HSV").split()
    by = int(rng.integers(256))
    turned = hue.point([*range(by, 256), *range(by)])
    picture = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    picture.putalpha(rgba.getchannel("A"))
    return picture


def flat(rgba: Image.Image, rng: np.random.Generator) -> Image.Image:
    """In a few colours: what is shaded becomes flat."""
    few = rgba.convert("RGB").quantize(int(rng.integers(4, 10)), Image.Quantize.FASTOCTREE)
    picture = few.convert("RGB")
    picture.putalpha(rgba.getchannel("A"))
    return picture


def with_contours(
    rgba: Image.Image, rng: np.random.Generator, is_filled: bool = True
) -> Image.Image:
    """Dark lines where the light changes, and around the drawing; not filled: lines alone."""
    alpha = rgba.getchannel("A")
    edges = [channel.filter(ImageFilter.FIND_EDGES) for channel in (rgba.convert("L"), alpha)]
    strength = rng.uniform(60, 180)  # at which a line is opaque
    levels = [min(255, round(max(0.0, 2 * level / strength - 1) * 255)) for level in range(256)]
    line = ImageChops.lighter(*edges).point(levels)
    if rng.random() < 0.5:
        line = line.filter(ImageFilter.MaxFilter(3))
    red, green, blue = rng.integers(0, 64, 3).tolist()
    dark = Image.new("RGBA", rgba.size, (red, green, blue, 255))
    if is_filled:
        picture = Image.composite(dark, rgba, line)
        picture.putalpha(ImageChops.lighter(alpha, line))
    else:
        dark.putalpha(line)
        picture = dark
    return picture


def _jittered(picture: Image.Image, rng: np.random.Generator, grey: float) -> Image.Image:
    """In another light, now and then (grey) without colour or out of focus."""
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for enhancer in rng.permutation(np.array(enhancers, object)):
        picture = enhancer(picture).enhance(rng.uniform(1 - COLOUR, 1 + COLOUR))
    if rng.random() < grey:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < BLUR:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    return picture
