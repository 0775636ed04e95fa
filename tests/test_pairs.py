"""npclip.sources.open_pairs: every kind of source, and what is wrong with them."""

import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from npclip.errors import InputError, InputTypeError
from npclip.sources import open_pairs

PNG = b"\x89PNG\r\n\x1a\n another"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return str(path)


def image_of(pair):
    if pair.data is not None:
        return pair.data
    with open(pair.path, "rb") as file:
        file.seek(pair.start)
        return file.read(-1 if pair.size is None else pair.size)


def pairs(*sources, **options):
    """{id: (image, texts), or the reason why not}."""
    found = {}
    for pair in open_pairs(sources, **options):
        assert pair.id not in found
        found[pair.id] = pair.reason or (image_of(pair), list(pair.texts))
    return found


MEMBERS = [
    ("a/1.jpg", b"one"),
    ("a/1.txt", b"\xef\xbb\xbf a cat \n"),
    ("a/1.cls", b"3"),
    ("a/1.json", b'{"caption": "not this"}'),
    ("a/2.json", b'{"url": "", "captions": ["a dog", " ", "it barks"]}'),
    ("a/2.seg.png", b"two"),
    ("b/2.txt", b"no picture"),
    ("b/3.jpg", b"three"),
    ("b/4.jpg", b""),
    ("b/4.txt", b"empty picture"),
    ("b/5.jpg", b"five"),
    ("b/5.txt", b"\xff"),
    ("b/6.jpg", b"six"),
    ("b/6.json", b"{"),
    ("b/7.jpg", b"seven"),
    ("b/7.json", b'{"text": 7}'),
    ("README.md", b"neither"),
    ("b/.8.jpg", b"hidden"),
]


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_samples_of_a_tar(name):
    write_tar(name, MEMBERS, "w:gz" if name.endswith("gz") else "w")
    assert pairs(name) == {
        f"{name}::a/1": (b"one", ["a cat"]),
        f"{name}::a/2": (b"two", ["a dog", "it barks"]),
        f"{name}::b/2": "no image in the sample",
        f"{name}::b/3": "no text",
        f"{name}::b/4": "b/4.jpg in the tar is empty, too large, or no plain file",
        f"{name}::b/5": "a text that is not UTF-8",
        f"{name}::b/6": "not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        f"{name}::b/7": "a int instead of a text",
    }


def test_the_text_of_json_may_be_named():
    write_tar("s.tar", [*MEMBERS[:4], ("c.jpg", b"c"), ("c.json", b"[1]")])
    found = pairs("s.tar", text_column="caption")
    assert found["s.tar::a/1"] == (b"one", ["not this"])
    assert found["s.tar::c"] == "a list instead of a JSON object"
    assert pairs("s.tar", text_column="url")["s.tar::a/1"] == "no 'url' in the object"


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_of_a_damaged_tar_all_before_the_damage_are_pairs(name):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for member, data in (("1.jpg", b"1" * 600), ("1.txt", b"one"), ("2.jpg", b"2" * 600)):
            header = tarfile.TarInfo(member)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    data = whole.getvalue()[: 512 * 6 + 100]
    with open(name, "wb") as file:
        file.write(gzip.compress(data) if name.endswith("gz") else data)
    found = pairs(name)
    assert found[f"{name}::1"] == (b"1" * 600, ["one"])
    assert isinstance(found[name], str)


def test_rows_of_parquet():
    images = [PNG, None, b"", PNG]
    table = {"image": images, "caption": [["a", "b"], ["c"], ["d"], None], "n": [1, 2, 3, 4]}
    pq.write_table(pa.table(table), "p.parquet", row_group_size=3)
    assert pairs("p.parquet") == {
        "p.parquet::0": (PNG, ["a", "b"]),
        "p.parquet::1": "no image in the row",
        "p.parquet::2": "no image in the row",
        "p.parquet::3": "no text",
    }
    pq.write_table(pa.table({"x": [{"bytes": PNG, "path": "p"}], "y": ["why"]}), "h.parquet")
    assert pairs("h.parquet") == {"h.parquet::0": (PNG, ["why"])}


