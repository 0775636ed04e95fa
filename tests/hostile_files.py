"""A folder of everything that a collection of pictures has gone through."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SEEDS = 4  # variants of each kind


def write_hostile_folder(folder: Path, seed: int = 0) -> tuple[set[str], set[str], set[str]]:
    """Names of those that must be embedded, of those that must fail, and of either kind."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    good: dict[str, bytes] = {}
    bad: dict[str, bytes] = {}
    either: dict[str, bytes] = {}
    for i in range(SEEDS):
        _write_variant(i, rng, good, bad, either)
    good |= {
        "1x1.png": _encoded(_picture(rng, 1, 1), "PNG"),
        "1x1.jpg": _encoded(_picture(rng, 1, 1), "JPEG"),
        "1x1.gif": _encoded(_picture(rng, 1, 1), "GIF"),
        "2x900.png": _encoded(_picture(rng, 2, 900), "PNG"),
        "UPPER.JPG": _encoded(_picture(rng), "JPEG"),
        "two.dots.jpeg": _encoded(_picture(rng), "JPEG"),
        " spaces and\ttabs .png": _encoded(_picture(rng), "PNG"),
        "new\nline.png": _encoded(_picture(rng), "PNG"),
        "quote\"'&<b>.png": _encoded(_picture(rng), "PNG"),
        "猫 🐈.png": _encoded(_picture(rng), "PNG"),
        os.fsdecode(b"caf\xe9 \xff.png"): _encoded(_picture(rng), "PNG"),
        os.fsdecode(b"\x80\x81.jpg"): _encoded(_picture(rng), "JPEG"),
        "sub/deeper/still.png": _encoded(_picture(rng), "PNG"),
    }
    bad |= {
        "bomb.png": _bomb(30_000),
        "line.png": _png_header(2**31 - 1, 1),
        "no pixels.png": _png_header(0, 0),
        "newline only.jpg": b"\n",
        "text.jpg": b"<html>404</html>",
        "link.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for name, data in (good | bad | either).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for i in range(SEEDS):
        os.symlink(f"nowhere{i}.png", folder / f"dangling{i}.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("..", folder / "sub" / "up")
    os.symlink("1x1.png", folder / "link to 1x1.png")
    os.mkfifo(folder / "fifo.png")
    closed = folder / "closed.png"
    closed.write_bytes(good["1x1.png"])
    closed.chmod(0)
    names = {f"dangling{i}.png" for i in range(SEEDS)} | {"loop.png", "fifo.png"}
    readable = {"link to 1x1.png"} | ({"closed.png"} if os.access(closed, os.R_OK) else set())
    return good.keys() | readable, bad.keys() | names | ({"closed.png"} - readable), set(either)


def _write_variant(i, rng, good, bad, either):
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO"):
        whole, extension = _encoded(_picture(rng), kind), kind.lower()
        good[f"whole{i}.{extension}"] = whole
        bad[f"empty{i}.{extension}"] = b""
        bad[f"head{i}.{extension}"] = whole[: int(rng.integers(1, 6))]
        either[f"torn{i}.{extension}"] = whole[: int(rng.integers(6, len(whole)))]
        broken = bytearray(whole)
        for at in rng.integers(2, len(whole), 5):
            broken[at] ^= int(rng.integers(1, 256))
        either[f"broken{i}.{extension}"] = bytes(broken)
    picture = _picture(rng)
    good |= {
        f"a jpeg{i}.png": _encoded(picture, "JPEG"),
        f"a png{i}.jpg": _encoded(picture, "PNG"),
        f"a jpeg{i}.dat": _encoded(picture, "JPEG"),
        f"a webp{i}": _encoded(picture, "WEBP"),
        f"cmyk{i}.jpg": _encoded(picture.convert("CMYK"), "JPEG"),
        f"grey{i}.jpg": _encoded(picture.convert("L"), "JPEG"),
        f"palette{i}.png": _encoded(picture.convert("P"), "PNG", transparency=i),
        f"bilevel{i}.png": _encoded(picture.convert("1"), "PNG"),
        f"alpha{i}.png": _encoded(picture.convert("RGBA"), "PNG"),
        f"grey alpha{i}.png": _encoded(picture.convert("LA"), "PNG"),
        f"16 bits{i}.png": _encoded(_of_16_bits(rng), "PNG"),
        f"16 bits{i}.tiff": _encoded(_of_16_bits(rng), "TIFF"),
        f"progressive{i}.jpg": _encoded(picture, "JPEG", progressive=True),
        f"animated{i}.gif": _animated(rng, "GIF"),
        f"animated{i}.webp": _animated(rng, "WEBP"),
        f"animated{i}.png": _animated(rng, "PNG"),
        f"broken exif{i}.jpg": _encoded(picture, "JPEG", exif=b"Exif\0\0II*\0" + rng.bytes(40)),
        f"rotated{i}.jpg": _encoded(picture, "JPEG", exif=_rotation(6)),
    }
    bad[f"noise{i}.jpg"] = rng.bytes(999)
    bad[f"cut to a third{i}.jpg"] = good[f"whole{i}.jpeg"][: len(good[f"whole{i}.jpeg"]) // 3]


def _picture(rng, width=None, height=None):
    width, height = (side or int(rng.integers(20, 90)) for side in (width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _of_16_bits(rng):
    return Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16))


def _encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _animated(rng, kind):
    frames = [_picture(rng, 40, 30) for _ in range(4)]
    return _encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def _rotation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _png_header(width, height, depth=8, color=2):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)


def _bomb(side):
    """A PNG of side x side black pixels, four megabytes long."""
    squeeze, row = zlib.compressobj(1), bytes(side + 1)
    rows = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return _png_header(side, side, color=0) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
