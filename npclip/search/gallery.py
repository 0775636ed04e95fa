"""What a search found, as one HTML page: thumbnails inside it, no script, nothing that is fetched.

Paths and texts are hostile input: everything is escaped, and the page's own Content-Security-Policy
forbids scripts and requests to whatever would slip through.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from ..errors import ImageError
from ..sources import read_path
from ..whole_file import replacing
from . import Hit, is_image

SIDE = 320  # pixels of a thumbnail's longer side
QUALITY = 80

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #fafafa; --card: #fff; --text: #1b1b1b; --dim: #5c5c5c;
  --line: #ddd; --mat: #efefef; --focus: #0b57d0 }
@media (prefers-color-scheme: dark) { :root { --back: #141414; --card: #1e1e1e; --text: #ececec;
  --dim: #a6a6a6; --line: #333; --mat: #2a2a2a; --focus: #8ab4f8 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1800px; padding: clamp(12px, 2vw, 32px); background: var(--back);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0 0 12px; font-size: 1.1rem; font-weight: 600 }
ul, ol { list-style: none; margin: 0; padding: 0 }
p { margin: 12px 0 20px; color: var(--dim) }
.queries { display: flex; flex-wrap: wrap; gap: 12px; align-items: center }
.queries li { max-width: 100% }
.queries .text { padding: 6px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card) }
.queries img { display: block; width: auto; height: 112px; max-width: 100%; object-fit: contain;
  border-radius: 8px }
.queries .none { width: 160px; height: 112px; border-radius: 8px }
.hits { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, $width), 1fr)) }
.hits > li { display: flex; flex-direction: column; border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; background: var(--card) }
.picture { display: block; position: relative; isolation: isolate; aspect-ratio: 1;
  background: var(--mat) }
.picture > * { position: absolute; z-index: -1; inset: 0; width: 100%; height: 100%;
  object-fit: contain }  /* behind the outline of the focus */
.none { display: flex; padding: 16px; align-items: center; justify-content: center;
  text-align: center; background: var(--mat); color: var(--dim); font-size: 13px; overflow: auto }
.hits div { padding: 8px 12px 10px }
.score { font-variant-numeric: tabular-nums; font-weight: 600 }
.name { display: block; font-size: 13px; color: var(--dim) }
.says { display: block; white-space: pre-wrap }
a { color: inherit }
a:focus-visible { outline: 3px solid var(--focus); outline-offset: -3px }
</style>
</head>
<body>
<header>
<h1>Nearest to</h1>
<ul class="queries">
$queries
</ul>
<p>$count of <bdi>$index</bdi>, the nearest first, with their cosines</p>
</header>
<main>
<ol class="hits">
$hits
</ol>
</main>
</body>
</html>
""")


def write(
    path: str | os.PathLike[str], queries: Sequence[str], hits: Sequence[Hit], kind: str, index: str
) -> None:
    """page() into a file, whole or not at all. Raises OSError."""
    with replacing(Path(path)) as stream:
        stream.write(page(queries, hits, kind, index).encode())


def page(queries: Sequence[str], hits: Sequence[Hit], kind: str, index: str) -> str:
    """The page. kind: of the collection, "image" or "text"; index: its name.

    An image that cannot be read any more, or has more pixels than Pillow's MAX_IMAGE_PIXELS, has a
    placeholder that says so.
    """
    show = _image_hit if kind == "image" else _text_hit
    return PAGE.substitute(
        title=_text("npclip search: " + " + ".join(queries)),
        width="200px" if kind == "image" else "300px",
        queries="\n".join(map(_query, queries)),
        count=f"{len(hits)} {kind}{'s' if len(hits) != 1 else ''}",
        index=_text(index),
        hits="\n".join(map(show, hits)),
    )


def thumbnail(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """A JPEG of at most SIDE x SIDE pixels, upright, on white, and its width and height.

    data: an image file. Raises ImageError where Pillow cannot read it, or finds it too large.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data)) as image:
                averaged = image.mode not in ("P", "1")  # whose pixels are numbers of colours
                small: PIL.Image.Image = image if averaged else image.convert("RGBA")
                small.thumbnail((SIDE, SIDE))  # of a JPEG no more is decoded than it needs
                small = PIL.ImageOps.exif_transpose(small)
                if "A" in small.getbands() or "transparency" in small.info:
                    small = small.convert("RGBA")
                    white = PIL.Image.new("RGBA", small.size, "white")
                    small = PIL.Image.alpha_composite(white, small)
                out = io.BytesIO()
                small.convert("RGB").save(out, "JPEG", quality=QUALITY)
    except PIL.UnidentifiedImageError:
        raise ImageError("not an image file that Pillow can read") from None
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
        raise ImageError("too many pixels for a thumbnail") from None
    except Exception as error:  # Pillow's plugins raise anything on a corrupt file
        raise ImageError(str(error) or type(error).__name__) from error
    return out.getvalue(), small.size


def _picture(path: str) -> str:
    """<img>, or a placeholder."""
    try:
        data, (width, height) = thumbnail(read_path(path))
    except ImageError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return f'<span class="none">no thumbnail: {_text(reason)}</span>'
    source = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    return f'<img src="{source}" alt="{_text(path)}" width="{width}" height="{height}">'


def _query(query: str) -> str:
    if is_image(query):
        return f"<li>{_picture(query)}</li>"
    return f'<li class="text"><bdi>{_text(query)}</bdi></li>'


def _image_hit(hit: Hit) -> str:
    picture = _picture(hit.path)
    if os.path.isfile(hit.path):  # no member of an archive
        address = escape(Path(hit.path).absolute().as_uri())
        picture = f'<a class="picture" href="{address}">{picture}</a>'
    else:
        picture = f'<span class="picture">{picture}</span>'
    return f"<li>{picture}{_caption(hit.score, 'name', hit.path)}</li>"


def _text_hit(hit: Hit) -> str:
    return f"<li>{_caption(hit.score, 'says', hit.id)}</li>"


def _caption(score: float, kind: str, name: str) -> str:
    text = f'<bdi class="{kind}">{_text(name)}</bdi>'
    return f'<div><span class="score">{score:.4f}</span>{text}</div>'


def _text(text: str) -> str:
    """Escaped; what no page can hold (control characters, lone surrogates) as \\x1b, \\udcff."""
    written = "".join(
        character.encode("unicode_escape").decode()
        if (character < " " and character not in "\n\t") or "\ud800" <= character <= "\udfff"
        else character
        for character in text
    )
    return escape(written)
