"""What a drawing shows, in words: names and keywords from its title, its file and Unicode's CLDR.

Cleaned of what says nothing about the picture: numbers, authors, styles, boilerplate titles, words
of other languages. A drawing of which nothing is left has no caption, and is left out.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .drawings import Drawing, codes_of, joined
from .sources import Source

MAX_WORDS = 8  # of a name; longer ones are sentences about how it was made
SHARED = 10  # a title that so many drawings have is that of a collection
TEMPLATES = "a drawing of {}", "a picture of {}", "an illustration of {}", "clip art of {}"
EMOJI_TEMPLATES = *TEMPLATES[:2], "an emoji of {}", "{} emoji"
ICON_TEMPLATES = *TEMPLATES[:2], "an icon of {}", "{} icon"
SENTENCES = {*TEMPLATES, *EMOJI_TEMPLATES, *ICON_TEMPLATES}

STYLES = re.compile(
    r"[-_ .](?:flat|duo|fill|filled|outline|remix|solid|static|color|colour|alt|svg|png|clip ?art)$"
)
NUMERALS = re.compile(r" (?:one|two|three|four|five|six)$")  # "church two": a second church
BOILERPLATE = re.compile(
    r"clip ?arts? by|part of|\btheme\b|icon ?set|cliparts?$|symbol_signs|sub?mission|openclipart"
)
ASIDE = re.compile(r"\(.*?\)|^aiga[_ ]|\bhotel icon\b|\bicons?\b|\bfrom .*|\bby .*|\bb and w\b")
FORMATS = {"bw", "svg", "png", "openclipart"}
JUNK = frozenset(
    (
        *("hash", "unsorted", "menu", "icon", "icons", "symbol", "symbols", "shape", "shapes"),
        *("mapsym", "map_symbol", "networksym", "webpage", "theme", "appicon", "arrowshape"),
        *("application", "applications", "action", "actions", "mime-types", "mimetypes"),
        *("filesystem", "filesystems", "musicstuff", "hotel", "architetto", "clipart", "clip"),
        *("art", "svg", "inkscape", "image", "images", "picture", "color", "colour", "activities"),
        *("work", "other", "misc", "various", "cartoon", "signs_and_symbols", "special", "logo"),
        *("recreation", "logos", "roadsign", "button", "buttons", "led", "public", "domain"),
        *("emoji", "type", "abstract", "signs", "unicode", "new"),
    )
)
WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")
SIDED = re.compile(
    r"\b(?:left|right|east|west|clockwise|anticlockwise|counterclockwise|letters?|numbers?|abcd?|"
    r"text|sign|clock|watch|calendar|keyboard|button|arrows?|notes?|question|percent|dollar|euro|"
    r"pound|yen|music|musical|treble|script|alphabet|back|end|soon|top|map|globe|dice|die)\b"
)
COLOURED = re.compile(
    r"\b(?:red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|gold|golden|"
    r"silver|colou?r(?:ed|ful)?|rainbow)\b"
)


class Words(NamedTuple):
    """What is said of a drawing."""

    names: tuple[str, ...]  # each by itself a caption; the first is the best
    keywords: tuple[str, ...]
    concept: str  # the same of all drawings of one thing: an emoji's codepoints, or the first name


def words_in(text: str) -> list[str]:
    """Its words: runs of letters, in lower case, without accents."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("\u2019", "'"))
    return WORD.findall("".join(char for char in plain if not unicodedata.combining(char)))


def spelled(name: str) -> str:
    """A name of an icon or a file as words: "wind-turbine-2-flat" -> "wind turbine"."""
    name = re.sub(r"[-_\s\d.]+$", "", name)
    while (shorter := STYLES.sub("", re.sub(r"[-_\s\d.]+$", "", name))) != name:
        name = shorter
    return " ".join(words_in(re.sub(r"[-_]", " ", name)))


def emoji_words(
    drawing: Drawing,
    annotations: Mapping[str, tuple[str, Sequence[str]]],
    codes: Mapping[str, str],
) -> Words | None:
    """Of an emoji, by its codepoints or a name that is an emoji's; else by its own name.

    None of Firefox OS's that are no emoji: their names run together.
    """
    code = drawing.codepoints or codes.get(joined(drawing.name)) or ""
    code = code or codes.get(joined(spelled(drawing.name)), "")
    text = "".join(chr(int(part, 16)) for part in code.split("-") if part)
    text = text.replace("\ufe0f", "")
    if text not in annotations:
        return None if drawing.set == "fxemoji" else icon_words(drawing)
    name, keywords = annotations[text]
    names = unique([" ".join(words_in(name.replace("-", " "))), spelled(drawing.name)])
    if drawing.set == "fxemoji":
        names = names[:1]
    return Words(tuple(names), tuple(clean_keywords(keywords, names)), codes_of(text))


