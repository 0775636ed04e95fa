"""Sources: every kind, ids, hostile files, laziness and bounded memory."""

import csv
import errno
import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npclip.errors import ImageError, InputError, InputTypeError
from npclip.sources import items as source_items
from npclip.sources import open_sources, read_path
from npclip.sources import texts as source_texts
from npclip.sources import walk as source_walk
from npclip.sources.texts import text_hash

JPEG = b"\xff\xd8\xff\xe0 a picture"
PNG = b"\x89PNG\r\n\x1a\n another"
HEADS = {
    "png": PNG,
    "jpeg": JPEG,
    "gif": b"GIF89a\1",
    "webp": b"RIFF\0\0\0\0WEBPVP8 ",
    "bmp": b"BM\x36\0\0\0\0\0\0\0\x36\0\0\0",
    "tiff": b"II*\0\x08\0\0\0",
    "avif": b"\0\0\0\x20ftypavif",
}
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, data=JPEG):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)
    return str(path)


def write_tar(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return str(path)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def ids(sources, kind="image", **options):
    return [item.id for item in open_sources(sources, kind, **options)]


def reads(sources, kind="text", **options):
    """{id: what read() returns, or the reason why not}."""
    found = {}
    for item in open_sources(sources, kind, **options):
        assert item.id not in found
        try:
            found[item.id] = pickle.loads(pickle.dumps(item)).read()
        except source_items.ERRORS[kind] as error:
            found[item.id] = error
            assert "\n" not in str(error)
    return found


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# Files, folders, patterns, lists


def test_a_folder_is_walked_in_order_without_what_is_hidden():
    for name in ("b/2.jpg", "b/10.PNG", "a.webp", "c.jpg", ".hidden.jpg", ".git/x.jpg", "b/.y.jpg"):
        write(f"photos/{name}")
    assert ids(["photos"]) == [f"photos/{n}" for n in ("a.webp", "b/10.PNG", "b/2.jpg", "c.jpg")]
    assert ids(["./photos//b/"]) == ["photos/b/10.PNG", "photos/b/2.jpg"]
    assert ids(["photos/.hidden.jpg"]) == ["photos/.hidden.jpg"]  # that was named


@pytest.mark.parametrize("name", HEADS)
def test_images_are_found_by_their_first_bytes_too(name):
    write("photos/x.dat", HEADS[name])
    write("photos/README.txt", b"BMW cars\n")
    write("photos/Makefile", b"all:")
    assert reads(["photos"], "image") == {"photos/x.dat": HEADS[name]}


def test_a_named_file_is_an_item_whatever_it_is():
    write("notes.md", b"no image")
    assert reads(["notes.md"], "image") == {"notes.md": b"no image"}


def test_ids_are_normalised_and_paths_are_as_given():
    write("photos/a.jpg")
    (item,) = open_sources(["./photos//./a.jpg"], "image")
    assert (item.id, item.path) == ("photos/a.jpg", "./photos//./a.jpg")
    os.makedirs("elsewhere/deep"), write("elsewhere/a.jpg", PNG)
    os.symlink("elsewhere/deep", "link")  # where ".." is not the folder that it seems to be
    assert reads(["link/../a.jpg", "photos/a.jpg"], "image") == {
        "link/../a.jpg": PNG,
        "photos/a.jpg": JPEG,
    }


@pytest.mark.parametrize(
    "sources",
    [
        ["photos", "photos"],
        ["photos", "photos/a.jpg", "photos/sub", "./photos/sub/b.jpg"],
        ["photos/sub", "photos/a.jpg", "photos"],
        ["photos/**/*.jpg", "photos/*", "photos"],
        [".", "photos/a.jpg", "photos"],
        ["@list.txt", "photos", "@list.txt"],
    ],
)
def test_nothing_is_repeated(sources):
    write("photos/a.jpg"), write("photos/sub/b.jpg")
    write("list.txt", b"photos/a.jpg\nphotos/a.jpg\nphotos\n@list.txt\n")
    assert sorted(ids(sources)) == ["photos/a.jpg", "photos/sub/b.jpg"]


def test_what_a_walk_left_out_may_be_named():
    write("photos/a.jpg"), write("photos/.b.jpg"), write("photos/.c/d.jpg"), write("photos/e", b"?")
    named = ["photos/.b.jpg", "photos/.c", "photos/e"]
    found = ["photos/a.jpg", "photos/.b.jpg", "photos/.c/d.jpg", "photos/e"]
    assert ids(["photos", *named]) == found
    assert ids([".", *named]) == found


def test_patterns():
    for name in ("a/1.jpg", "a/b/2.jpg", "a/b/3.png", "a/.c/4.jpg", "x[1].jpg", "a/notes.txt"):
        write(name, b"?" if name.endswith("txt") else JPEG)
    assert ids(["a/*.jpg"]) == ["a/1.jpg"]
    assert ids(["a/**/*.jpg"]) == ["a/1.jpg", "a/b/2.jpg"]
    assert ids(["a/*"]) == ["a/1.jpg", "a/b/2.jpg", "a/b/3.png"]
    assert ids([os.path.abspath("a/?.jpg")]) == [Path("a/1.jpg").absolute().as_posix()]
    assert ids(["x[1].jpg"]) == ["x[1].jpg"]  # a file of that very name
    assert ids(["a/.c/*"]) == ["a/.c/4.jpg"]


def test_lists_name_sources_from_the_working_directory():
    write("photos/a.jpg"), write("photos/b.jpg"), write("c d.jpg"), write("lists/more", b"c d.jpg")
    lines = b"\xef\xbb\xbfphotos/*.jpg\r\n\r\nmissing.jpg\n@lists/more\n@none\n"
    write("lists/list.txt", lines)
    found = reads(["@lists/list.txt"], "image")
    assert list(found) == ["photos/a.jpg", "photos/b.jpg", "missing.jpg", "c d.jpg", "@none"]
    assert str(found["missing.jpg"]) == str(found["@none"]) == os.strerror(errno.ENOENT)
    write("list", b"**x\n**x\n")  # a pattern that pathlib refuses, or matches nothing
    assert ids(["@list"]) == ["**x"]
    write("@lists", JPEG)
    assert ids(["@lists"]) == ["@lists"]  # a file of that very name


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such names")
def test_names_that_are_not_utf8_survive(monkeypatch):
    name = os.fsdecode(b"photos/\xff\xe9.jpg")
    write(name), write_tar("t.tar", [("\udcff.jpg", PNG)])
    write("list", os.fsencode(name) + b"\n")
    for source in ("photos", "@list", name):
        assert reads([source], "image") == {name: JPEG}
    stdin(monkeypatch, os.fsencode(name))
    assert reads(["-"], "image") == {name: JPEG}
    assert reads(["t.tar"], "image") == {"t.tar::\udcff.jpg": PNG}
    assert read_path(name) == JPEG and read_path("t.tar::\udcff.jpg") == PNG


@pytest.mark.parametrize("data", [b"a.jpg\nb c.jpg\n", b"a.jpg\0b c.jpg\0", b"a.jpg\r\nb c.jpg"])
def test_paths_on_standard_input(monkeypatch, data):
    write("a.jpg"), write("b c.jpg", PNG)
    stdin(monkeypatch, data)
    assert reads(["-"], "image") == {"a.jpg": JPEG, "b c.jpg": PNG}


def test_paths_on_standard_input_are_no_patterns(monkeypatch):
    write("a.jpg"), write("new\nline.jpg")
    stdin(monkeypatch, b"*.jpg\0new\nline.jpg\0")
    found = reads(["-", "-"], "image")
    assert list(found) == ["*.jpg", "new\nline.jpg"]
    assert isinstance(found["*.jpg"], ImageError) and found["new\nline.jpg"] == JPEG


def test_texts_on_standard_input(monkeypatch):
    stdin(monkeypatch, b"a cat\n\na dog\xff\nlast")
    found = reads(["-"])
    assert str(found.pop(f"-::3::{text_hash(chr(97) + ' dog' + chr(0xDCFF))}")) == "not UTF-8"
    assert found == {f"-::1::{text_hash('a cat')}": "a cat", f"-::4::{text_hash('last')}": "last"}
    stdin(monkeypatch, b"two\nlines\0one")
    assert list(reads(["-"]).values()) == ["two\nlines", "one"]
    stdin(monkeypatch, b"a dog")  # in the place of the cat, and not taken for it
    assert list(reads(["-"])) == [f"-::1::{text_hash('a dog')}"]


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no standard input"):
        open_sources(["-"], "text")


# Wrong sources


@pytest.mark.parametrize("source", ["none.jpg", "none", "@none", "*.none", "@photos"])
def test_a_source_that_is_not_there_is_said_at_once(source):
    write("photos/a.jpg")
    with pytest.raises(InputError) as caught:
        open_sources(["photos", source], "image")
    assert source in str(caught.value)


def test_nothing_at_all_is_an_error():
    os.makedirs("empty/deeper"), write("empty/x.txt", b"")
    for kind in ("image", "text"):
        with pytest.raises(InputError, match=f"no {kind}s in empty"):
            next(open_sources(["empty"], kind))
    with pytest.raises(InputError, match="no images"):
        next(open_sources([], "image"))
    write("photos/a.jpg")
    assert ids(["empty", "photos"]) == ["photos/a.jpg"]


def test_wrong_arguments():
    with pytest.raises(InputTypeError):
        open_sources("photos", "image")
    with pytest.raises(InputTypeError):
        open_sources([Path("photos")], "image")
    with pytest.raises(InputError, match="kind"):
        open_sources(["."], "video")
    write("a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg: texts are read from"):
        open_sources(["a.jpg"], "text")


# Hostile folders


@posix
def test_a_hostile_folder(monkeypatch):
    (
        write("f/ok.jpg"),
        write("f/empty.jpg", b""),
        write("f/big.jpg", b"x" * 100),
        write("f/sub/x.jpg"),
    )
    os.symlink("ok.jpg", "f/link.jpg"), os.symlink("nowhere", "f/dangling.jpg")
    os.symlink("loop.jpg", "f/loop.jpg"), os.symlink("loop", "f/loop")
    os.symlink("..", "f/sub/up"), os.symlink("sub", "f/inside"), os.mkfifo("f/fifo.jpg")
    os.mkfifo("f/fifo"), os.makedirs("f/folder.jpg"), write_tar("f/cut.tar", [("a.jpg", JPEG)])
    os.truncate("f/cut.tar", 100), write("f/bad.parquet", b"PAR1"), write("f/locked/y.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("f/socket.jpg")
    scandir = os.scandir

    def locked(path):
        if path == "f/locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(source_walk.os, "scandir", locked)
    monkeypatch.setattr(source_items, "MAX_BYTES", 50)
    found = reads(["f"], "image")
    good = {name for name, data in found.items() if data == JPEG}
    assert good == {"f/ok.jpg", "f/link.jpg", "f/sub/x.jpg"}
    reasons = {name: str(found[name]) for name in found.keys() - good}
    assert reasons.pop("f/bad.parquet")
    assert reasons == {
        "f/empty.jpg": "empty",
        "f/big.jpg": "more than 50 bytes",
        "f/dangling.jpg": os.strerror(errno.ENOENT),
        "f/loop.jpg": os.strerror(errno.ELOOP),
        "f/fifo.jpg": "a FIFO, not a file",
        "f/socket.jpg": "a socket, not a file",
        "f/locked": os.strerror(errno.EACCES),
        "f/cut.tar": "truncated header at byte 0",
    }
    assert str(*reads(["/dev/null"], "image").values()) == "a device, not a file"


@posix
def test_links_to_folders_outside_are_followed_once():
    write("photos/a.jpg"), write("elsewhere/b.jpg"), write("photos/.store/c.jpg")
    os.symlink("../elsewhere", "photos/1"), os.symlink("../elsewhere", "photos/2")
    os.symlink("../photos", "elsewhere/back"), os.symlink(".store", "photos/stored")
    assert ids(["photos"]) == ["photos/1/b.jpg", "photos/a.jpg", "photos/stored/c.jpg"]


@posix
def test_many_links_in_circles_end():
    for i in range(12):
        write(f"f/{i}/x.jpg")
        for j in range(12):
            os.symlink(f"../{j}", f"f/{i}/to{j}")
    assert len(ids(["f"])) == len(ids(["f/**/*.jpg"])) == 12


def test_folders_nested_deeper_than_recursion():
    path = "/".join(["d"] * 200)
    write(f"{path}/x.jpg")
    deepest = sys.getrecursionlimit()
    here, frame = 0, sys._getframe()
    while frame:
        here, frame = here + 1, frame.f_back
    sys.setrecursionlimit(here + 100)
    try:
        assert ids(["d"]) == [f"{path}/x.jpg"]
    finally:
        sys.setrecursionlimit(deepest)


# Texts


def test_lines_of_a_text_file():
    write("t.txt", b"\xef\xbb\xbfa cat\r\n  a dog \n\n\x85\xe2\x80\xa8\nred\x0bblue\nlast \xc3\xa9")
    found = reads(["t.txt"])
    assert isinstance(found.pop("t.txt::4"), InputError)
    assert found == {"t.txt::1": "a cat", "t.txt::2": "  a dog ", "t.txt::5": "red\x0bblue",
                     "t.txt::6": "last é"}  # fmt: skip


def test_json_lines():
    lines = ['"a cat"', '{"text": "a dog", "id": 7}', "", "{", '{"caption": "x"}', '{"text": 5}',
             '{"text": null}', '"\\ud800"', "[" * 100_000, "\ufeff", "9" * 5000]  # fmt: skip
    write("t.jsonl", "\n".join(lines).encode())
    found = reads(["t.jsonl"])
    assert list(found) == [f"t.jsonl::{n}" for n in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11)]
    texts = {id: text for id, text in found.items() if isinstance(text, str)}
    assert texts == {"t.jsonl::1": "a cat", "t.jsonl::2": "a dog"}
    assert str(found["t.jsonl::5"]) == "no 'text' in the object"
    assert reads(["t.jsonl"], column="caption")["t.jsonl::5"] == "x"
    assert reads(["t.jsonl"], id_column="id")["7"] == "a dog"


def test_csv():
    long = "x" * 100_000
    rows = f'id,Caption\r\n1,a cat\r\n2,"two\nlines"\r\n\r\n3,{long}\r\n4\r\n5,\r\n'
    write("t.csv", b"\xef\xbb\xbf" + rows.encode() + b"6,\xff\r\n7,x\0y\r\n8,ok")
    found = reads(["t.csv"])
    good = {id: text for id, text in found.items() if isinstance(text, str)}
    numbers = {"t.csv::2": "a cat", "t.csv::3": "two\nlines", "t.csv::6": long, "t.csv::8": ""}
    assert {**numbers, "t.csv::11": "ok"}.items() <= good.items()
    assert str(found["t.csv::7"]) == "1 fields instead of 2"
    assert str(found["t.csv::9"]) == "not UTF-8"
    assert list(reads(["t.csv"], id_column="id"))[:3] == ["1", "2", "3"]
    assert list(reads(["t.csv"], column="id").values())[:2] == ["1", "2"]
    write("t.tsv", b"a\ttext\n1\tx, y\n")
    assert reads(["t.tsv"]) == {"t.tsv::2": "x, y"}


def test_a_field_that_is_too_long_fails_alone():
    write("t.csv", b"text\nok\n" + b"y" * 200_000 + b"\nfine\n")
    found = reads(["t.csv"])
    assert (found["t.csv::2"], found["t.csv::4"]) == ("ok", "fine")
    assert "field limit" in str(found["t.csv::3"])


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv"])
def test_a_line_that_is_too_long_fails_alone(name, monkeypatch):
    monkeypatch.setattr(source_texts, "MAX_LINE", 100_000)
    head = b"text\n" if name == "t.csv" else b'"text"\n'
    write(name, head + b'"' + b"y" * 900_000 + b'"\n"fine"\n')
    found = reads([name])
    assert isinstance(found[f"{name}::2"], InputError)
    assert found[f"{name}::3"].strip('"') == "fine"


def test_columns_of_tables_that_are_not_clear():
    write("t.csv", b"a,b\n1,2\n"), write("one.csv", b"whatever\nx\n"), write("empty.csv", b"")
    for source in ("t.csv", "*.csv"):
        if source != "t.csv":
            os.remove("empty.csv"), os.rename("t.csv", "0.csv")
        with pytest.raises(InputError, match=r"a, b\? Say --column"):
            open_sources([source], "text")
    with pytest.raises(InputError, match="no column 'x' among a, b"):
        open_sources(["0.csv"], "text", column="x")
    assert reads(["one.csv"]) == {"one.csv::2": "x"}
    found = reads(["."])  # in a folder it is one more item
    assert isinstance(found["0.csv"], InputError) and found["one.csv::2"] == "x"


def test_texts_of_a_folder():
    write("f/a.txt", b"one\ntwo"), write("f/b.JSONL", b'"three"'), write("f/c.jpg")
    write_tar("f/d.tar", [("x.txt", b"four\n"), ("x.jpg", JPEG)])
    write_parquet("f/e.parquet", text=["five"], url=["u"])
    assert list(reads(["f"]).values()) == ["one", "two", "three", "four", "five"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LINE = TEXT.filter(lambda t: t.strip() and "\n" not in t and t[-1] != "\r" and t[0] != "\ufeff")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.lists(LINE), st.sampled_from(["\n", "\r\n"]))
def test_texts_round_trip(texts, end):
    if texts:
        write("t.txt", end.join(texts).encode())
        assert list(reads(["t.txt"]).values()) == texts


@quick
@given(st.lists(TEXT, min_size=1))
def test_json_round_trips(texts):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    write("t.jsonl", "\n".join(lines).encode())
    assert list(reads(["t.jsonl"]).values()) == texts


@quick
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), st.sampled_from([",", "\t"]))
def test_csv_round_trips(rows, delimiter):
    rows = [tuple(field.replace("\0", "") for field in row) for row in rows]  # csv before 3.11
    name = "t.csv" if delimiter == "," else "t.tsv"
    with open(name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("n", "text"), *rows])
    assert list(reads([name]).values()) == [text for _, text in rows]


