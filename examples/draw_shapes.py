"""Draw pictures with captions, to try `npclip train` on: coloured shapes of two sizes.

    pip install npclip
    python examples/draw_shapes.py shapes
    npclip train examples/train_shapes.toml

Writes shapes/train.tar and shapes/validation.tar, in webdataset's layout, and shapes/classes, with
a folder of images for each kind of shape, for zero-shot accuracy.
"""

import argparse
import io
import random
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (240, 220, 30),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "purple": (130, 50, 180),
    "brown": (120, 70, 30),
    "white": (245, 245, 245),
}
SHAPES = "circle", "square", "triangle", "cross", "ring"
CAPTIONS = "a {} {} {}", "a drawing of a {} {} {}", "{} {} {}"
SIZES = {"small": (0.16, 0.22), "large": (0.32, 0.42)}  # half of the side, of the picture's


def draw(shape: str, colour: str, size: str, rng: random.Random, pixels: int) -> Image.Image:
    """One of them, somewhere on a grey ground."""
    ground = (rng.randint(40, 110),) * 3
    image = Image.new("RGB", (pixels, pixels), ground)
    canvas, fill = ImageDraw.Draw(image), COLOURS[colour]
    half = rng.uniform(*SIZES[size]) * pixels
    x, y = (rng.uniform(half, pixels - half) for _ in "xy")
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        canvas.ellipse(box, fill)
    elif shape == "square":
        canvas.rectangle(box, fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill)
    elif shape == "cross":
        canvas.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill)
        canvas.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill)
    else:
        canvas.ellipse(box, outline=fill, width=max(1, round(half / 2.5)))
    return image


def sample(
    shape: str, rng: random.Random, pixels: int, captions: tuple[str, ...] = CAPTIONS
) -> tuple[Image.Image, str]:
    """A picture and its caption."""
    colour, size = rng.choice(list(COLOURS)), rng.choice(list(SIZES))
    caption = rng.choice(captions).format(size, colour, shape)
    return draw(shape, colour, size, rng, pixels), caption


def write_tar(
    path: Path, count: int, rng: random.Random, pixels: int, captions: tuple[str, ...] = CAPTIONS
) -> None:
    """Pairs: 000001.png, 000001.txt, 000002.png ..."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            image, caption = sample(rng.choice(SHAPES), rng, pixels, captions)
            png = io.BytesIO()
            image.save(png, "PNG")
            for name, data in (("png", png.getvalue()), ("txt", caption.encode())):
                header = tarfile.TarInfo(f"{number:06}.{name}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def write_all(
    folder: Path, train: int, validation: int, classes: int, pixels: int = 32, seed: int = 0
) -> None:
    """The two tars, and so many images for each class."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "train.tar", train, rng, pixels)
    # One caption only: no model can tell which of three that mean the same was meant.
    write_tar(folder / "validation.tar", validation, rng, pixels, CAPTIONS[:1])
    for shape in SHAPES:
        (folder / "classes" / shape).mkdir(parents=True, exist_ok=True)
        for number in range(classes):
            image, _ = sample(shape, rng, pixels)
            image.save(folder / "classes" / shape / f"{number}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw pictures with captions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--classes", type=int, default=40)
    arguments = parser.parse_args()
    write_all(arguments.folder, arguments.train, arguments.validation, arguments.classes)
