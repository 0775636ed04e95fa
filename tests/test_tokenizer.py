"""tokenizer.py against ids that openai/CLIP gave; tests/parity compares with its code itself."""

import hashlib
import subprocess
import sys
import threading
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npclip import tokenizer
from npclip.errors import InputError, InputTypeError, TextTooLongError
from npclip.tokenizer import EOT, SOT, VOCAB_SIZE, decode, encode, tokenize

GOLDEN = {
    "": [],
    "   ": [],
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "Hello World!": [3306, 1002, 256],
    "You should've done this": [592, 1535, 1200, 1700, 589],
    "you're, don't, her's": [592, 982, 267, 847, 713, 267, 899, 568],
    "don\N{RIGHT SINGLE QUOTATION MARK}t": [847, 713],
    "résumé": [29106, 7054, 4166],
    "It&amp;#39;s a caf&eacute;": [585, 568, 320, 15304],
    "<b> &amp;lt; d": [283, 321, 285, 283, 323],  # ftfy leaves entities beside "<" alone
    "it'\N{LATIN SMALL LETTER LONG S}": [585, 6, 129, 379],  # a contraction, cases ignored
    "cafe\N{COMBINING ACUTE ACCENT}": [15304],
    "\uff21\uff22\uff23": [5334],  # full-width ABC
    "2021 12345": [273, 271, 273, 272, 272, 273, 274, 275, 276],
    "日本語": [39121, 44353, 34002, 508],
    "👍🏽": [43722],
    "İstanbul": [328, 16384, 11231],
    "naÃ¯ve": [1097, 35689, 563],
    "A\n'll 11p223RF☆ho!!to? of a cat": [
        *(320, 1342, 272, 272, 335, 273, 273, 274, 16368, 13439, 2971, 748, 531, 286, 539, 320),
        2368,
    ],
    "a photo of a dog<|endoftext|> and a cat": [320, 1125, 539, 320, 1929, EOT, 537, 320, 2368],
    "<|ENDOFTEXT|><|startoftext|>": [EOT, SOT],
}
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates, controls, unassigned: all
PRINTABLE = st.text(st.sampled_from([chr(c) for c in range(32, 127) if chr(c) != "&"]))
COMMON_PAIRS = st.text("theinaro", max_size=200)  # letters that merge often


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    assert encode(text) == GOLDEN[text]


def test_tokenize_frames_and_pads():
    ids = tokenize(list(GOLDEN))
    assert ids.shape == (len(GOLDEN), 77) and ids.dtype == np.int32
    for row, expected in zip(ids, GOLDEN.values(), strict=True):
        expected = [SOT, *expected, EOT]
        assert row.tolist() == expected + [0] * (77 - len(expected))


def test_tokenize_shapes():
    assert (
        tokenize("a cat").tolist() == tokenize(["a cat"]).tolist() == tokenize(("a cat",)).tolist()
    )
    assert tokenize("a cat", context_length=4).tolist() == [[SOT, 320, 2368, EOT]]
    assert tokenize([]).shape == (0, 77)
    assert tokenize([], context_length=5).shape == (0, 5)