# Tar


MEMBERS = [
    ("a.jpg", JPEG),
    ("a.txt", b"a cat\n"),
    ("b/c.PNG", PNG),
    ("a.jpg", PNG),
    ("._x.jpg", b"?"),
]


@pytest.mark.parametrize("name, mode", [("t.tar", "w"), ("t.tar.gz", "w:gz"), ("t.tgz", "w:gz")])
def test_tar(name, mode):
    write_tar(name, MEMBERS, mode)
    found = {f"{name}::a.jpg": JPEG, f"{name}::b/c.PNG": PNG, f"{name}::a.jpg#2": PNG}
    assert reads([name], "image") == found
    assert reads([name]) == {f"{name}::a.txt": "a cat"}
    assert {path: read_path(path) for path in found} == found
    with pytest.raises(ImageError, match=r"no image 'x\.jpg'"):
        read_path(f"{name}::x.jpg")


def test_members_of_a_tar_are_read_by_any_process():
    write_tar("t.tar", MEMBERS)
    first, *_ = open_sources(["t.tar"], "image")
    assert len(pickle.dumps(first)) < 500
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read())"
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(first), capture_output=True
    )
    assert run.stdout.decode().strip() == repr(JPEG)


def test_names_in_a_tar_stay_unique():
    names = ["a.jpg", "a.jpg", "a.jpg", "b.jpg"]
    write_tar("t.tar", [(name, name.encode()) for name in names])
    assert ids(["t.tar"]) == [f"t.tar::{n}" for n in ("a.jpg", "a.jpg#2", "a.jpg#3", "b.jpg")]


