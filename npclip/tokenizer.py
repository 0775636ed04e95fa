"""Text -> token ids: the lower-cased byte-pair encoding of openai/CLIP, id for id.

clean text -> words -> UTF-8 bytes -> merge neighbours, most frequent pair first -> ids

    "a café"  ->  "a", "café"  ->  [a</w>], [c, a, f, \\xc3, \\xa9</w>]  ->  [320], [15304]

`</w>` marks the last byte of a word, so "cat" at a word's end and "cat" in "catalog" differ. Ids:
256 bytes, 256 bytes with `</w>`, 48,894 merges in the order they were learned, and two specials.

A small model knows the first merges alone. That is a byte-pair encoding of its own, with the same
ids but for the two specials, which come last: vocab_size = 512 + merges + 2.
Source: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, InputTypeError, TextTooLongError

if TYPE_CHECKING:
    import regex

VOCAB_SIZE = 49408
SOT = 49406  # start of text
EOT = 49407  # end of text: the largest id, so argmax finds it
SPECIAL_TOKENS = "<|startoftext|>", "<|endoftext|>"  # the last two ids
SMALLEST = 2 * 256 + len(SPECIAL_TOKENS)  # a vocabulary of bytes

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32  # characters; longer words are rarely met twice


def tokenize(
    texts: str | Sequence[str],
    context_length: int = 77,
    truncate: bool = False,
    special_tokens: bool = True,
    first_index: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> NDArray[np.int32]:
    """Token ids of texts, each framed by SOT and EOT and padded with 0.

    texts: one text or a sequence of B of them; [] gives [0, context_length].
    context_length: columns of the result; SOT and EOT take two of them.
    truncate: cut a text that is too long, and end it with EOT, instead of raising.
    special_tokens: a literal "<|endoftext|>" or "<|startoftext|>" in a text becomes that token, as
        in openai/CLIP, and the text tower ignores what follows the first EOT. False: plain text.
    first_index: what errors call the first text, for who tokenizes a long list in parts.
    vocab_size: of the model: the tokenizer's first vocab_size - 514 merges are used, SOT is
        vocab_size - 2 and EOT vocab_size - 1. Above 49408 it counts as 49408.

    Returns int32 [B, context_length]; one str gives B = 1. Raises TextTooLongError, InputError for
    a context_length below 2 or a vocab_size below 514, InputTypeError for what is not a str.
    """
    if context_length < 2:
        raise InputError(f"context_length must hold SOT and EOT, so at least 2: {context_length}")
    if not isinstance(texts, Iterable):
        raise InputTypeError(f"texts must be a str or a list of str, not {type(texts).__name__}")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts, first_index):
        if not isinstance(text, str):
            raise InputTypeError(f"text {index} must be a str, not {type(text).__name__}")
    result = np.zeros((len(texts), context_length), np.int32)
    sot, eot = special_ids(vocab_size)
    for index, text in enumerate(texts, first_index):
        ids = [sot, *encode(text, special_tokens, vocab_size), eot]
        if len(ids) > context_length:
            if not truncate:
                raise TextTooLongError(
                    f"text {index} has {len(ids)} tokens, SOT and EOT included, but only "
                    f"{context_length} fit (truncate=True cuts it): {_shorten(text)!r}"
                )
            ids = [*ids[: context_length - 1], eot]
        result[index - first_index, : len(ids)] = ids
    return result


def special_ids(vocab_size: int = VOCAB_SIZE) -> tuple[int, int]:
    """The ids of SOT and EOT, the last two. Raises InputError for a vocab_size below 514."""
    size = _size(vocab_size)
    return size - 2, size - 1


def encode(text: str, special_tokens: bool = True, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids of a text of any length, without SOT and EOT.

    special_tokens, vocab_size: see tokenize. Raises InputError for a vocab_size below 514.
    """
    size = _size(vocab_size)
    ids: list[int] = []
    for word in _word_pattern(special_tokens).findall(_clean(text)):
        is_short = len(word) <= _CACHED_LENGTH
        ids += _encode_cached(word, size) if is_short else _encode_word(word, size)
    return ids


def decode(ids: Iterable[int], vocab_size: int = VOCAB_SIZE) -> str:
    """The text of token ids: lower case, and a space after every word, "it's" giving "it 's ".

    Bytes that are not UTF-8 become U+FFFD; special tokens are spelled out; padding reads "!".
    vocab_size: see tokenize. Raises InputError for an id outside the vocabulary, and for a
    vocab_size below 514.
    """
    size = _size(vocab_size)
    spelling = _vocabulary(size).spelling
    ids = list(ids)
    for index in ids:
        if not 0 <= index < size:
            raise InputError(f"token ids must lie in 0 .. {size - 1}, not {index}")
    return b"".join(spelling[index] for index in ids).decode("utf-8", errors="replace")


