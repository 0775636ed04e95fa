"""Where the drawings and their words come from, each pinned: a table that is also the attribution.

Only sources that may be used, changed and passed on for any purpose are trained on. Left out for
their licence: emojione-v1 (CC BY-SA 4.0), circum (MPL 2.0). Left out for what they show: logos,
file types, user-interface glyphs in one colour; and meteocons, whose rain and snow are animations
that begin with nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Source(NamedTuple):
    """A package of a registry, one version of it."""

    name: str
    registry: Literal["npm", "debian"]
    package: str
    version: str
    sha256: str  # of the archive, as the registry serves it
    licence: str  # SPDX
    author: str
    url: str
    use: Literal["train", "style", "text"]  # style: evaluation only
    is_emoji: bool = False

    @property
    def archive(self) -> str:
        """The file name that apt-get download and npm pack give it."""
        if self.registry == "debian":
            return f"{self.package}_{self.version.replace(':', '%3a')}_all.deb"
        return f"{self.package.strip('@').replace('/', '-')}-{self.version}.tgz"


def _iconify(
    name: str,
    version: str,
    sha256: str,
    licence: str,
    author: str,
    url: str,
    use: Literal["train", "style"] = "train",
    is_emoji: bool = False,
) -> Source:
    package = f"@iconify-json/{name}"
    return Source(name, "npm", package, version, sha256, licence, author, url, use, is_emoji)


_GITHUB = "https://github.com/"
_NOTO = "Apache-2.0", "Google Inc", _GITHUB + "googlefonts/noto-emoji"
_FLUENT = "MIT", "Microsoft Corporation", _GITHUB + "microsoft/fluentui-emoji"
_EMOJI_ONE = "CC-BY-4.0", "Emoji One", _GITHUB + "EmojiTwo/emojitwo"
_CLDR = "Unicode-3.0", "Unicode, Inc.", _GITHUB + "unicode-org/cldr-json"
_STREAMLINE = "CC-BY-4.0", "Streamline", _GITHUB + "webalys-hq/streamline-vectors"

SOURCES = (
    Source(
        "openclipart", "debian", "openclipart-svg", "1:0.18+dfsg-19",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "CC-PDDC", "the Open Clip Art Library's contributors", "https://openclipart.org", "train",
    ),
    _iconify(
        "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        *_NOTO, is_emoji=True,
    ),
    _iconify(
        "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        *_NOTO, is_emoji=True,
    ),
    _iconify(
        "fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        *_FLUENT, is_emoji=True,
    ),
    _iconify(
        "fluent-emoji-flat", "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        *_FLUENT, is_emoji=True,
    ),
    _iconify(
        "fluent-emoji-high-contrast", "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        *_FLUENT, is_emoji=True,
    ),
    _iconify(
        "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0", "Twitter, Inc and other contributors", _GITHUB + "jdecked/twemoji",
        is_emoji=True,
    ),
    _iconify(
        "emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        *_EMOJI_ONE, is_emoji=True,
    ),
    _iconify(
        "emojione-monotone", "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        *_EMOJI_ONE, is_emoji=True,
    ),
    _iconify(
        "fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "CC-BY-4.0", "Mozilla", _GITHUB + "mozilla/fxemoji", is_emoji=True,  # Apache-2.0: its code
    ),
    _iconify(
        "streamline-emojis", "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        *_STREAMLINE, is_emoji=True,
    ),
    _iconify(
        "flat-color-icons", "1.2.3",
        "d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786",
        "MIT", "Icons8", _GITHUB + "icons8/flat-Color-icons",
    ),
    _iconify(
        "icon-park", "1.2.4", "c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
        "Apache-2.0", "ByteDance", _GITHUB + "bytedance/IconPark",
    ),
    _iconify(
        "streamline-color", "1.2.2",
        "06c2addb59f572b2bfe581863888fcf7dbe0927e0511e7157c54f332fe90347f", *_STREAMLINE,
    ),
    _iconify(
        "streamline-flex-color", "1.2.2",
        "17ef2e9d596bb288991c271a2b468be822f994cb073c94801a1c186a0e4af827", *_STREAMLINE,
    ),
    _iconify(
        "streamline-freehand-color", "1.2.2",
        "00d74cbddaf1bcf35c8614ac0544d10af69c7cee8801475473fe424ee0c0c642", *_STREAMLINE,
    ),
    _iconify(
        "streamline-kameleon-color", "1.2.2",
        "5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b", *_STREAMLINE,
    ),
    _iconify(
        "streamline-plump-color", "1.2.2",
        "33ed8a9ebda9ed896125f1e01873105688d68d0b0c95ca1bcead5a41309afcf6", *_STREAMLINE,
    ),
    _iconify(
        "streamline-stickies-color", "1.2.2",
        "e96b8b2bbe1efde22272c420a75024b4b2c7e224ec1f323c93a421a07410971e", *_STREAMLINE,
    ),
    _iconify(
        "streamline-ultimate-color", "1.2.2",
        "46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6", *_STREAMLINE,
    ),
    _iconify(
        "game-icons", "1.2.4", "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4",
        "CC-BY-3.0", "Lorc, Delapouite and contributors", "https://game-icons.net",
    ),
    _iconify(
        "openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0", "OpenMoji", _GITHUB + "hfg-gmuend/openmoji", use="style", is_emoji=True,
    ),
    Source(
        "cldr-annotations", "npm", "cldr-annotations-full", "48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
        *_CLDR, "text",
    ),
    Source(
        "cldr-annotations-derived", "npm", "cldr-annotations-derived-full", "48.2.0",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
        *_CLDR, "text",
    ),
)  # fmt: skip
STYLE = "openmoji"  # the set whose style no training picture has