@quick
@given(st.lists(st.sampled_from(["a.jpg", "a.jpg#2", "b/a.jpg", "a.jpg#3", "a.jpg#2#2"])))
def test_unique_is_unique_and_stable(names):
    unique, again = source_items.Unique(), source_items.Unique()
    found = [unique(name) for name in names]
    assert len(set(found)) == len(names)
    assert [again(name) for name in names] == found
    assert all(
        new == old or new.startswith(f"{old}#") for new, old in zip(found, names, strict=True)
    )


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_cut_off_anywhere_gives_all_before_and_says_so(mode):
    members = [(f"{i}.jpg", os.urandom(400 + 100 * i)) for i in range(4)]
    whole = Path(write_tar("t.tar", members, mode)).read_bytes()
    end = len(whole) if mode == "w:gz" else 4 * 512 + 512 + 512 + 1024 + 1024
    for length in range(0, end, 131):
        write("t.tar", whole[:length])
        found = reads(["t.tar"], "image")
        assert isinstance(found.pop("t.tar"), ImageError)
        good = [data for data in found.values() if isinstance(data, bytes)]
        assert good == [data for _, data in members[: len(good)]]
        assert len(found) - len(good) <= 1  # the one that was cut
        if mode == "w":
            starts = [512, 1536, 2560, 4096]
            ends = [start + len(data) for start, (_, data) in zip(starts, members, strict=True)]
            assert len(good) == sum(end <= length for end in ends)


