"""The data of npclip train: the index, the order, augmentation, batches; and recall."""

import dataclasses
import functools
import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_rule import new_rng
from PIL import Image
from tiny_models import VIT

from npclip.config import Metadata
from npclip.errors import ImageError, InputError, TrainingError
from npclip.evaluation.retrieval import recall
from npclip.preprocess import preprocess
from npclip.sources import Pair, open_pairs
from npclip.tokenizer import tokenize
from npclip.training.augment import (
    SIDES,
    augment,
    background,
    has_alpha,
    jitter,
    on_ground,
    random_box,
)
from npclip.training.data import Loader, shuffled
from npclip.training.index import Index, build_index
from npclip.training.settings import AugmentSettings

CONFIG = dataclasses.replace(VIT, vocab_size=600, context_length=16)
PLAIN = AugmentSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def png(level, size=(20, 24), mode="RGB"):
    image = Image.new(mode, size, level)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def pairs_of(count, bad=()):
    """Pairs whose image and texts tell their number."""
    for i in range(count):
        data = b"no image" if i in bad else png((i, i, i))
        yield Pair(f"id {i}", (f"{i}", f"picture {i}"), "x.parquet", data=data)


@pytest.fixture
def index(tmp_path):
    return build_index(pairs_of(23, bad=(3, 7)), tmp_path / "index")


