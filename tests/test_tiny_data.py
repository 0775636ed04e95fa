"""tools/tiny: from packages to shards, on drawings made here; nothing is downloaded."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import __main__ as command
from tiny import (
    augment,
    captions,
    card,
    check,
    contact_sheet,
    download,
    drawings,
    evaluate,
    failures,
    selection,
    splits,
    start,
    train,
    views,
)
from tiny.drawings import Drawing
from tiny.sources import SOURCES, STYLE
from tiny.splits import Picture

import npclip
from npclip.errors import DownloadError, InputError
from npclip.evaluation import recall
from npclip.hub import BUNDLED
from npclip.training import from_checkpoint, restore
from npclip.training.settings import read_settings

BY_NAME = {source.name: source for source in SOURCES}


def svg(body, width=40, height=40, root=""):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" {root}>{body}</svg>'
    )


DISC = '<circle cx="20" cy="20" r="9" fill="#c00"/>'


class TestSources:
    def test_every_source_is_pinned_and_attributed(self):
        for source in SOURCES:
            assert len(bytes.fromhex(source.sha256)) == 32
            assert source.licence and source.author and source.url.startswith("https://")
        assert len(BY_NAME) == len(SOURCES)

    def test_nothing_that_asks_for_the_same_licence_is_trained_on(self):
        trained = {source.licence for source in SOURCES if source.use == "train"}
        assert trained <= {"CC-PDDC", "Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-3.0"}
        assert [s.name for s in SOURCES if s.use == "style"] == [STYLE]

    def test_archives_are_named_as_their_clients_name_them(self):
        assert BY_NAME["noto"].archive == "iconify-json-noto-1.2.9.tgz"
        assert BY_NAME["openclipart"].archive == "openclipart-svg_1%3a0.18+dfsg-19_all.deb"


class TestDownload:
    @pytest.fixture
    def source(self, tmp_path):
        """A package that is there already, with a file that nothing needs and one outside."""
        path = tmp_path / "archives" / "iconify-json-noto-9.tgz"
        path.parent.mkdir()
        with tarfile.open(path, "w:gz") as archive:
            for name in ("package/icons.json", "package/other.js", "../package/info.json"):
                member = tarfile.TarInfo(name)
                member.size = 2
                archive.addfile(member, io.BytesIO(b"{}"))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return BY_NAME["noto"]._replace(version="9", sha256=sha256)

    def test_unpacks_what_is_read_and_nothing_else(self, source, tmp_path):
        download.download(tmp_path, [source])
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert (
            sorted(path.name for path in files) == ["icons.json", "iconify-json-noto-9.tgz"][::-1]
        )

    def test_another_archive_is_refused_and_not_unpacked(self, source, tmp_path):
        with pytest.raises(DownloadError, match=r"iconify-json-noto-9.tgz: its SHA-256 is"):
            download.download(tmp_path, [source._replace(sha256="0" * 64)])
        assert not (tmp_path / "sources").exists()

    @pytest.mark.parametrize(("name", "client"), [("noto", "npm"), ("openclipart", "apt-get")])
    def test_a_client_that_is_missing_or_fails(self, name, client, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(DownloadError, match=f"{name}: {client} does not start"):
            download.fetch(BY_NAME[name], tmp_path)
        (tmp_path / client).write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
        (tmp_path / client).chmod(0o755)
        with pytest.raises(DownloadError, match=r"by hand\): no such version"):
            download.fetch(BY_NAME[name], tmp_path)


RDF = """<metadata><rdf:RDF><{cc}Work rdf:about=""><dc:title> A  red
 &amp; black bird</dc:title><dc:subject><rdf:Bag><rdf:li>bird</rdf:li><rdf:li></rdf:li>