def icon_words(drawing: Drawing) -> Words | None:
    """Of an icon, by its name."""
    name = NUMERALS.sub("", spelled(drawing.name))
    if not is_name(name):
        return None
    return Words((name,), (), name)


def art_words(
    drawing: Drawing, shared: Mapping[str, int], known: Mapping[str, int]
) -> Words | None:
    """Of a work in Open Clip Art, by its title, else its file's name, and its keywords.

    shared: how many drawings have a title. known: how many use a word, of all words that are
        English; a title of others gives way to the keyword that the fewest have.
    """
    title = drawing.title.lower()
    authors = {word for author in drawing.authors for word in words_in(author)}
    if BOILERPLATE.search(title) or shared.get(drawing.title, 0) >= SHARED:
        title = without_authors(drawing.name.rpartition("/")[2], authors)
    title = NUMERALS.sub("", spelled(ASIDE.sub(" ", title)))
    ignored = authors | FORMATS
    name = " ".join(word for word in title.split() if word not in ignored and len(word) > 1)
    recognised = [word for word in name.split() if word in known]
    names = [name] if is_name(name) and 2 * len(recognised) >= len(name.split()) else []
    keywords = [k for k in drawing.keywords if k in known and not authors & set(words_in(k))]
    keywords = clean_keywords(keywords, names)
    if not names:
        names = sorted(keywords, key=known.__getitem__)[:1]
    return Words(tuple(names), tuple(keywords), names[0]) if names else None


def without_authors(name: str, authors: Iterable[str]) -> str:
    """A file's name, "dog_jon_phil_04", without the beginnings of its authors' names."""
    parts = [p for p in re.split(r"[-_\d]+", name.lower()) if p]
    own = [p for p in parts if len(p) < 2 or not any(a.startswith(p) for a in authors)]
    return " ".join(own)


def clean_keywords(keywords: Iterable[str], names: Sequence[str]) -> list[str]:
    """Without junk, repetitions of a name, single letters and what is no word."""
    plain = (" ".join(words_in(keyword)) for keyword in keywords if keyword not in JUNK)
    return [k for k in unique(plain) if is_name(k) and k not in names]


def is_name(text: str) -> bool:
    """Whether it can stand alone as a caption."""
    parts = text.split()
    meaningful = any(len(part) > 2 for part in parts) and not set(parts) <= JUNK
    return meaningful and len(parts) <= MAX_WORDS


def unique(texts: Iterable[str]) -> list[str]:
    """In order, each once, without empty ones."""
    return list(dict.fromkeys(text for text in texts if text))


def with_article(name: str) -> str:
    """ "an owl", "a red apple", but "scissors"."""
    if len(name.split()) > 2 or name.endswith("s"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def texts_of(words: Words, source: Source, seed: str) -> list[str]:
    """Captions to draw one from each time a picture is seen: names, in sentences, with keywords.

    seed: chooses templates and keywords; the same gives the same. A name alone comes twice, since
    it should be drawn more often than any other.
    """
    rng = random.Random(seed)
    emoji = EMOJI_TEMPLATES if source.is_emoji else ICON_TEMPLATES
    templates = TEMPLATES if source.registry == "debian" else emoji
    first = words.names[0]
    texts = [first, first, f"a drawing of {with_article(first)}"]
    for name in words.names:
        chosen = rng.choice(templates)
        texts.append(chosen.format(name if chosen.startswith("{") else with_article(name)))
    texts += words.names[1:]
    if words.keywords:
        some = rng.sample(words.keywords, min(3, len(words.keywords)))
        texts += [", ".join([first, *some]), f"{first}, {some[0]}", rng.choice(words.keywords)]
    return texts


def may_flip(text: str) -> bool:
    """Whether the mirror image is still one of this: the caption names no side and no writing."""
    return not SIDED.search(text)


def names_colour(text: str) -> bool:
    """Whether the picture in other colours would not be one of this."""
    return bool(COLOURED.search(text))