def test_other_members_of_a_tar_fail():
    with tarfile.open("t.tar", "w") as tar:
        for name, type in (("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = type, "/etc/passwd"
            tar.addfile(header)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("empty.jpg"))
    found = reads(["t.tar"], "image")
    assert list(found) == ["t.tar::l.jpg", "t.tar::f.jpg", "t.tar::empty.jpg"]
    assert all(isinstance(error, ImageError) for error in found.values())
    with pytest.raises(ImageError, match="empty"):
        read_path("t.tar::empty.jpg")


@settings(quick, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6), st.booleans())
def test_a_damaged_tar_is_no_crash(changes, is_compressed):
    data = bytearray(Path(write_tar("t.tar", MEMBERS[:4])).read_bytes()[:4096])
    data = bytearray(gzip.compress(data)) if is_compressed else data
    for at, value in changes:
        data[at % len(data)] = value
    write("t.tar", data)
    for kind in ("image", "text"):
        try:
            reads(["t.tar"], kind)
        except InputError as error:
            assert str(error).startswith("no ")


# Parquet


def test_parquet():
    values = [JPEG, PNG, None, b""]
    write_parquet("p.parquet", url=["u"] * 4, jpg=pa.array(values), key=["a", "b", "b", None])
    found = reads(["p.parquet"], "image")
    assert list(found) == [f"p.parquet::{i}" for i in range(4)]
    assert list(found.values())[:2] == values[:2]
    assert [str(error) for error in list(found.values())[2:]] == ["no image in the row", "empty"]
    keyed = list(open_sources(["p.parquet"], "image", id_column="key"))
    assert [item.id for item in keyed] == ["a", "b", "b#2", "p.parquet::3"]
    with pytest.raises(ImageError, match="'b' was given before"):
        keyed[2].read()
    assert read_path(keyed[1].path) == PNG
    with pytest.raises(ImageError, match="no image in the row"):
        read_path("p.parquet::2")
    with pytest.raises(ImageError, match="4 rows, no row 4"):
        read_path("p.parquet::4")
    with pytest.raises(ImageError, match="'x' is no row"):
        read_path("p.parquet::x")