def test_vocabulary_file_is_openais():
    data = (files("npclip") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    sha256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert hashlib.sha256(data).hexdigest() == sha256


def test_vocabulary_is_complete():
    vocabulary = tokenizer._vocabulary(VOCAB_SIZE)
    assert len(vocabulary.spelling) == VOCAB_SIZE
    assert len(vocabulary.merges) == len(set(vocabulary.merges.values())) == VOCAB_SIZE - 514
    assert sorted(vocabulary.byte_ids) == list(range(256))
    # What the merge order of _merge rests on: both parts of a merge are older than the merge.
    assert all(max(pair) < new for pair, new in vocabulary.merges.items())


def test_special_tokens_as_plain_text():
    text = "a dog<|endoftext|>"
    assert encode(text) == [320, 1929, EOT]
    plain = encode(text, special_tokens=False)
    assert plain[:2] == [320, 1929] and max(plain) < SOT
    assert decode(plain) == "a dog <| endoftext |> "
    assert (tokenize(text, special_tokens=False)[0] == EOT).sum() == 1


def test_case_folding_lookalike_is_no_special_token():
    # IGNORECASE lets the long s match "s", so the pattern finds it as one word, as openai/CLIP's.
    assert max(encode("<|\N{LATIN SMALL LETTER LONG S}tartoftext|>!")) < SOT


def test_too_long():
    fits = "cat " * 75
    assert tokenize(fits)[0, -1] == EOT
    with pytest.raises(
        TextTooLongError, match=r"text 1 has 78 tokens.* 77 fit.*truncate=True"
    ) as e:
        tokenize(["a cat", "cat " * 76])
    assert isinstance(e.value, RuntimeError)  # which openai/CLIP raises
    assert "'cat cat cat" in str(e.value) and len(str(e.value)) < 200
    assert tokenize("cat " * 500, truncate=True).tolist() == tokenize(fits).tolist()
    assert tokenize("a red cat", context_length=3, truncate=True).tolist() == [[SOT, 320, EOT]]
    assert tokenize("a", context_length=2, truncate=True).tolist() == [[SOT, EOT]]


def test_wrong_arguments():
    with pytest.raises(InputTypeError, match="text 1 must be a str, not int"):
        tokenize(["a cat", 5])
    with pytest.raises(InputTypeError, match="text 0 must be a str, not NoneType"):
        tokenize([None])
    with pytest.raises(InputTypeError, match="not NoneType"):
        tokenize(None)
    with pytest.raises(InputError, match="at least 2: 1"):
        tokenize("a cat", context_length=1)
    for index in (-1, VOCAB_SIZE):
        with pytest.raises(InputError, match=f"not {index}"):
            decode([320, index])


def test_a_part_of_a_longer_list():
    assert tokenize(["a cat"], first_index=64).tolist() == tokenize(["a cat"]).tolist()
    with pytest.raises(TextTooLongError, match=r"^text 65 has 102 tokens"):
        tokenize(["a cat", "cat " * 100], first_index=64)


def test_decode():
    assert decode([]) == ""
    assert decode(encode("It's a CAFÉ, 42 km")) == "it 's a café , 4 2 km "
    assert decode(tokenize("a cat", context_length=5)[0]) == "<|startoftext|>a cat <|endoftext|>!"
    assert decode(encode("日本語")[:1]).endswith("日")
    assert decode([tokenizer._vocabulary(VOCAB_SIZE).byte_ids[0xE6]]) == "\N{REPLACEMENT CHARACTER}"


@given(st.one_of(ANY_TEXT, PRINTABLE), st.integers(2, 20), st.booleans())
def test_every_text_gives_a_valid_row(text, length, special_tokens):
    ids = tokenize(text, length, truncate=True, special_tokens=special_tokens)
    assert ids.shape == (1, length) and ids.dtype == np.int32
    row = ids[0].tolist()
    assert row[0] == SOT and EOT in row and all(0 <= i < VOCAB_SIZE for i in row)
    end = min(len(encode(text, special_tokens)) + 1, length - 1)
    assert row[end] == EOT and not any(row[end + 1 :])
    if not special_tokens:
        assert SOT not in row[1:] and EOT not in row[:end]


@given(PRINTABLE)
def test_round_trip(text):
    ids = encode(text)
    assert encode(decode(ids)) == ids
    assert decode(ids).replace(" ", "") == text.lower().replace(" ", "")


@given(PRINTABLE)
def test_shortcut_for_plain_text_changes_nothing(text):
    import ftfy

    assert ftfy.fix_text(text) == text


def textbook_merge(ids, merges):
    """openai/CLIP's loop: merge all places of the pair learned first, then look at all again."""
    while pairs := [pair for pair in zip(ids, ids[1:], strict=False) if pair in merges]:
        first = min(pairs, key=merges.__getitem__)
        merged = []
        for i in ids:
            if merged and (merged[-1], i) == first:
                merged[-1] = merges[first]
            else:
                merged.append(i)
        ids = merged
    return ids


@settings(max_examples=300)
@given(st.one_of(COMMON_PAIRS, st.text("ab", max_size=60), st.text(max_size=60)).filter(len))
def test_merge_is_the_textbook_loop(word):
    vocabulary = tokenizer._vocabulary(VOCAB_SIZE)
    ids = [vocabulary.byte_ids[byte] for byte in word.encode()]
    ids[-1] += 256
    assert tokenizer._merge(ids, vocabulary.merges) == textbook_merge(ids, vocabulary.merges)


def test_merge_leftmost_first():
    a, b, merges = 1, 2, {(1, 1): 10, (10, 2): 11}
    assert tokenizer._merge([a] * 3, merges) == [10, a]
    assert tokenizer._merge([a] * 4 + [b], merges) == [10, 11]
    assert tokenizer._merge([a], merges) == [a]


SIZES = st.sampled_from([514, 515, 1000, 4096, 8192, VOCAB_SIZE - 1, VOCAB_SIZE])


@settings(deadline=None)  # the first of a size makes its tables
@given(st.one_of(PRINTABLE, COMMON_PAIRS, st.text(max_size=60)), SIZES)
def test_a_small_vocabulary_is_the_textbook_loop_with_its_first_merges(text, size):
    vocabulary = tokenizer._vocabulary(VOCAB_SIZE)
    first = {pair: new for pair, new in vocabulary.merges.items() if new < size - 2}
    assert tokenizer._vocabulary(size).merges == first
    expected = []
    for word in tokenizer._word_pattern(False).findall(tokenizer._clean(text)):
        ids = [vocabulary.byte_ids[byte] for byte in word.encode()]
        ids[-1] += 256
        expected += textbook_merge(ids, first)
    assert encode(text, special_tokens=False, vocab_size=size) == expected


@given(ANY_TEXT, SIZES, st.integers(2, 20))
def test_a_small_vocabulary_gives_valid_rows(text, size, length):
    ids = tokenize(text, length, truncate=True, special_tokens=False, vocab_size=size)[0]
    assert ids[0] == size - 2 and ids.max() == ids[ids.argmax()] == size - 1
    assert (ids == size - 1).sum() == 1 and not ids[ids.argmax() + 1 :].any()
    assert (ids[1 : ids.argmax()] < size - 2).all()


@given(PRINTABLE, SIZES)
def test_a_small_vocabulary_decodes_what_it_encodes(text, size):
    ids = encode(text, special_tokens=False, vocab_size=size)
    assert decode(ids, vocab_size=size) == decode(encode(text, special_tokens=False))
    assert encode(decode(ids, size), special_tokens=False, vocab_size=size) == ids


def test_special_tokens_of_a_small_vocabulary_are_the_last_two():
    assert tokenizer.special_ids() == (SOT, EOT)
    ids = encode("<|startoftext|>a<|endoftext|>", vocab_size=1000)
    assert ids == [998, 320, 999]
    assert decode(ids, vocab_size=1000) == "<|startoftext|>a <|endoftext|>"
    assert encode("a cat", vocab_size=514) == [256 + 64, 66, 64, 256 + 83]


@pytest.mark.parametrize("size", [-1, 11, 513])
def test_a_vocabulary_holds_at_least_the_bytes(size):
    for call in (
        lambda: tokenize("a", vocab_size=size),
        lambda: encode("", vocab_size=size),
        lambda: decode([], vocab_size=size),
    ):
        with pytest.raises(InputError, match=f"at least 514.*: {size} "):
            call()


def test_a_model_with_spare_embeddings_has_the_whole_vocabulary():
    assert tokenize("a cat", vocab_size=50_000).tolist() == tokenize("a cat").tolist()
    with pytest.raises(InputError, match=r"0 \.\. 999, not 1000"):
        decode([1000], vocab_size=1000)


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "the quick " * 50_000, "é" * 100_000, "<" * 100_000]
)
def test_long_texts_take_seconds_at_most(text):
    assert decode(encode(text)).replace(" ", "") == text.replace(" ", "")


def test_threads_share_the_vocabulary():
    tokenizer._vocabulary.cache_clear()
    tokenizer._encode_cached.cache_clear()
    texts, results = list(GOLDEN) * 10, []
    threads = [threading.Thread(target=lambda: results.append(tokenize(texts))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all((ids == results[0]).all() for ids in results)


def test_import_loads_nothing():
    code = "import sys, npclip.tokenizer; print({'ftfy', 'regex'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