<rdf:li>hash</rdf:li></rdf:Bag></dc:subject><dc:creator><{cc}Agent><dc:title>Jon Phillips
</dc:title></{cc}Agent></dc:creator></{cc}Work></rdf:RDF></metadata>"""


class TestDrawings:
    @pytest.mark.parametrize("prefix", ["", "cc:"])
    def test_reads_title_keywords_and_authors(self, prefix):
        found = drawings.read_rdf(svg(RDF.replace("{cc}", prefix) + DISC))
        assert found == ("A red & black bird", ("bird", "hash"), ("Jon Phillips",))

    @pytest.mark.parametrize("text", ["", "<Work></Work>", "<Work><dc:title>a</Work>", "<Work>&x;"])
    def test_no_or_broken_metadata_is_no_error(self, text):
        assert drawings.read_rdf(svg(text)) == ("", (), ())

    def test_an_icon_has_the_box_of_its_set_or_its_own(self, tmp_path):
        write_icons(tmp_path / "noto", {"cat": {"body": DISC}, "dog": {"body": "", "width": 9}})
        cat, dog = drawings.read_drawings(BY_NAME["noto"], tmp_path)
        assert 'viewBox="0 0 40 40"' in cat.svg and DISC in cat.svg
        assert 'viewBox="0 0 9 40"' in dog.svg
        assert (cat.codepoints, cat.category) == ("1f408", "Animals Nature")

    def test_links_of_clip_art_are_left_out(self, tmp_path):
        root = tmp_path / "openclipart/usr/share/openclipart/svg/animals"
        root.mkdir(parents=True)
        (root / "cat_01.svg").write_bytes(svg(DISC).encode() + b"\xff")
        (root / "same.svg").symlink_to("cat_01.svg")
        (found,) = drawings.read_drawings(BY_NAME["openclipart"], tmp_path)
        assert (found.name, found.category) == ("animals/cat_01", "animals")


class TestRender:
    @pytest.fixture
    def render(self):
        pytest.importorskip("resvg_py")
        from tiny.render import render

        return render

    def pixels(self, image):
        assert isinstance(image, bytes), image
        with Image.open(io.BytesIO(image)) as picture:
            return np.asarray(picture)

    def test_a_drawing_fills_the_square_and_keeps_its_shape(self, render):
        tall = '<rect x="3" y="1" width="10" height="30" fill="#00f"/>'
        rgba = self.pixels(render(svg(tall)))
        assert rgba.shape == (96, 96, 4) and rgba.dtype == np.uint8
        shown = rgba[..., 3] > 127
        assert shown.any(1).sum() == pytest.approx(96, abs=1)
        assert shown.any(0).sum() == pytest.approx(32, abs=1)
        assert rgba[48, 48].tolist() == [0, 0, 255, 255] and not rgba[48, 0].any()

    def test_sizes_in_points_and_none_at_all_are_sizes(self, render):
        for size in ("30pt", "2cm"):
            self.pixels(render(svg(DISC, size, size, 'viewBox="0 0 40 40"')))
        self.pixels(render(svg(DISC, "100%", "100%", 'viewBox="0 0 40 40"')))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (svg(""), "is blank"),
            (svg('<rect width="40" height="40" fill="#fff"/>'), "is blank"),
            (svg('<rect width="40" height="1"/>'), "is too narrow"),
            (svg("<g>"), "does not parse"),
            ("", "does not parse"),
            ("no picture", "does not parse"),
            (svg(DISC + "<!--" + "x" * (1 << 20) + "-->"), "is too large"),
            (svg('<image href="/etc/passwd" width="9" height="9"/>'), "names another file"),
            (svg('<use xlink:href="other.svg#a"/>'), "names another file"),
            (svg(f"<image xlink:href = 'file:///etc/passwd'/>{DISC}"), "names another file"),
            ('<!DOCTYPE svg [<!ENTITY a "b">]>' + svg(DISC), "names another file"),
        ],
    )
    def test_what_has_no_picture_says_why(self, render, text, reason):
        assert str(render(text)).startswith(reason)

    def test_a_file_that_a_drawing_names_is_never_read(self, render, tmp_path):
        """resvg alone would draw it."""
        Image.new("RGB", (4, 4), "lime").save(tmp_path / "secret.png")
        body = f'<image href="{tmp_path}/secret.png" width="40" height="20"/>{DISC}'
        assert render(svg(body)) == "names another file"
        linked = f'<a href="https://example.org">{DISC}</a><use href="#d"/>'
        assert isinstance(render(svg(linked)), bytes)

    def test_one_that_takes_too_long_is_given_up_and_the_rest_are_drawn(self, render, monkeypatch):
        from tiny import render as module

        monkeypatch.setattr(module, "MAX_SECONDS", 1.5)
        monkeypatch.setattr(module, "render", sleep_or_render)
        first, slow, dead, last = module.render_all([svg(DISC), "sleep", "die", svg(DISC)], jobs=1)
        assert isinstance(first, bytes) and first == last
        assert slow == dead == "takes too long"

    def test_pictures_in_pictures_in_pictures_are_no_danger(self, render):
        use = '<use xlink:href="#{}"/>'
        levels = "".join(f'<g id="a{n}">{use.format(f"a{n - 1}") * 10}</g>' for n in range(1, 12))
        bomb = svg(f'<defs><g id="a0">{DISC}</g>{levels}</defs>{use.format("a11")}')
        assert isinstance(render(bomb), str)


def sleep_or_render(text):
    """In a process of its own, which imports this module."""
    from tiny.render import render

    if text == "sleep":
        time.sleep(60)
    if text == "die":
        os._exit(1)
    return render(text)


class TestSelection:
    @pytest.mark.parametrize(
        "name",
        ["woman-cook-medium-dark-skin-tone", "open-hands-light", "flag-for-libya", "keycap-3",
         "one-oclock", "letter-q", "ok-button", "waving-hand-medium"],
    )  # fmt: skip
    def test_variants_and_writing_are_left_out(self, name):
        assert not selection.is_wanted(BY_NAME["noto"], Drawing("noto", name, ""))

    @pytest.mark.parametrize("name", ["woman-cook", "light-bulb", "dark-cloud", "brown-mushroom"])
    def test_pictures_stay(self, name):
        assert selection.is_wanted(BY_NAME["noto"], Drawing("noto", name, ""))

    def test_clip_art_and_icons(self):
        art, icons = BY_NAME["openclipart"], BY_NAME["icon-park"]
        for name in ("signs_and_symbols/flags/europe/ireland", "shapes/stars/star_47pt18step"):
            assert not selection.is_wanted(art, Drawing("openclipart", name, ""))
        assert selection.is_wanted(art, Drawing("openclipart", "food/flagel", ""))
        assert not selection.is_wanted(icons, Drawing("icon-park", "a", "", category="Arrows"))
        assert not selection.is_wanted(icons, Drawing("icon-park", "wechat-logo", ""))


ANNOTATIONS = {"\U0001f408": ("cat", ("animal", "pet", "cat")), "❤": ("red heart", ("love",))}
CODES = {"cat": "1f408", "blackheart": "2764"}


class TestCaptions:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("wind-turbine-2-flat", "wind turbine"),
            ("Sandwich_One", "sandwich one"),
            ("dog_04.svg", "dog"),
            ("naïve-café-duo", "naive cafe"),
            ("woman\N{RIGHT SINGLE QUOTATION MARK}s-hat", "woman's hat"),
            ("404", ""),
        ],
    )
    def test_names_of_files_as_words(self, name, words):
        assert captions.spelled(name) == words

    def test_an_emoji_is_named_by_unicode(self):
        cat = captions.Words(("cat",), ("animal", "pet"), "1f408")
        assert captions.emoji_words(Drawing("noto", "cat", ""), ANNOTATIONS, CODES) == cat
        assert captions.emoji_words(Drawing("noto", "cat-2", ""), ANNOTATIONS, CODES) == cat
        heart = Drawing("noto", "heart", "", codepoints="2764-fe0f")
        words = captions.emoji_words(heart, ANNOTATIONS, CODES)
        assert words == captions.Words(("red heart", "heart"), ("love",), "2764")

    def test_an_emoji_that_unicode_does_not_know_has_its_own_name(self):
        new = Drawing("noto", "pickled-plum", "", codepoints="1fffd")
        assert captions.emoji_words(new, ANNOTATIONS, CODES).names == ("pickled plum",)
        joined = Drawing("fxemoji", "pickledplum", "")
        assert captions.emoji_words(joined, ANNOTATIONS, CODES) is None

    @pytest.mark.parametrize(
        ("file", "title", "keywords", "expected"),
        [
            ("a/x", "Dog 04 Drawn", ("dog", "animal"), ("dog drawn", 2)),
            ("a/bulb_jon_phil_04", "Clipart by Jon - b1", ("light",), ("bulb", 1)),
            ("a/x", "Zanzara cretina", ("insect", "animal"), ("insect", 2)),
            ("a/x", "icons", ("hash", "11"), None),
            ("a/x", "Jon Phillips", ("jon phillips",), None),
            ("a/aiga_no_dogs_", "AIGA_Symbol_Signs", (), ("no dogs", 0)),
        ],
    )
    def test_clip_art_is_named_by_what_says_something(self, file, title, keywords, expected):
        words = "dog", "dogs", "drawn", "animal", "bulb", "light", "no"
        known = dict.fromkeys(words, 9) | {"insect": 2}
        art = Drawing("openclipart", file, "", title, keywords, "", "", ("Jon Phillips",))
        words = captions.art_words(art, {}, known)
        assert (words and words.names[0]) == (expected and expected[0])
        assert "hash" not in (words.keywords if words else ())

    def test_a_title_of_a_whole_collection_gives_way(self):
        art = Drawing("openclipart", "food/pear_01", "", "Fruit", ())
        known = {"pear": 1, "fruit": 1}
        assert captions.art_words(art, {"Fruit": 9}, known).names == ("fruit",)
        assert captions.art_words(art, {"Fruit": 10}, known).names == ("pear",)

    def test_captions_are_the_same_again_and_say_the_name_first(self):
        words = captions.Words(("owl", "night bird"), ("bird", "wise"), "1f989")
        texts = captions.texts_of(words, BY_NAME["noto"], "noto/owl")
        assert texts == captions.texts_of(words, BY_NAME["noto"], "noto/owl")
        assert texts[:3] == ["owl", "owl", "a drawing of an owl"] and "night bird" in texts
        others = {tuple(captions.texts_of(words, BY_NAME["noto"], str(n))) for n in range(20)}
        assert len(others) > 5

    def test_what_may_be_mirrored(self):
        assert captions.may_flip("red apple") and captions.may_flip("brightness")
        for text in ("left arrow", "a clock", "hand pointing right", "music, note", "keyboard"):
            assert not captions.may_flip(f"red apple, {text}")


NAMES = st.lists(
    st.sampled_from(
        [
            *("cat", "cats", "sailboat", "boat", "boats", "buses", "bus", "fly", "flies", "glass"),
            *("red", "hat", "of"),
        ]
    ),
    max_size=4,
).map(" ".join)
PICTURES = st.lists(st.tuples(NAMES, NAMES), max_size=30).map(
    lambda some: [
        Picture(str(n), "noto", a, splits.words_of([a, b])) for n, (a, b) in enumerate(some)
    ]
)


class TestSplits:
    @pytest.mark.parametrize(
        ("plural", "singular"),
        [("cats", "cat"), ("buses", "bus"), ("bus", "bus"), ("flies", "fly"), ("glass", "glass"),
         ("boxes", "box"), ("peaches", "peach"), ("woman's", "woman"), ("gas", "gas")],
    )  # fmt: skip
    def test_stems(self, plural, singular):
        assert splits.stem(plural) == singular

    def test_what_holds_a_word(self):
        words = splits.words_of(["two Sailboats at sea", "peaches, lilies", "a red thing", "hats"])
        for word in ("boat", "peach", "lily", "hat"):
            assert splits.holds_word(words, word)
        assert not splits.holds_word(splits.words_of(["a bo at", "float"]), "boat")
        assert splits.holds_all(words, frozenset({"red", "hat"}))
        assert not splits.holds_all(splits.words_of(["reddish hat"]), frozenset({"red", "hat"}))

    @given(PICTURES, st.sampled_from(["boat", "bus", "glass", "fly", "zebra"]))
    def test_the_index_finds_what_the_definition_says(self, pictures, word):
        index = splits.Index(pictures)
        assert index.word(word) == {p.id for p in pictures if splits.holds_word(p.words, word)}
        parts = frozenset(["red", word])
        assert index.all(parts) == {p.id for p in pictures if splits.holds_all(p.words, parts)}

    @given(st.integers(0, 5), st.randoms(use_true_random=False))
    def test_nothing_held_out_is_trained_on_whatever_the_order(self, seed, random):
        pictures, names = emoji_pictures()
        shuffled = random.sample(pictures, len(pictures))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(splits, "WORDS", 3)
            patch.setattr(splits, "COMMON", 2)
            holdout = splits.choose_holdout(pictures, names, seed)
            again = splits.choose_holdout(shuffled, names, seed)
        assert (again.words, again.combinations) == (holdout.words, holdout.combinations)
        assert holdout.words and holdout.combinations
        for p in pictures:
            split = splits.split_of(p, holdout, seed)
            assert (split == "style") == p.is_style
            if split in ("train", "valid"):
                assert p.concept not in holdout.words.keys() | holdout.combinations.keys()
                assert not any(splits.holds_word(p.words, w) for w in holdout.words.values())
                assert not any(splits.holds_all(p.words, c) for c in holdout.combinations.values())


ANIMALS = "zebra", "lion", "tiger", "otter", "badger", "walrus", "donkey", "camel", "llama", "goat"
COLOURS = "red", "green", "blue", "white"


def emoji_pictures():
    """Five artists' animals, some of which are also drawn in colours."""
    pictures, names = [], {}
    for artist in ("noto", "twemoji", "emojione", "noto-v1", STYLE):
        for animal in ANIMALS:
            for name in (animal, *(f"{colour} {animal}" for colour in COLOURS)):
                names[name] = name
                is_style = artist == STYLE
                group = "Animals Nature" if is_style else ""
                id, words = f"{artist}/{name}", splits.words_of([name, "animal"])
                pictures.append(Picture(id, artist, name, words, group, is_style))
    return pictures, names


