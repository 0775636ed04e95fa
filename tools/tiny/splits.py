"""Who is trained on and who is measured, so that no measurement flatters.

style          every picture of one artist's set, OpenMoji; of its concepts others drew the training
               pictures, but no picture in this style is trained on
words          every picture of some emoji whose name is one word; that word occurs in no training
               caption, not even inside another ("boat" bars "sailboat"), in singular or plural
combinations   every picture of some emoji whose name has several words, each of which training
               captions hold, but none holds all of them
valid          a few pictures of concepts and styles that are trained on, for the curves
train          the rest, without what is related to a held-out concept by any caption or keyword

Which emoji are held out is decided by a seeded hash of their name, not by hand.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .captions import SENTENCES, words_in

CONCRETE = {"Animals Nature", "Food Drink", "Travel Places", "Activities", "Objects"}  # OpenMoji's
WORDS, COMBINATIONS = 64, 64  # concepts held out
STYLES = 4  # sets that must have a concept that is held out
MAX_RELATED = 60  # pictures that holding a concept out may cost
COMMON = 10  # pictures whose captions hold a word of a combination
VALID = 0.04  # of the training pictures
SHORTEST = 4  # letters of a held-out word: shorter ones are parts of too many others
SMALL_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with")
)


class Picture(NamedTuple):
    """What the split needs to know of one."""

    id: str
    set: str
    concept: str
    words: frozenset[str]  # of all that is said of it, see words_of
    group: str = ""  # of an emoji, OpenMoji's name of it
    is_style: bool = False


class Holdout(NamedTuple):
    """Concepts that are never trained on."""

    words: dict[str, str]  # concept -> its word, as stem() gives it
    combinations: dict[str, frozenset[str]]  # concept -> the stems of its name
    related: frozenset[str]  # ids of the pictures whose texts hold one of these

    def kind(self, concept: str) -> str:
        """ "words", "combinations", or nothing of one that is not held out."""
        kinds = {"words": self.words, "combinations": self.combinations}
        return next((kind for kind, concepts in kinds.items() if concept in concepts), "")


def stem(word: str) -> str:
    """The singular of an English noun, near enough: what is compared, never shown."""
    word = word.removesuffix("'s")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def stems(text: str) -> frozenset[str]:
    """Of its words, but for those that name nothing."""
    return frozenset(stem(word) for word in words_in(text) if word not in SMALL_WORDS)


def chance(seed: int, *what: str) -> float:
    """A number in 0 .. 1 that depends on these alone, not on order, version or machine."""
    digest = hashlib.blake2b("\0".join([str(seed), *what]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def words_of(texts: Iterable[str]) -> frozenset[str]:
    """Of what is said of a picture: every word as it is, and its stem."""
    words = {word for text in texts for word in words_in(text)}
    return frozenset(words | set(map(stem, words)))


def holds_word(words: Iterable[str], word: str) -> bool:
    """Whether one of a picture's words is, or contains, a held-out word."""
    return any(word in found for found in words)


def holds_all(words: frozenset[str], combination: frozenset[str]) -> bool:
    """Whether a picture's words have every stem of a held-out name."""
    return combination <= words


class Index:
    """Which of some pictures hold a word, or all of several: holds_word and holds_all, of many."""

    def __init__(self, pictures: Iterable[Picture]) -> None:
        """Of all their words."""
        self._by_word: dict[str, set[str]] = defaultdict(set)
        for picture in pictures:
            for word in picture.words:
                self._by_word[word].add(picture.id)

    def word(self, word: str) -> set[str]:
        """Ids of those that holds_word() would find."""
        return set().union(*(ids for key, ids in self._by_word.items() if word in key))

    def all(self, combination: Iterable[str]) -> set[str]:
        """Ids of those that holds_all() would find."""
        return set.intersection(*(self._by_word.get(part, set()) for part in combination))


def choose_holdout(pictures: Sequence[Picture], names: dict[str, str], seed: int) -> Holdout:
    """The concepts to hold out, and what is left out with them.

    names: concept -> the name of an emoji, all that are considered.
    """
    groups = {p.concept: p.group for p in pictures if p.is_style}
    drawn_by = defaultdict(set)
    for picture in pictures:
        if not picture.is_style:
            drawn_by[picture.concept].add(picture.set)
    candidates = sorted(
        (c for c in names if groups.get(c) in CONCRETE and len(drawn_by[c]) >= STYLES),
        key=lambda concept: chance(seed, "hold out", names[concept]),
    )
    index = Index(picture for picture in pictures if not picture.is_style)
    sentences = words_of(SENTENCES)
    words, combinations, related = {}, {}, set()
    for concept in candidates:
        parts = words_in(names[concept])
        if len(words) < WORDS and len(parts) == 1 and len(parts[0]) >= SHORTEST:
            found = index.word(word := stem(parts[0]))
            if len(found) <= MAX_RELATED and not holds_word(sentences, word):
                words[concept] = word
                related |= found
    left = Index(p for p in pictures if not p.is_style and p.id not in related)
    for concept in candidates:
        parts = stems(names[concept])
        if len(combinations) < COMBINATIONS and len(parts) > 1 and concept not in words:
            found = left.all(parts)
            apart = min(len(left.all([part]) - found) for part in parts)
            if len(found) <= MAX_RELATED and apart >= COMMON:
                combinations[concept] = parts
                related |= found
    return Holdout(words, combinations, frozenset(related))


def split_of(picture: Picture, holdout: Holdout, seed: int) -> str:
    """Its split, or "related" of one that is left out because of what it may tell."""
    if picture.is_style:
        return "style"
    if kind := holdout.kind(picture.concept):
        return kind
    if picture.id in holdout.related:
        return "related"
    return "valid" if chance(seed, "valid", picture.id) < VALID else "train"
