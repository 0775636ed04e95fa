"""Token ids of 30,000 generated texts, against openai/CLIP's own tokenizer: not one may differ."""

import random

import numpy as np
import pytest

from npclip.tokenizer import encode, tokenize

SEED = 2021
PER_KIND = 2_500

SCRIPTS = [  # first and last code point
    (0x0020, 0x007E),  # ASCII
    (0x00A0, 0x024F),  # Latin, accented
    (0x0300, 0x036F),  # combining marks
    (0x0370, 0x03FF),  # Greek
    (0x0400, 0x04FF),  # Cyrillic
    (0x0590, 0x06FF),  # Hebrew, Arabic
    (0x0900, 0x0DFF),  # Indic
    (0x0E00, 0x0E7F),  # Thai
    (0x1100, 0x11FF),  # Hangul letters, to be composed
    (0x1E00, 0x1FFF),  # more Latin and Greek
    (0x2000, 0x2BFF),  # punctuation, number forms, symbols
    (0x3040, 0x30FF),  # kana
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xAC00, 0xD7A3),  # Hangul syllables
    (0xD800, 0xDFFF),  # surrogates, alone or paired
    (0xF900, 0xFFFD),  # compatibility and full-width forms
    (0x1D400, 0x1D7FF),  # mathematical alphabets
    (0x1F300, 0x1FAFF),  # emoji
    (0x0000, 0x10FFFF),  # anything
]
CAPTION = (
    "a the photo of dog cats it's don't I'll we've 2 red, Car. sleeping! on-table (old) \"ok\""
)
CODE = (
    "def f(x): return {x[0]} <b> </b> a&b && || -> :: /* */ // # $x @y %d \\n `~` ^ ; += 0xff 1e-3"
)
ENTITIES = (
    "&amp; &lt; &gt; &quot; &#39; &amp;#39; &amp;amp; &eacute; &nbsp; &#x1F600; &#xD800; &bad; &"
)
EMOJI = "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 1️⃣ 👩🏿‍🚀 😀😀 ☆"
WHITESPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u200b\u3000\ufeff"
CONTROL = "\x00\x07\x08\x1b[31m\x1b[0m\x7f\x80\x9f\ufffc\u202e\u200d\u00ad"
QUOTED = "\u201cdon\u2019t\u201d"
QUOTES = ["'", "\N{RIGHT SINGLE QUOTATION MARK}", "`", "''", "&#39;"]
SPECIALS = ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|\u017ftartoftext|>", "<|", "|>"]


def characters(rng):
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))


def words(source, rng):
    return " ".join(rng.choices(source.split(" "), k=rng.randint(1, 15)))


def mojibake(rng):
    text = rng.choice(["naïve café", QUOTED, "日本語", "Ünïcödé €5", "👍🏽 ok", characters(rng)])
    for _ in range(rng.randint(1, 2)):
        codec = rng.choice(["latin-1", "cp1252", "cp437", "cp1251", "macroman"])
        text = text.encode("utf-8", "replace").decode(codec, "replace")
    return text


def contraction(rng):
    word = rng.choice(["you", "İ", "", "it", "café", "X", "''"])
    suffixes = ["s", "t", "re", "ve", "m", "ll", "d", "S", "LL", "\u017f", "x", "sd"]
    return word + rng.choice(QUOTES) + rng.choice(suffixes) + rng.choice(["", " a", "b", "!"])


def long_word(rng):
    alphabet = rng.choice(["ab", "a", "thein", "abcdefghijklmnopqrstuvwxyz", "-=*", "!?.", "éß日"])
    return "".join(rng.choices(alphabet, k=rng.choice([30, 33, 60, 200])))


KINDS = {
    "one script": characters,
    "many scripts": lambda rng: "".join(characters(rng) for _ in range(rng.randint(2, 5))),
    "captions": lambda rng: words(CAPTION, rng),
    "code": lambda rng: words(CODE, rng),
    "entities": lambda rng: rng.choice(["", "<", "é"]) + "".join(rng.choices(ENTITIES, k=9)) * 2,
    "entities whole": lambda rng: words(ENTITIES, rng).replace(
        " ", rng.choice(["", " ", "a", "<"])
    ),
    "emoji": lambda rng: "".join(rng.choices(EMOJI, k=rng.randint(1, 8))) + words(EMOJI, rng),
    "mojibake": mojibake,
    "whitespace": lambda rng: "".join(rng.choices(WHITESPACE + CONTROL + "aé,", k=12)),
    "contractions": lambda rng: contraction(rng) + rng.choice(["", " ", "\n"]) + contraction(rng),
    "digits, specials": lambda rng: "".join(
        rng.choice([str(rng.randrange(10**6)), "a", " ", "½²٣", *SPECIALS]) for _ in range(6)
    ),
    "long words": long_word,
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_openai_clip(kind, openai_clip):
    official = openai_clip.clip._tokenizer.encode
    rng = random.Random(f"{SEED} {kind}")
    for number in range(PER_KIND):
        text = KINDS[kind](rng)
        assert encode(text) == official(text), f"seed '{SEED} {kind}', text {number}: {text!a}"


def test_a_10000_letter_word_equals_openai_clip(openai_clip):
    rng = random.Random(SEED)
    for alphabet in ("a", "ab", "theinaro", "é日"):
        word = "".join(rng.choices(alphabet, k=10_000))
        assert encode(word) == openai_clip.clip._tokenizer.encode(word), (SEED, alphabet)


def test_tokenize_equals_openai_clip(openai_clip):
    rng = random.Random(SEED)
    texts = [" ".join(KINDS[rng.choice([*KINDS])](rng) for _ in range(4)) for _ in range(1000)]
    texts += ["cat " * count for count in range(72, 80)]
    for context_length in (77, 16, 2):
        ids = tokenize(texts, context_length, truncate=True)
        expected = openai_clip.tokenize(texts, context_length, truncate=True).numpy()
        differing = np.flatnonzero((ids != expected).any(1))
        assert not len(differing), f"seed {SEED}: {texts[differing[0]]!a}"


@pytest.mark.parametrize("count", [75, 76])
def test_too_long_where_openai_clip_says_so(count, openai_clip):
    outcomes = []
    for function in (tokenize, openai_clip.tokenize):
        try:
            outcomes.append(function("cat " * count).shape)
        except RuntimeError:
            outcomes.append("too long")
    assert outcomes[0] == outcomes[1]
