"""The page of `npclip search --html`: as text, and in a real browser where there is one."""

import base64
import io
import os
import re
import shutil
import tarfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from npclip.errors import ImageError
from npclip.search import Hit, gallery

HOSTILE = (
    "<script>document.title='run'</script>\"'><img src=x onerror=\"document.title='run'\">.png"
)
# Debian's and others' names; or NPCLIP_BROWSER, a path.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def picture(width=60, height=40, mode="RGB", **options):
    """An image file: red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    out = io.BytesIO()
    image.convert(mode).save(out, options.pop("format", "PNG"), **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def hits(tmp_path_factory):
    """Found in files of many kinds, and in what is none any more."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [HOSTILE.replace("/", "⁄"), "wide.png", "tall.jpg", "long " + "n" * 200 + ".png"]
    files = [picture(), picture(900, 30), picture(30, 900, format="JPEG"), picture()]
    for name, data in zip(names, files, strict=True):
        (folder / name).write_bytes(data)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        info = tarfile.TarInfo("in/a.png")
        info.size = len(data := picture())
        tar.addfile(info, io.BytesIO(data))
    paths = [
        *(str(folder / name) for name in names),
        f"{folder}/shard.tar::in/a.png",
        str(folder / "broken.jpg"),
        str(folder / "missing.png"),
        "javascript:document.title='run'",
        "a\0b\x1b[31m.png",
    ]
    return [Hit(0.4 - i / 100, f"id {i}", path) for i, path in enumerate(paths)]


class Tags(HTMLParser):
    """Every start tag and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(hits, tmp_path_factory):
    query = tmp_path_factory.mktemp("query") / "query.png"
    query.write_bytes(picture(200, 100))
    return gallery.page(["a <b>word</b>", str(query)], hits, "image", "my & index")


def test_every_path_and_query_is_shown_as_it_is(page, hits):
    tags = Tags(page)
    for hit in hits[:-1]:
        assert hit.path in tags.texts
        assert f"{hit.score:.4f}" in tags.texts
    assert "a\\x00b\\x1b[31m.png" in tags.texts
    assert "a <b>word</b>" in tags.texts
    assert "my & index" in tags.texts
    assert "9 images of " in tags.texts
    texts = [text for text in tags.texts if text.startswith("no thumbnail: ")]
    assert len(texts) == 4  # broken, missing, no file, no name of a file
    assert "No such file" in texts[1]


def test_nothing_is_run_or_fetched(page):
    tags = Tags(page)
    assert not tags.of("script")
    assert not tags.of("b")
    assert not [name for _, attributes in tags.tags for name in attributes if name[:2] == "on"]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in tags.of("img"))
    assert {link["href"].partition(":")[0] for link in tags.of("a")} == {"file"}
    assert [link["href"] for link in tags.of("link")] == ["data:,"]
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?:", page)


def test_images_have_a_size_and_a_name(page):
    images = Tags(page).of("img")
    assert len(images) == 6  # the query, four files, a member of the archive
    for image in images:
        data = base64.b64decode(image["src"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as decoded:
            assert decoded.size == (int(image["width"]), int(image["height"]))
            assert max(decoded.size) <= gallery.SIDE
        assert image["alt"]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_thumbnails_of_every_mode(mode):
    formats = {"CMYK": "JPEG", "F": "TIFF"}
    if mode == "I;16":
        out = io.BytesIO()
        Image.fromarray(np.full((40, 60), 1000, np.uint16)).save(out, "PNG")
        data = out.getvalue()
    else:
        data = picture(1000, 500, mode, format=formats.get(mode, "PNG"))
    made, size = gallery.thumbnail(data)
    with Image.open(io.BytesIO(made)) as image:
        assert image.size == size
        assert image.mode == "RGB"
        if mode in ("RGB", "P", "RGBA", "CMYK"):
            left, right = image.getpixel((20, 80)), image.getpixel((300, 80))
            assert left[0] > 200 > 60 > left[2]
            assert right[2] > 200 > 60 > right[0]


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    with Image.open(io.BytesIO(gallery.thumbnail(out.getvalue())[0])) as made:
        assert made.getpixel((10, 10)) == (255, 255, 255)


def test_thumbnails_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    made, size = gallery.thumbnail(picture(640, 320, format="JPEG", exif=exif))
    assert size == (160, 320)
    with Image.open(io.BytesIO(made)) as image:
        assert image.getpixel((80, 20))[0] > 200  # what was left is above


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 1000):  # a warning of Pillow's, and an error
        with pytest.raises(ImageError, match="too many pixels"):
            gallery.thumbnail(picture(side, side))


def test_texts_have_no_thumbnails():
    hits = [Hit(0.5, "captions.txt::1", "captions.txt::1"), Hit(0.25, "<i>\udcff", "there")]
    tags = Tags(gallery.page(["q"], hits, "text", "captions"))
    assert not tags.of("img")
    assert not tags.of("i")
    assert "captions.txt::1" in tags.texts
    assert "<i>\\udcff" in tags.texts


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path, hits, monkeypatch):
    target = tmp_path / "page.html"
    gallery.write(target, ["q"], hits, "image", "index")
    before = target.read_bytes()
    assert before.startswith(b"<!doctype html>")
    monkeypatch.setattr(gallery, "page", lambda *_: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        gallery.write(target, ["q"], hits, "image", "index")
    assert target.read_bytes() == before
    with pytest.raises(OSError, match="nowhere"):
        gallery.write(tmp_path / "nowhere" / "page.html", ["q"], hits, "image", "index")


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api")
    candidates = [os.environ.get("NPCLIP_BROWSER"), *map(shutil.which, BROWSERS)]
    if not (program := next(filter(None, candidates), None)):
        pytest.skip("no browser")
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
    with playwright.sync_playwright() as control:
        browser = control.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", *quiet]
        )
        yield browser
        browser.close()


@pytest.fixture(
    scope="module",
    params=[(360, "light"), (1440, "dark")],
    ids=["narrow and light", "wide and dark"],
)
def opened(request, browser, page, tmp_path_factory):
    """The page in a window of that width, and the addresses that it asked for."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page, "utf-8")
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_load_state("networkidle")
    yield tab, asked, said, width
    tab.close()