def test_columns_must_be_clear():
    pq.write_table(pa.table({"jpg": [PNG], "png": [PNG], "a": ["x"], "b": ["y"]}), "p.parquet")
    with pytest.raises(InputError, match=r"which of the columns jpg, png\? Say image_column"):
        pairs("p.parquet")
    with pytest.raises(InputError, match=r"which of the columns a, b\? Say text_column"):
        pairs("p.parquet", image_column="png")
    found = pairs("p.parquet", image_column="png", text_column="b")
    assert found == {"p.parquet::0": (PNG, ["y"])}
    with pytest.raises(InputError, match="no column 'c' among a, b"):
        pairs("p.parquet", image_column="png", text_column="c")
    pq.write_table(pa.table({"n": [1]}), "n.parquet")
    with pytest.raises(InputError, match="no column of images among n"):
        pairs("n.parquet")


def test_rows_of_tables(folder):
    (folder / "photos" / "sub").mkdir(parents=True)
    for name in ("1.png", "sub/2.png"):
        (folder / "photos" / name).write_bytes(name.encode())
    (folder / "photos" / "captions.csv").write_text(
        'file_name,caption,n\n1.png,"a cat, sitting",1\nsub/2.png,,2\n,text,3\n1.png,two\n'
    )
    (folder / "photos" / "more.jsonl").write_text(
        '{"image": "sub/2.png", "text": ["x", "y"]}\n\n{"image": "1.png"}\n[]\n{"\n'
    )
    (folder / "photos" / "notes.txt").write_text("no pairs\n")
    expected = {
        "photos/captions.csv::2": (b"1.png", ["a cat, sitting"]),
        "photos/captions.csv::3": "no text",
        "photos/captions.csv::4": "no path of an image",
        "photos/captions.csv::5": "2 fields instead of 3",
        "photos/more.jsonl::1": (b"sub/2.png", ["x", "y"]),
        "photos/more.jsonl::3": "no 'text' in the object",
        "photos/more.jsonl::4": "a list instead of a JSON object",
    }
    found = pairs("photos")
    assert found.pop("photos/more.jsonl::5").startswith("not JSON: ")
    assert found == expected
    assert pairs("photos/*.csv", "photos/captions.csv") == dict(list(expected.items())[:4])
    (folder / "t.tsv").write_text("words\tpath\nhello\t1.png\n")
    assert pairs("t.tsv", images="photos") == {"t.tsv::2": (b"1.png", ["hello"])}


def test_lists_and_what_is_no_source(folder):
    write_tar("s.tar", MEMBERS[:2])
    (folder / "notes.txt").write_text("")
    (folder / "list").write_text("s.tar\nnotes.txt\nmissing.tar\n")
    assert pairs("@list") == {
        "s.tar::a/1": (b"one", ["a cat"]),
        "notes.txt": "not a file of pairs",
        "missing.tar": "No such file or directory",
    }
    for source, reason in {
        "-": "not read from standard input",
        "notes.txt": "pairs are read from .tar",
        "missing.tar": "no such file",
        "*.csv": "matches nothing",
    }.items():
        with pytest.raises(InputError, match=reason):
            open_pairs([source])
    with pytest.raises(InputTypeError):
        open_pairs("s.tar")


def test_what_is_damaged_is_one_pair_more(folder):
    for name in ("a.parquet", "b.tar", "c.csv"):
        (folder / name).write_bytes(b"\xff" * 700)
    found = pairs("a.parquet", "b.tar") | pairs(".", image_column="x")
    assert set(found) >= {"a.parquet", "b.tar", "c.csv"}
    assert all(isinstance(reason, str) for reason in found.values())


def test_a_text_in_a_path_of_any_bytes(folder):
    line = json.dumps({"image": "a\udc80.png", "text": "name"})
    (folder / "t.jsonl").write_text(line)
    assert next(open_pairs(["t.jsonl"])).path.endswith("a\udc80.png")