def write_icons(place, icons, codes=None, group="Animals Nature"):
    place.mkdir(parents=True)
    codes = codes or {"1f408": "cat"}
    write = lambda name, value: (place / name).write_text(json.dumps(value))  # noqa: E731
    write("icons.json", {"icons": icons, "width": 40, "height": 40})
    write("chars.json", codes)
    write("metadata.json", {"categories": {group: list(icons)}})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shards/ of five artists' emoji and some clip art: rendered, split and written."""
    pytest.importorskip("resvg_py")
    pytest.importorskip("pyarrow")
    from tiny import render, shards

    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    artists = "noto", "twemoji", "emojione", "noto-v1", STYLE
    names = [n for a in ANIMALS for n in (a, *(f"{c} {a}" for c in COLOURS))]
    annotations = {
        chr(0xF0000 + i): {"tts": [n], "default": ["animal"]} for i, n in enumerate(names)
    }
    for source, key in (("cldr-annotations", "annotations"),
                        ("cldr-annotations-derived", "annotationsDerived")):  # fmt: skip
        place = folder / "sources" / source / key / "en"
        place.mkdir(parents=True)
        (place / "annotations.json").write_text(json.dumps({key: {"annotations": annotations}}))
    for artist in artists:
        icons = {}
        for name in names:
            x, y, r = rng.integers(8, 32, 3)
            colour = "".join(f"{c:02x}" for c in rng.integers(0, 200, 3))
            body = f'<circle cx="{x}" cy="{y}" r="8" fill="#{colour}"/>'
            icons[name.replace(" ", "-")] = {"body": body + f'<rect width="{r}" height="{y}"/>'}
        codes = {f"{0xF0000 + i:x}": n.replace(" ", "-") for i, n in enumerate(names)}
        write_icons(folder / "sources" / artist, icons, codes)
    art = folder / "sources/openclipart/usr/share/openclipart/svg/animals"
    art.mkdir(parents=True)
    for n, animal in enumerate(ANIMALS):
        rdf = RDF.replace("{cc}", "").replace("A  red\n &amp; black bird", f"the {animal}")
        body = f'{rdf}<rect x="{n}" y="3" width="{9 + n}" height="9" fill="#b{n}0"/>{DISC}'
        (art / f"{animal}_01.svg").write_text(svg(body))
    used = [BY_NAME[name] for name in (*artists, "openclipart")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "DRAWN", used)
        patch.setattr(splits, "COMMON", 2)
        patch.setattr(splits, "WORDS", 2)
        patch.setattr(splits, "COMBINATIONS", 3)
        patch.setattr(render, "render_all", lambda svgs, jobs: map(render.render, svgs))
        for source in used:
            assert not render.render_source(source, folder)
        shards.make_shards(folder, seed=3)
    return folder


