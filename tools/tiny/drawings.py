"""Drawings as their authors publish them: SVG, and the words that came with it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from .sources import SOURCES, Source

RDF = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
}
CC_WORK = re.compile(r"<(?:\w+:)?Work\b.*?</(?:\w+:)?Work>", re.DOTALL)


class Drawing(NamedTuple):
    """One picture, before it is rendered."""

    set: str  # the name of its Source
    name: str  # unique in its set: an icon's name, a path without its extension
    svg: str
    title: str = ""
    keywords: tuple[str, ...] = ()
    codepoints: str = ""  # of an emoji, "1f468-200d-1f373"
    category: str = ""  # as the set names it
    authors: tuple[str, ...] = ()


def read_drawings(source: Source, folder: Path) -> Iterator[Drawing]:
    """All drawings of a source that download() unpacked in folder, in the order of their names."""
    place = folder / source.name
    return _clip_art(source, place) if source.registry == "debian" else _icons(source, place)


def _icons(source: Source, place: Path) -> Iterator[Drawing]:
    """Of an Iconify set: icons.json, with names by codepoints and by category where it has them."""
    icons = json.loads((place / "icons.json").read_text("utf-8"))
    codepoints: dict[str, str] = {}
    for code, name in json.loads((place / "chars.json").read_text("utf-8")).items():
        codepoints.setdefault(name, code)
    metadata = json.loads((place / "metadata.json").read_text("utf-8"))
    categories = metadata.get("categories", {})
    category = {name: title for title, names in categories.items() for name in names}
    for name, icon in sorted(icons["icons"].items()):
        if icon.get("hidden"):
            continue
        code, group = codepoints.get(name, ""), category.get(name, "")
        yield Drawing(source.name, name, _icon_svg(icons, icon), "", (), code, group)


def _icon_svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """An Iconify icon as a document: the set's box unless it has its own."""
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}" '
        f'color="#222">{icon["body"]}</svg>'
    )


def _clip_art(source: Source, place: Path) -> Iterator[Drawing]:
    """Of Open Clip Art: files with a title and keywords in RDF, but for links to another."""
    root = place / "usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        if path.is_symlink():
            continue
        svg = path.read_bytes().decode("utf-8", errors="replace")
        name = path.relative_to(root).with_suffix("").as_posix()
        title, keywords, authors = read_rdf(svg)
        category = name.rpartition("/")[0]
        yield Drawing(source.name, name, svg, title, keywords, "", category, authors)


def read_rdf(svg: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Title, keywords and authors of a work, as Creative Commons has them; empty where missing."""
    found = CC_WORK.search(svg)
    if found is None:
        return "", (), ()
    spaces = "".join(f' xmlns:{name}="{url}"' for name, url in RDF.items())
    spaces += ' xmlns="http://web.resource.org/cc/" xmlns:cc="http://web.resource.org/cc/"'
    try:
        work = ElementTree.fromstring(f"<metadata{spaces}>{found[0]}</metadata>")[0]
    except (ElementTree.ParseError, IndexError):
        return "", (), ()
    keywords = _lines(work, "dc:subject/rdf:Bag/rdf:li")
    authors = [a for role in ("creator", "rights") for a in _lines(work, f"dc:{role}/*/dc:title")]
    return _line(work.findtext("dc:title", "", RDF)), keywords, tuple(dict.fromkeys(authors))


def _lines(work: ElementTree.Element, path: str) -> tuple[str, ...]:
    return tuple(line for item in work.iterfind(path, RDF) if (line := _line(item.text)))


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def emoji_codes(folder: Path) -> dict[str, str]:
    """Joined lower-case name of an emoji, "thumbsup", -> its codepoints, from all that name them.

    Of sets that say no codepoints: their names are those of CLDR, of Unicode, or of another set.
    """
    codes: dict[str, str] = {}
    for source in SOURCES:
        path = folder / source.name / "chars.json"
        if path.exists() and source.is_emoji:
            for code, name in json.loads(path.read_text("utf-8")).items():
                codes.setdefault(joined(name), code)
    for text, (name, _) in read_annotations(folder).items():
        codes.setdefault(joined(name), codes_of(text))
        if len(text) == 1:
            codes.setdefault(joined(unicodedata.name(text, "")), codes_of(text))
    codes.pop("", None)
    return codes


def joined(name: str) -> str:
    """Its letters and digits alone, in lower case, to compare spellings."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def codes_of(text: str) -> str:
    """Codepoints as file names spell them, without the variation selector."""
    return "-".join(f"{ord(char):x}" for char in text if char != "\ufe0f")


def read_annotations(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Character or sequence -> CLDR's English short name and keywords."""
    result: dict[str, tuple[str, tuple[str, ...]]] = {}
    for source, key, directory in (
        ("cldr-annotations-derived", "annotationsDerived", "annotationsDerived"),
        ("cldr-annotations", "annotations", "annotations"),
    ):
        path = folder / source / directory / "en" / "annotations.json"
        for text, entry in json.loads(path.read_text("utf-8"))[key]["annotations"].items():
            name = entry.get("tts", [""])[0]
            result[text.replace("\ufe0f", "")] = name, tuple(entry.get("default", ()))
    return result
