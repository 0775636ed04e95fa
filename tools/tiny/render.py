"""SVG -> RGBA pictures of one size, by resvg, as WebP in one Parquet file a set.

A drawing is cut to what it shows, scaled to fit the square, and centred on transparent pixels: what
surrounds it, its size and its place are chosen in training (augment.py).
"""

from __future__ import annotations

import io
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from npclip.whole_file import replacing

from .drawings import read_drawings
from .selection import selected
from .sources import Source

SIZE = 96
MAX_BYTES = 1 << 20  # of an SVG
MAX_SECONDS = 10.0
MAX_MEMORY = 4 << 30  # of a process that renders
NARROW = 5.0  # width to height, or height to width
FAINT = 8  # alpha that counts as nothing
EXTERNAL = re.compile(r"""<!ENTITY|href\s*=\s*["'](?!\s*(?:\#|data:image/))[^"']*["']""")
METADATA = re.compile(r"<metadata\b.*?</metadata>", re.DOTALL)  # not always of sound XML
TAG_LINK = re.compile(r"<a\b[^>]*>|</a>")  # a link of a document, which draws nothing


class Skipped(str):
    """Why a drawing has no picture."""

    __slots__ = ()


def render(svg: str, size: int = SIZE) -> bytes | Skipped:
    """RGBA WebP (lossless) of size x size pixels, or why there is none.

    svg: a document. Refused are those above MAX_BYTES, those that name other files or entities, and
        those that are blank or too narrow to see.
    """
    import resvg_py

    svg = METADATA.sub("", svg)
    if len(svg) > MAX_BYTES:
        return Skipped("is too large")
    if EXTERNAL.search(TAG_LINK.sub("", svg)):
        return Skipped("names another file")
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg,
            width=2 * size,  # then halved: smoother than resvg's own edges, and enough to cut from
            height=2 * size,  # fits in, keeping its shape
            dpi=96,
            skip_system_fonts=True,  # or text would depend on the machine
        )
    except ValueError as error:
        return Skipped(f"does not parse: {str(error).partition(' at ')[0][:60]}")
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a >= FAINT else 0).getbbox()
    if box is None or _is_plain(picture):
        return Skipped("is blank")
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > NARROW * min(width, height):
        return Skipped("is too narrow")
    scale = size / max(width, height)
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    drawing = picture.resize(fitted, Image.Resampling.LANCZOS, box)
    square = Image.new("RGBA", (size, size))
    square.paste(drawing, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    with io.BytesIO() as stream:
        square.save(stream, "WEBP", lossless=True, method=2)
        return stream.getvalue()


def _is_plain(picture: Image.Image) -> bool:
    """Whether it is one opaque rectangle of one colour."""
    return all(low == high for low, high in picture.getextrema())


def render_all(svgs: Sequence[str], jobs: int = 2) -> Iterator[bytes | Skipped]:
    """render() of each in order, in processes that are ended when one takes MAX_SECONDS."""
    while svgs:
        with multiprocessing.get_context("spawn").Pool(jobs, _limit_memory) as pool:
            pool.apply(_started)  # a process takes its time to start
            waiting = [pool.apply_async(render, (svg,)) for svg in svgs]
            for number, result in enumerate(waiting):
                try:
                    yield result.get(MAX_SECONDS)
                except multiprocessing.TimeoutError:
                    yield Skipped("takes too long")
                    svgs = svgs[number + 1 :]
                    break
            else:
                return


def _limit_memory() -> None:
    """A process that asks for more is ended, which render_all notices as one that takes long."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def _started() -> None:
    pass


def render_source(source: Source, folder: Path, jobs: int = 2) -> Counter[str]:
    """folder/rendered/NAME.parquet of a source in folder/sources; returns how many were skipped.

    Its columns: set, name, image and skipped (why, where there is no image). Nothing is done where
    the file exists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "rendered" / f"{source.name}.parquet"
    if not path.exists():
        drawings = list(selected(source, read_drawings(source, folder / "sources")))
        pictures = list(render_all([drawing.svg for drawing in drawings], jobs))
        table = pa.table(
            {
                "set": [drawing.set for drawing in drawings],
                "name": [drawing.name for drawing in drawings],
                "image": pa.array(
                    [p if isinstance(p, bytes) else None for p in pictures], "binary"
                ),
                "skipped": [str(p) if isinstance(p, Skipped) else None for p in pictures],
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            pq.write_table(table, stream, compression="none", row_group_size=1024)
    skipped = pq.read_table(path, columns=["skipped"]).column("skipped").to_pylist()
    return Counter(reason for reason in skipped if reason is not None)
