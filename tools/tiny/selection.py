"""Which drawings are pictures of something that words name, each thing once a style.

Left out: every skin tone but the neutral one, flags, keys and signs that are themselves writing,
logos, controls of user interfaces, and of Open Clip Art patterns, generated stars and icon themes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .drawings import Drawing
from .sources import Source

TONE = re.compile(
    r"-(?:medium-light|medium-dark|light|medium|dark)(?:-skin-tone)?(?=-|$)|-skin-tone"
)
TONE_CODE = re.compile(r"1f3f[b-f]")
WRITING = re.compile(
    r"^(?:flag-|letter-|keycap|regional-indicator|digit-|japanese-.*-button|squared-|tag-|input-|"
    r"(?:a|b|ab|o|cl|cool|free|id|new|ng|ok|p|sos|up|vs|atm)-button|circled-m|copyright|"
    r"registered|trade-mark|variation-selector|component)|-oclock|-thirty|thirty$|-flag$"
)
EMOJI_GROUPS = {"Flags", "Modifiers", "Extras Openmoji", "Extras Unicode"}
ICON_GROUPS = {
    *("Abstract", "Arrows", "Base", "Brand", "Components", "Datas", "Edit", "Graphics", "Operate"),
    *("Constellation", "InterfaceEssential", "Interface Essential", "Logos"),
}
LOGO = re.compile(r"(?:^|-)(?:logos?|brand)(?:-|$)")
ART = re.compile(
    r"(?:^|/)(?:flags?|unsorted_flags|examples|gradients|patterns|fonts?|stars|cards|[a-z]+-theme)"
    r"(?:/|$)|logo"
)


def selected(source: Source, drawings: Iterable[Drawing]) -> Iterator[Drawing]:
    """Those of the drawings of one source that are worth rendering."""
    return (drawing for drawing in drawings if is_wanted(source, drawing))


def is_wanted(source: Source, drawing: Drawing) -> bool:
    """Whether it is a picture of a thing, by its name and group."""
    if source.is_emoji:
        toned = TONE.search(drawing.name) or TONE_CODE.search(drawing.codepoints)
        return not (toned or drawing.category in EMOJI_GROUPS or WRITING.search(drawing.name))
    if source.registry == "debian":
        return not ART.search(drawing.name)
    return not (drawing.category in ICON_GROUPS or LOGO.search(drawing.name))