def _size(vocab_size: int) -> int:
    """Of the tokenizer for a model with so many token embeddings: some models have spare ones."""
    if vocab_size < SMALLEST:
        raise InputError(
            f"vocab_size must be at least {SMALLEST}, the bytes and SOT and EOT, to tokenize "
            f"texts: {vocab_size} (token ids work with any)"
        )
    return min(vocab_size, VOCAB_SIZE)


class _Vocabulary(NamedTuple):
    byte_ids: list[int]  # byte -> its id; + 256 where it ends a word
    merges: dict[tuple[int, int], int]  # neighbouring ids -> the id that replaces them
    spelling: list[bytes]  # id -> its bytes, a space for </w>


@functools.cache
def _vocabulary(size: int) -> _Vocabulary:
    """Of size ids. Reads the merges file: a header, then a pair a line: `i n` or `th e</w>`."""
    import gzip
    from importlib.resources import files

    # The file spells a byte as one visible character: itself or, for the others, U+0100 onwards.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    order = bytes(visible + hidden)  # byte number i of the vocabulary
    ids = {symbol: i for i, symbol in enumerate(letters + [letter + "</w>" for letter in letters])}
    spelling = [bytes([b]) for b in order] + [bytes([b]) + b" " for b in order]

    merges: dict[tuple[int, int], int] = {}
    path = files(__package__).joinpath(_MERGES_FILE)
    with path.open("rb") as file, gzip.open(file, "rt", encoding="utf-8") as lines:
        for new, line in enumerate(islice(lines, 1, 1 + size - SMALLEST), start=len(ids)):
            left, right = line.split()
            pair = ids[left], ids[right]
            merges[pair] = ids[left + right] = new
            spelling.append(spelling[pair[0]] + spelling[pair[1]])
    spelling += [name.encode() for name in SPECIAL_TOKENS]
    return _Vocabulary([order.index(byte) for byte in range(256)], merges, spelling)


@functools.cache
def _word_pattern(special_tokens: bool) -> regex.Pattern[str]:
    import regex

    specials = r"<\|startoftext\|>|<\|endoftext\|>|" if special_tokens else ""
    return regex.compile(specials + _WORDS, regex.IGNORECASE)


def _clean(text: str) -> str:
    """Repaired encoding, no HTML entities, single spaces, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing to repair
        import html

        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _whitespace().sub(" ", text.strip()).strip().lower()


@functools.cache
def _whitespace() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"\s+")


def _encode_word(word: str, size: int) -> tuple[int, ...]:
    """Ids, in the vocabulary of that size, of one match of the word pattern."""
    if word in SPECIAL_TOKENS:
        return (special_ids(size)[SPECIAL_TOKENS.index(word)],)
    vocabulary = _vocabulary(size)
    ids = [vocabulary.byte_ids[byte] for byte in word.encode()]
    ids[-1] += 256  # </w>
    return tuple(_merge(ids, vocabulary.merges))


_encode_cached = functools.lru_cache(_CACHED_WORDS)(_encode_word)

_GONE = -1  # takes the place of an id that was merged away, and follows the last one


def _merge(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """Byte-pair encoding in O(n log n): merge the pair learned first, leftmost first, until none.

    A merge is learned after its two parts, hence merging can only add pairs of higher ids. A heap
    of (id of the merge, position) therefore yields all places of one pair from left to right
    before any later pair: the order of the textbook loop that rescans the whole word.
    """
    end = len(ids)
    before, after = list(range(-1, end)), list(range(1, end + 1))  # a linked list of positions
    ids = [*ids, _GONE]  # at position `end`, which is also position -1
    heap = [(merges[p], i) for i in range(end) if (p := (ids[i], ids[i + 1])) in merges]
    heapify(heap)
    while heap:
        new, i = heappop(heap)
        j = after[i]
        if merges.get((ids[i], ids[j])) != new:  # one of the two was merged meanwhile
            continue
        ids[i], ids[j] = new, _GONE
        after[i] = after[j]
        before[after[j]] = i
        for left, right in (before[i], i), (i, after[i]):
            if (pair := (ids[left], ids[right])) in merges:
                heappush(heap, (merges[pair], left))
    return [i for i in ids if i != _GONE]


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "..."