def test_in_a_browser(opened, hits):
    tab, asked, said, width = opened
    own, *others = asked
    assert own.endswith("page.html")
    assert all(address.startswith("data:") for address in others)
    assert said == []
    assert tab.title().startswith("npclip search: a <b>word</b> + ")  # no script has run
    sizes = tab.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) == 6
    assert all(natural > 0 and shown > 0 for natural, shown in sizes)
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    over = tab.evaluate(
        "[...document.querySelectorAll('body *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5"
        " || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline')"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert over == []
    boxes = tab.eval_on_selector_all(
        ".picture", "all => all.map(e => [e.clientWidth, e.clientHeight])"
    )
    assert len(boxes) == len(hits)
    assert all(abs(across - down) <= 1 for across, down in boxes)
    columns = tab.evaluate(
        "new Set([...document.querySelectorAll('.hits > li')]"
        ".map(e => e.getBoundingClientRect().left)).size"
    )
    assert columns == {360: 1, 1440: 6}[width]
    text = tab.inner_text("main")
    assert all(hit.path in text for hit in hits[:-1])


def test_links_are_reached_and_seen_by_keyboard(opened):
    tab, *_ = opened
    reached = []
    for _ in range(5):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.href || ''"))
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(set(reached)) == 5  # four pictures, and the broken one
    assert all(address.startswith("file:///") for address in reached)


def test_colours_have_contrast(opened):
    """At least 4.5 : 1, by WCAG's formula, of every text with what it stands on."""
    tab, *_ = opened
    pairs = tab.evaluate("""[...document.querySelectorAll('h1, p, bdi, .score, .none')].map(e => {
        let back = e;
        const colour = () => getComputedStyle(back).backgroundColor;
        while (colour() == 'rgba(0, 0, 0, 0)') back = back.parentElement;
        return [getComputedStyle(e).color, colour()];
    })""")
    assert pairs
    for pair in pairs:
        light, dark = sorted((luminance(colour) for colour in pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


def luminance(colour):
    """Relative, of "rgb(r, g, b)"."""
    values = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