class TestShards:
    def test_every_picture_is_in_one_split_or_counted(self, made):
        rows = {split: check.read(made / "shards" / split) for split in check.SPLITS}
        summary = json.loads((made / "shards" / "split.json").read_text())
        assert {split: len(some) for split, some in rows.items()} == summary["pictures"]
        assert sum(map(len, rows.values())) + sum(summary["left out"].values()) == 5 * 50 + 10
        assert len(rows["style"]) == 50 and {row["set"] for row in rows["style"]} == {STYLE}
        assert len(rows["words"]) == 2 * 4 and len(rows["combinations"]) == 3 * 4
        assert all(row["held_out"] == "words" for row in rows["words"])
        assert {row["held_out"] for row in rows["style"]} == {"", "words", "combinations"}

    def test_nothing_leaks(self, made, capsys):
        assert check.check(made) == []
        report = capsys.readouterr().out
        assert "0 leaks" in report and "CC-BY-SA-4.0" in report and "evaluation only" in report

    @pytest.mark.parametrize("split", ["style", "words", "combinations"])
    def test_what_leaks_is_found(self, made, split):
        rows = {name: check.read(made / "shards" / name) for name in check.SPLITS}
        summary = json.loads((made / "shards" / "split.json").read_text())
        leaked = rows[split][0]
        disguised = leaked | {"id": "x", "concept": "x", "set": "noto", "held_out": ""}
        rows["train"].append(disguised)
        assert any(line.startswith("x: looks like") for line in check.leaks(rows, summary))
        if split != "style":
            rows["train"][-1] = disguised | {"image": rows["train"][0]["image"]}
            assert any(line.startswith("x: ") for line in check.leaks(rows, summary))
        rows["train"][-1] = leaked
        assert any("that is measured" in line for line in check.leaks(rows, summary))

    def test_npclip_reads_them(self, made):
        from npclip.sources import open_sources

        folder = str(made / "shards" / "train")
        texts = [item.read() for item in open_sources([folder], "text")]
        images = [item.read() for item in open_sources([folder], "image")]
        rows = check.read(made / "shards" / "train")
        assert texts == [row["text"] for row in rows]
        assert [image for image in images] == [row["image"] for row in rows]
        assert all(row["text"] in row["texts"] for row in rows)

    def test_sheets_show_every_split(self, made):
        names = {path.stem for path in contact_sheet.write_sheets(made, count=12)}
        assert {"train", "style", "words", "train-augmented", f"set-{STYLE}"} <= names
        with Image.open(made / "sheets" / "style.png") as page:
            assert page.size == (12 * 112, 138)
            assert np.asarray(page).std() > 10