def test_parquet_of_hugging_face():
    rows = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    write_parquet("p.parquet", image=rows, label=[1, 2, 3])
    found = reads(["p.parquet"], "image")
    assert found.pop("p.parquet::0") == JPEG == read_path("p.parquet::0")
    assert len(found) == 2 and all(isinstance(error, ImageError) for error in found.values())


def test_parquet_by_column():
    write_parquet("p.parquet", a=[JPEG] * 3, b=[PNG] * 3)
    with pytest.raises(InputError, match=r"a, b\? Say --column"):
        open_sources(["p.parquet"], "image")
    items = list(open_sources(["p.parquet"], "image", column="b"))
    assert [item.id for item in items] == [f"p.parquet::{i}" for i in range(3)]
    assert read_path(items[2].path) == PNG
    with pytest.raises(InputError, match="no column 'c' among a, b"):
        open_sources(["p.parquet"], "image", column="c")
    with pytest.raises(InputError, match="'a' is of binary, not texts"):
        open_sources(["p.parquet"], "text", column="a")
    with pytest.raises(InputError, match="no column 'k' among a, b"):
        open_sources(["p.parquet"], "image", column="a", id_column="k")
    with pytest.raises(InputError, match="ids are strings or integers, 'b' is binary"):
        open_sources(["p.parquet"], "image", column="a", id_column="b")