# The order


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**63), st.integers(0, 9))
def test_every_epoch_is_a_permutation(count, seed, epoch):
    order = shuffled(np.arange(count), count, [seed, epoch])
    assert sorted(order.tolist()) == list(range(count))
    some = np.arange(count)[::-1][: count // 2]
    assert (shuffled(some, count, [seed, epoch]) == order[some]).all()


def test_orders_look_random():
    """No place prefers a number, nor a number the one after it: chi squared over many seeds."""
    count, seeds = 10, 2000
    orders = np.array([shuffled(np.arange(count), count, [seed, 0]) for seed in range(seeds)])
    distances = (orders[:, 4] - orders[:, 5]) % count - 1
    for values, bins in ((orders[:, 0], count), (orders[:, -1], count), (distances, count - 1)):
        found = np.bincount(values, minlength=bins)
        assert ((found - seeds / bins) ** 2 / (seeds / bins)).sum() < 40  # 9 degrees of freedom
    large = shuffled(np.arange(1000), 10**9, [5, 0])
    assert len(set(large.tolist())) == 1000 and 0.4e9 < large.mean() < 0.6e9


# The index


def test_an_index_has_all_pairs_and_reads_them(tmp_path, index):
    assert (len(index), index.failed) == (23, 0)
    assert index[5].id == "id 5" and index[22].texts == ("22", "picture 22")
    assert index.read(index[0]) == png((0, 0, 0))
    again = Index(tmp_path / "index")
    assert [again[i] for i in range(23)] == [index[i] for i in range(23)]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_what_is_no_pair_is_counted(tmp_path):
    bad = Pair("bad", reason="no text")
    found = build_index([bad, *pairs_of(5), bad], tmp_path / "i", most=4)
    assert (len(found), found.failed) == (4, 1)
    assert (tmp_path / "i" / "failed.jsonl").read_text() == '{"id": "bad", "reason": "no text"}\n'
    with pytest.raises(InputError, match="no pair of an image and a text: bad: no text"):
        build_index([bad], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_index_that_is_broken_or_outdated(tmp_path, index):
    (tmp_path / "index" / "pairs.jsonl").write_bytes(b"{}\n")
    with pytest.raises(TrainingError, match="broken"):
        Index(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        Index(tmp_path / "index")
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    build_index([Pair("a", ("t",), str(tmp_path / "s.tar"), 10, 5)], tmp_path / "of-tar")
    (tmp_path / "s.tar").write_bytes(b"x" * 99)
    with pytest.raises(InputError, match=r"s\.tar is not what it was"):
        Index(tmp_path / "of-tar")


# Augmentation


def augmented(image, size, settings, rng, text="a cat"):
    return augment(image, text, size, rng, settings=settings)


def test_boxes_follow_the_law():
    """Areas are uniform, ratios uniform in the logarithm, places uniform."""
    rng = np.random.default_rng(0)
    boxes = [random_box((400, 300), (0.1, 0.3), (0.5, 2.0), rng) for _ in range(4000)]
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 400).all() and (bottom <= 300).all()
    shares = (right - left) * (bottom - top) / (400 * 300)
    logs = np.log2((right - left) / (bottom - top))
    places = left / (400 - (right - left))
    for values, low, high in ((shares, 0.1, 0.3), (logs, -1, 1), (places, 0, 1)):
        quarters = np.quantile(values, [0.25, 0.5, 0.75])
        expected = low + (high - low) * np.array([0.25, 0.5, 0.75])
        assert np.abs(quarters - expected).max() < 0.04 * (high - low), (quarters, expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 10), (43, 0, 56, 10)),
        ((10, 100), (0, 43, 10, 56)),
        ((1, 1), (0, 0, 1, 1)),
        ((12, 10), (0, 0, 12, 10)),
    ],
)
def test_where_no_crop_fits_it_is_the_centre(size, expected):
    """torchvision's fallback, here because 10 times a larger area than all is drawn."""
    box = random_box(size, (100.0, 100.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert box == expected


def test_without_augmentation_it_is_the_preprocessing(pictures):
    image = Image.open(pictures / "chelsea.png").convert("RGB").crop((0, 0, 300, 300))
    levels = augmented(image, 32, PLAIN, np.random.default_rng(0))
    mean, std = (0.0, 0.0, 0.0), (1 / 255,) * 3
    assert np.abs(preprocess(image, 32, mean, std) - levels.transpose(2, 0, 1)).max() < 1e-3
    flipped = augmented(image, 32, dataclasses.replace(PLAIN, flip=1.0), np.random.default_rng(0))
    assert (flipped == levels[:, ::-1]).all()
    always = dataclasses.replace(PLAIN, flip=1.0)
    kept = augmented(image, 32, always, np.random.default_rng(0), "a cat on the Left")
    assert (kept == levels).all()
    assert SIDES.search("turned counterclockwise") and not SIDES.search("a bright leftover")


def test_colours_change_within_their_limits():
    image = Image.new("RGB", (8, 8), (100, 60, 20))
    rng = np.random.default_rng(0)
    bright = dataclasses.replace(PLAIN, brightness=0.5)
    found = np.array([np.asarray(jitter(image, bright, rng))[0, 0, 0] for _ in range(200)])
    assert 50 <= found.min() < 60 and 140 < found.max() <= 150
    grey = jitter(image, dataclasses.replace(PLAIN, saturation=1.0), rng)
    assert np.ptp(np.asarray(grey)[0, 0]) != 80
    flat = np.asarray(jitter(image, dataclasses.replace(PLAIN, contrast=1.0), rng)).astype(int)
    assert np.ptp(flat[..., 0]) == 0
    assert jitter(image, PLAIN, rng) is image


def test_what_is_transparent_gets_a_background():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rng = np.random.default_rng(0)
    blue = dataclasses.replace(PLAIN, background="blue", flip=0.5)
    assert (augmented(image, 8, blue, rng) == (0, 0, 255)).all()
    at_random = dataclasses.replace(PLAIN, background="random")
    found = [augmented(image, 8, at_random, rng) for _ in range(40)]
    assert len({levels.tobytes() for levels in found}) == 40
    gradients = sum(
        np.ptp(levels) > 0 and levels[0, 0].tolist() != levels[-1, -1].tolist() for levels in found
    )
    assert 8 < gradients < 32
    opaque = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    assert (augmented(opaque, 8, at_random, rng) == (255, 0, 0)).all()
    assert (augmented(image, 8, PLAIN, rng) == (255, 0, 0)).all()  # as convert("RGB") sees it
    assert np.asarray(on_ground(image, "random"))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(on_ground(image, "blue"))[0, 0].tolist() == [0, 0, 255]
    assert on_ground(image, None) is image
    assert background("#010203", 4, rng).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_of_image_is_used(mode):
    settings_ = AugmentSettings((0.5, 1), (0.5, 2), 0.5, 0.1, 0.1, 0.1, "random")
    image = Image.new(mode, (9, 7))
    levels = augmented(image, 6, settings_, np.random.default_rng(0))
    assert levels.shape == (6, 6, 3) and levels.dtype == np.uint8
    assert has_alpha(image) == (mode in ("LA", "PA", "RGBA"))


def test_an_image_that_cannot_be_used():
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ImageError, match="mode RGB"):
        augmented(image, 0, PLAIN, np.random.default_rng(0))


# Batches


def by(settings):
    return functools.partial(augment, settings=settings)


def loader(index, workers=1, batch=5, **options):
    changing = AugmentSettings((0.5, 1), flip=0.5, brightness=0.2)
    return Loader(index, CONFIG, Metadata(), by(changing), batch, 1, workers, **options)


def batches(loader, first, count):
    generator = loader.batches(first)
    found = list(itertools.islice(generator, count))
    generator.close()
    return found


def same(one, other):
    return one.images.tobytes() == other.images.tobytes() and (one.ids == other.ids).all()


def test_a_batch_does_not_depend_on_threads_or_on_where_the_run_began(index):
    alone = batches(loader(index), 0, 9)
    assert all(map(same, alone, batches(loader(index, workers=4), 0, 9)))
    assert all(map(same, alone[6:], batches(loader(index), 6, 3)))
    assert not same(alone[0], alone[4])
    other = Loader(index, CONFIG, Metadata(), by(PLAIN), 5, seed=2)
    assert not same(alone[0], batches(other, 0, 1)[0])


def test_images_and_texts_belong_together_and_an_epoch_has_each_once(index):
    found = Loader(index, CONFIG, Metadata(mean=(0, 0, 0), std=(1, 1, 1)), by(PLAIN), 5, 0, 2)
    epochs = []
    for epoch in range(2):
        seen = []
        for batch in batches(found, epoch * found.steps_per_epoch, found.steps_per_epoch):
            assert len(batch.images) + len(batch.failed) == 5
            assert batch.images.dtype == np.float32 and batch.images.shape[1:] == (3, 16, 16)
            for pixels, ids in zip(batch.images, batch.ids, strict=True):
                number = round(float(pixels[0, 0, 0]) * 255)
                texts = [str(number), f"picture {number}"]
                expected = tokenize(texts, CONFIG.context_length, vocab_size=600).tolist()
                seen.append((number, expected.index(ids.tolist())))
            seen += [(int(record.id.split()[1]), 0) for record, _ in batch.failed]
        numbers = [number for number, _ in seen]
        assert len(set(numbers)) == len(numbers) == 20
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert {text for seen in epochs for _, text in seen} == {0, 1}  # either is drawn


def test_bad_samples_are_left_out_and_told(index):
    found = [
        failure for batch in batches(loader(index, batch=23), 0, 1) for failure in batch.failed
    ]
    assert sorted(record.id for record, _ in found) == ["id 3", "id 7"]
    assert "not an image file" in found[0][1]


def test_a_batch_that_cannot_be_read_at_all(tmp_path):
    index = build_index(pairs_of(4, bad=range(4)), tmp_path / "i")
    with pytest.raises(TrainingError, match="none of 4 images can be read"):
        batches(loader(index, batch=4), 0, 1)
    with pytest.raises(InputError, match="4 pairs do not fill a batch of 5"):
        loader(index)


def test_images_of_parquet_and_limits_of_pixels(tmp_path):
    images = [png((9, 9, 9)), png((8, 8, 8), (100, 100))]
    pq.write_table(pa.table({"image": images, "text": ["a", "b"]}), tmp_path / "p.parquet")
    index = build_index(open_pairs([str(tmp_path / "p.parquet")]), tmp_path / "i")
    (batch,) = batches(loader(index, batch=2, max_pixels=1000), 0, 1)
    assert len(batch.images) == 1 and "pixels are more than 1000" in batch.failed[0][1]


# Recall


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_recall_is_what_counting_says():
    rng = new_rng()
    images, texts = unit(rng.standard_normal((600, 4))), unit(rng.standard_normal((700, 4)))
    pairs = [(i, i) for i in range(600)] + [(i % 600, i) for i in range(600, 700)]
    pairs += [(i, i + 1) for i in range(50)]
    found = recall(images, texts, pairs)
    own = np.zeros((600, 700), bool)
    own[tuple(np.array(pairs).T)] = True
    for similarity, mine, name in (
        (images @ texts.T, own, "image_to_text"),
        (texts @ images.T, own.T, "text_to_image"),
    ):
        order = np.argsort(-similarity, axis=1)
        for k in (1, 5, 10):
            hits = np.take_along_axis(mine, order[:, :k], 1).any(1)
            assert found[f"{name}@{k}"] == pytest.approx(hits.mean(), abs=1e-12)


def test_a_model_to_which_all_is_the_same_finds_nothing():
    same = np.ones((20, 3)) / 3**0.5
    assert set(recall(same, same, [(i, i) for i in range(20)]).values()) == {0.0}
    broken = np.full((20, 3), np.nan)
    assert set(recall(broken, same, [(i, i) for i in range(20)]).values()) == {0.0}
    assert recall(np.eye(3), np.eye(3), [(i, i) for i in range(3)])["text_to_image@1"] == 1


def test_recall_wants_a_pair_for_each():
    for pairs in ([], [(0, 0)], [(0, 0), (1, 1), (2, 1)]):
        with pytest.raises(InputError, match="must be in a pair"):
            recall(np.eye(2), np.eye(2), pairs)