def drawn(colours):
    """A square of 24 pixels in 32: a list of colours, side by side."""
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[4:28, 4:28, 3] = 255
    for column, colour in zip(np.split(np.arange(4, 28), len(colours)), colours, strict=True):
        rgba[4:28, column, :3] = colour
    return Image.fromarray(rgba)


class TestAugment:
    def test_the_same_generator_gives_the_same_picture(self):
        picture = drawn([(200, 0, 0), (0, 0, 200)])
        one, same, other = (
            augment.augment(picture, "x", 48, np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        assert one.shape == (48, 48, 3) and one.dtype == np.uint8
        assert (one == same).all() and (one != other).any()

    @given(st.integers(0, 1 << 32), st.sampled_from([[(0, 0, 0)], [(255, 255, 255), (250, 9, 9)]]))
    def test_the_drawing_can_be_seen(self, seed, colours):
        rgb = augment.augment(drawn(colours), "x", 32, np.random.default_rng(seed))
        assert np.ptp(rgb, axis=(0, 1)).max() > 15

    def test_only_what_may_be_is_mirrored(self, monkeypatch):
        for name in ("ANGLE", "COLOUR", "GREY", "HUE", "LINES"):
            monkeypatch.setattr(augment, name, 0.0)
        picture = drawn([(255, 0, 0), (0, 0, 255)])
        sides = {"owl": set(), "left arrow": set()}
        for text, seen in sides.items():
            for seed in range(12):
                rgb = augment.augment(picture, text, 32, np.random.default_rng(seed))
                middle = rgb[16].astype(int)
                seen.add((middle[10:16] - middle[17:23]).mean(0)[0] > 0)
        assert sides == {"owl": {True, False}, "left arrow": {True}}

    def test_a_colour_that_the_caption_names_stays(self, monkeypatch):
        monkeypatch.setattr(augment, "GREY", 1.0)
        picture = drawn([(220, 0, 0)])
        reds = {}
        for text in ("a red square", "a square"):
            rgb = augment.augment(picture, text, 32, np.random.default_rng(3)).astype(int)
            reds[text] = rgb[16, 16, 0] - rgb[16, 16, 1]
        assert reds["a red square"] > 60 and reds["a square"] == 0

    def test_what_has_one_colour_gets_another(self):
        assert augment.is_one_colour(drawn([(9, 9, 9)]))
        assert not augment.is_one_colour(drawn([(9, 9, 9), (9, 99, 9)]))
        rng = np.random.default_rng(0)
        recoloured = np.asarray(augment.recoloured(drawn([(9, 9, 9)]), rng))
        assert (recoloured[..., 3] == np.asarray(drawn([(9, 9, 9)]))[..., 3]).all()
        colours = np.unique(recoloured[recoloured[..., 3] > 0][:, :3], axis=0)
        assert len(colours) == 1 and abs(colours[0].astype(int) - 9).max() > 20

    def test_what_is_flat_has_few_colours_and_the_same_outline(self):
        shaded = drawn([(10 * i, 90, 250 - 10 * i) for i in range(24)])
        flat = np.asarray(augment.flat(shaded, np.random.default_rng(0)))
        assert len(np.unique(flat[..., :3].reshape(-1, 3), axis=0)) < 10
        assert (flat[..., 3] == np.asarray(shaded)[..., 3]).all()

    def test_contours_are_dark_where_colours_meet_and_at_the_edge(self):
        picture = drawn([(250, 250, 0), (90, 90, 250)])
        for is_filled in (True, False):
            seen = augment.with_contours(picture, np.random.default_rng(0), is_filled)
            row = np.asarray(Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), seen))[16]
            dark = row[:, :3].max(1) < 80
            assert dark[3:5].any() and dark[27:29].any() and dark[14:18].any()
            assert not dark[7:13].any() and not dark[19:25].any()
            assert (row[10, :3] == (250, 250, 0) if is_filled else row[10, :3] == 255).all()

    def test_on_white_nothing_is_random(self):
        rgb = augment.on_white(drawn([(0, 0, 0)]), 64)
        assert rgb.shape == (64, 64, 3) and (rgb[0] == 255).all() and (rgb[32, 32] == 0).all()