def test_parquet_of_texts():
    bad = pa.array([b"ok", b"\xff"]).view(pa.string())
    write_parquet("p.parquet", url=["u", "v"], caption=bad)
    found = reads(["p.parquet"])
    assert found["p.parquet::0"] == "ok" and str(found["p.parquet::1"]) == "not UTF-8"
    write_parquet("q.parquet", text=pa.array(["a", "a"]).dictionary_encode())
    assert list(reads(["q.parquet"]).values()) == ["a", "a"]


def test_parquet_in_a_folder_of_images():
    write("f/a.jpg"), write_parquet("f/about.parquet", url=["u"], caption=["c"])
    write_parquet("f/two.parquet", a=[JPEG], b=[PNG])
    found = reads(["f"], "image")
    assert list(found) == ["f/a.jpg", "f/two.parquet"] and "--column" in str(found["f/two.parquet"])
    with pytest.raises(InputError, match=r"no column of images among url, caption"):
        open_sources(["f/about.parquet"], "image")


def test_parquet_without_pyarrow(monkeypatch):
    write_parquet("p.parquet", jpg=[JPEG])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"npclip\[parquet\]"):
        open_sources(["p.parquet"], "image")
    assert "npclip[parquet]" in str(reads(["."], "image")["p.parquet"])


def test_damaged_parquet_fails_as_an_item():
    data = Path(write_parquet("p.parquet", jpg=[JPEG] * 100)).read_bytes()
    write("p.parquet", data[:-20])
    found = reads(["p.parquet"], "image")
    assert list(found) == ["p.parquet"]
    with pytest.raises(ImageError):
        read_path("p.parquet::0")


# Any process, any time, bounded memory


def test_read_path():
    write("a.tar::b.jpg"), write("x.jpg", PNG)
    assert read_path("a.tar::b.jpg") == JPEG  # a file of that very name
    assert read_path("x.jpg") == PNG
    for path in ("none.jpg", ".", "a\0b", "none.tar::x", "x.jpg::1", ""):
        with pytest.raises(ImageError):
            read_path(path)


def test_items_come_before_all_is_read(monkeypatch):
    write("photos/a.jpg")
    for _ in range(2):
        first, second = os.pipe()
        with os.fdopen(second, "wb") as writer, os.fdopen(first, "rb") as reader:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(reader))
            items = open_sources(["-", "photos"], "text")
            writer.write(b"the first\n")
            writer.flush()  # and stays open: who waits for more waits for ever
            assert next(items).read() == "the first"
    opened = []
    real = source_walk._entries
    monkeypatch.setattr(source_walk, "_entries", lambda path: opened.append(path) or real(path))
    for i in range(5):
        write(f"many/{i}/a.jpg")
    assert next(open_sources(["many"], "image")).id == "many/0/a.jpg"
    assert opened == ["many", "many/0"]


def peak(source):
    """MiB that reading all of a source takes beyond its beginning: of arrow, or of the process."""
    code = """if True:
        import sys
        from npclip.sources import open_sources
        def anonymous():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        start = top = count = 0
        for count, item in enumerate(open_sources(sys.argv[1:], "image"), 1):
            assert len(item.read()) == 10_000
            if count == 500: start = anonymous()
            if count % 100 == 0: top = max(top, anonymous())
        arrow = sys.modules.get("pyarrow")
        print(count, arrow.default_memory_pool().max_memory() / 1024 if arrow else top - start)
    """
    run = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True)
    assert not run.stderr
    count, kib = run.stdout.split()
    assert int(count) == 10_000
    return float(kib) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="of Linux")
@pytest.mark.parametrize("name, limit", [("t.tar", 4), ("t.tgz", 4), ("p.parquet", 40)])
def test_memory_stays_bounded(name, limit):
    data = [os.urandom(10_000) for _ in range(100)] * 100  # 100 MB
    if name == "p.parquet":  # all in one row group
        pq.write_table(pa.table({"jpg": data}), name, compression="none", use_dictionary=False)
    elif name == "t.tar":
        write_tar(name, ((f"{i:06}.jpg", image) for i, image in enumerate(data)))
    else:
        members = ((f"{i:06}.jpg", bytes(10_000)) for i in range(10_000))
        write_tar(name, members, "w:gz", compresslevel=1)
    assert peak(name) < limit
    os.remove(name)


def test_ids_are_the_same_in_every_run():
    write("f/a.jpg"), write_tar("f/t.tar", MEMBERS), write_parquet("f/p.parquet", jpg=[JPEG] * 9)
    code = "from npclip.sources import *; print(*(i.id for i in open_sources(['f'], 'image')))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert runs == {" ".join(ids(["f"])) + "\n"}
    assert len(list(islice(open_sources(["f"], "image"), 3))) == 3