@pytest.fixture(scope="module")
def viewed(made):
    """The same folder with three files of views, and how many they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "FILES", 3)
        patch.setattr(views, "TASK", 40)
        count = views.make_views(made, jobs=1)
    return made, count


class TestViews:
    def test_emoji_are_seen_twice_as_often_as_the_rest(self, viewed):
        folder, count = viewed
        rows = check.read(folder / "shards" / "train")
        paths = sorted((folder / "views").iterdir())
        files = [[row["id"] for row in read_file(path)] for path in paths]
        emoji = [row["id"] for row in rows if row["set"] != "openclipart"]
        assert files == [[row["id"] for row in rows], emoji, [row["id"] for row in rows]]
        assert count == sum(map(len, files))

    def test_every_one_differs_and_says_what_its_picture_is(self, viewed):
        folder, _ = viewed
        texts = {row["id"]: row["texts"] for row in check.read(folder / "shards" / "train")}
        rows = check.read(folder / "views")
        assert all(row["text"] in texts[row["id"]] for row in rows)
        assert len({row["image"] for row in rows}) == len(rows)
        with Image.open(io.BytesIO(rows[0]["image"])) as picture:
            config = read_settings(train.SETTINGS).model.config()
            assert (picture.mode, picture.size) == ("RGB", (config.image_resolution,) * 2)

    def test_a_run_trains_on_them(self, viewed, monkeypatch):
        folder, _ = viewed
        short = folder / "short.toml"
        text = train.SETTINGS.read_text()
        for key, value in (("batch", 16), ("steps", 2), ("warmup", 1), ("evaluate_every", 1)):
            text = re.sub(rf"^{key} = .*", f"{key} = {value}", text, flags=re.MULTILINE)
        short.write_text(text)
        monkeypatch.setattr(train, "SETTINGS", short)
        weights = train.train(folder)
        assert weights.stat().st_size <= 8_000_000
        model = npclip.load(str(weights), device="cpu")
        trained = from_checkpoint(folder / "training" / "step-2")[0]
        name = "visual.transformer.resblocks.0.attn.in_proj_weight"
        started = restore(folder / "start")[0].params[name]
        assert 0 < abs(trained[name] - started).max() < 0.01
        short.write_text(text.replace("vision_layers = 6", "vision_layers = 5"))
        with pytest.raises(InputError, match=r"training is of another \[model\]"):
            train.train(folder)
        shutil.rmtree(folder / "training")  # then the first weights are made anew
        train.train(folder)
        assert from_checkpoint(folder / "start")[1].vision_layers == 5
        assert model.context_length == 32


def read_file(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


CONFIG = read_settings(train.SETTINGS).model.config()
HEAD = CONFIG.vision_width // CONFIG.vision_heads
CONTENT = slice(0, CONFIG.vision_width - HEAD)


@pytest.fixture(scope="module")
def patches():
    """Of smooth pictures: they vary in 48 ways."""
    coarse = np.random.default_rng(0).standard_normal((200 * CONFIG.grid**2, 3, 4, 4))
    return np.kron(coarse, np.ones((2, 2))).reshape(len(coarse), -1)


@pytest.fixture(scope="module")
def params(patches):
    return start.first_weights(patches, CONFIG, seed=0)


class TestStart:
    def test_patches_are_cut_as_the_model_cuts_them(self, tmp_path):
        pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        side = CONFIG.image_resolution
        pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        images = []
        for each in pixels:
            stream = io.BytesIO()
            Image.fromarray(each).save(stream, "PNG")
            images.append(stream.getvalue())
        pq.write_table(pa.table({"image": images}), tmp_path / "views.parquet")
        found = start.patches_of(tmp_path / "views.parquet", CONFIG)
        normal = (pixels / 255 - npclip.config.OPENAI_MEAN) / npclip.config.OPENAI_STD
        cut = npclip.ops.patchify(
            np.float32(normal.transpose(0, 3, 1, 2)), CONFIG.vision_patch_size
        )
        np.testing.assert_allclose(found, cut, atol=1e-5)

    def test_filters_give_components_of_variance_one(self, patches, params):
        filters = params["visual.conv1.weight"].reshape(CONFIG.vision_width, -1)[CONTENT]
        covariance = np.cov((patches @ filters.T)[:, :48].T)
        np.testing.assert_allclose(covariance, np.eye(48) * np.diag(covariance), atol=0.02)
        assert np.diag(covariance).min() > 0.7 and np.diag(covariance).max() <= 1.001

    @pytest.mark.parametrize("block", [0, 1])
    def test_each_of_the_first_heads_attends_to_its_neighbour(self, patches, params, block):
        places = params["visual.positional_embedding"][1:].astype(np.float64)
        filters = params["visual.conv1.weight"].reshape(CONFIG.vision_width, -1)
        tokens = patches.reshape(-1, len(places), filters.shape[1]) @ filters.T + places
        seen = places / tokens.std(-1).mean()  # what a LayerNorm leaves of them, on average
        weight = params[f"visual.transformer.resblocks.{block}.attn.in_proj_weight"]
        for head, (down, right) in enumerate(start.NEIGHBOURS[block]):
            rows = slice(head * HEAD, (head + 1) * HEAD)
            q, k = (seen @ part[rows].T for part in np.split(weight, 3)[:2])
            score = q @ k.T / HEAD**0.5
            for place in range(CONFIG.grid**2):
                row, column = place // CONFIG.grid + down, place % CONFIG.grid + right
                if 0 <= row < CONFIG.grid and 0 <= column < CONFIG.grid:
                    best, second = np.sort(score[place])[[-1, -2]]
                    assert score[place].argmax() == row * CONFIG.grid + column
                    assert best - second > 0.6 * start.SHARPNESS

    def test_all_else_is_as_openai_clip_begins(self, params):
        plain = npclip.training.initialize(CONFIG, 0)
        changed = {name for name in plain if not np.array_equal(plain[name], params[name])}
        assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}
        assert {re.sub(r"\d+", "N", name) for name in changed} == {
            "visual.convN.weight",
            "visual.positional_embedding",
            "visual.transformer.resblocks.N.attn.in_proj_weight",
            "visual.transformer.resblocks.N.attn.out_proj.weight",
            "visual.transformer.resblocks.N.mlp.c_proj.weight",
        }


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class TestEvaluate:
    @given(st.integers(0, 1 << 32))
    def test_ties_are_the_mean_of_all_orders(self, seed):
        rng = np.random.default_rng(seed)
        images, texts = (rng.integers(0, 2, (n, 3)).astype(float) for n in (5, 4))
        pairs = [(i, i % 4) for i in range(5)]
        found = evaluate.recall_of_ties(images, texts, pairs)
        noise = [1e-4 * rng.standard_normal((4, 5)) for _ in range(300)]
        first = [np.argmax(texts @ images.T + n, 1) for n in noise]
        mean = np.mean([[(i, t) in pairs for t, i in enumerate(order)] for order in first])
        assert abs(found["text_to_image@1"] - mean) < 0.15
        assert found["text_to_image@5"] == 1

    @given(st.integers(0, 1 << 32))
    def test_without_ties_it_is_recall(self, seed):
        rng = np.random.default_rng(seed)
        images, texts = (unit(rng.standard_normal((n, 8))) for n in (40, 30))
        pairs = [(i, i % 30) for i in range(40)]
        wanted = recall(images, texts, pairs)
        assert evaluate.recall_of_ties(images, texts, pairs) == pytest.approx(wanted)

    def test_chance_is_what_equal_similarities_give(self):
        pairs = [(i, i % 7) for i in range(20)]
        found = evaluate.recall_of_ties(np.ones((20, 2)), np.ones((7, 2)), pairs)
        assert evaluate.chance(20, 7, pairs) == pytest.approx(found)

    def test_the_baseline_finds_what_it_has_seen(self, made):
        rows = check.read(made / "shards" / "train")
        texts, pairs = evaluate.texts_of(rows, "description")
        pictures = [evaluate.pixels(row) for row in rows]
        found = evaluate.Baseline(rows).recall(pictures, texts, pairs)
        chance = evaluate.chance(len(rows), len(texts), pairs)
        assert found["text_to_image@1"] > 3 * chance["text_to_image@1"]

    def test_the_card(self, made):
        lines = card.results(made, "tiny").splitlines()
        assert len(lines) == 2 + 3 * 2 * 3
        assert {line.count("|") for line in lines} == {10}
        page = failures.failures(made, npclip.load("tiny"))
        assert np.asarray(page).std() > 10

    def test_the_card_is_of_the_weights_in_the_package(self):
        text = card.CARD.read_text()
        assert hashlib.sha256(BUNDLED["tiny"].read_bytes()).hexdigest() in text
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        figures = [row for row in rows if len(row) == 9 and row[3].endswith("%")]
        first = {tuple(row[:3]): float(row[3].rstrip(" %")) for row in figures}
        assert len(first) == 3 * 2 * 3
        for query in evaluate.QUERIES.values():
            tiny = first["style (1,556)", query, "**tiny**"]
            assert tiny > first["style (1,556)", query, "nearest neighbour"]
            assert tiny >= 10 * 100 / 1556


class TestCommand:
    def test_what_is_there_is_not_made_again(self, tmp_path):
        assert command.missing(tmp_path) == list(command.STEPS)
        for name in ("shards/split.json", "views/15.parquet"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        assert set(command.STEPS) - set(command.missing(tmp_path)) == {"shards", "views"}

    def test_steps_that_are_named_are_done_in_order_and_none_after_a_leak(
        self, tmp_path, monkeypatch, capsys
    ):
        done = []
        monkeypatch.setattr(command, "run", lambda step, options: done.append(step))
        monkeypatch.setattr(check, "check", lambda folder: [])
        assert command.main([str(tmp_path), "views", "check", "shards"]) == 0
        assert done == ["shards", "check", "views"]
        monkeypatch.setattr(check, "check", lambda folder: ["a leak"])
        assert command.main([str(tmp_path), "views", "check", "shards"]) == 1
        assert done[3:] == ["shards"]
        with pytest.raises(SystemExit):
            command.main([str(tmp_path), "wash"])
        assert "no step wash" in capsys.readouterr().err
