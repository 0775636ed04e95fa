"""Whole collections: every row once, bit for bit, whatever happens on the way."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from hostile_files import write_hostile_folder
from PIL import Image

import npclip
from npclip import bulk
from npclip.__main__ import main
from npclip.bulk import embed
from npclip.commands import embed as commands_embed
from npclip.store import Reader

EVERYTHING = bool(os.environ.get("NPCLIP_TEST_EVERYTHING"))
PICTURES, KILLS = (5000, 20) if EVERYTHING else (400, 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_models.save_words(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return npclip.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of mixed sizes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng()
    for i in range(PICTURES):
        height, width = rng.integers(16, 400, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(folder / f"{i:05}.jpg")
    return folder


def contents(folder):
    """id -> embedding, and each id once."""
    with Reader(folder) as reader:
        blocks = [np.array(block) for _, block in reader.blocks(1000)]
        rows = reader.rows(range(len(reader)))
    found = dict(zip((id for id, _ in rows), np.concatenate(blocks), strict=True))
    assert len(found) == len(rows)
    return found


def failures(folder):
    """id -> reason, and each id once."""
    lines = [json.loads(line) for line in (Path(folder) / "errors.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["reason"] for line in lines}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for id, embedding in wanted.items():
        np.testing.assert_array_equal(found[id], embedding)


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_the_models(photos, model, tmp_path, format, normalize):
    options = {"dtype": "float32", "format": format, "normalize": normalize}
    report = embed(photos, tmp_path / "out", model, **options)
    assert (report.embedded, report.skipped, report.failed) == (PICTURES, 0, 0)
    paths = sorted(photos.iterdir())
    wanted = model.encode_image(paths, normalize=normalize)
    assert_equal(contents(tmp_path / "out"), dict(zip(map(str, paths), wanted, strict=True)))
    with Reader(tmp_path / "out") as reader:
        assert reader.provenance == model.provenance(normalize)
    again = embed(photos, tmp_path / "out", model, **options)
    assert (again.embedded, again.skipped, again.failed) == (0, PICTURES, 0)


@pytest.mark.parametrize("batch, workers", [(1, 1), (7, 3), (1000, 8)])
def test_neither_batches_nor_workers_matter(photos, model, tmp_path, batch, workers):
    some = sorted(photos.iterdir())[:50]
    embed(some, tmp_path / "a", model, batch=batch, workers=workers)
    embed(some, tmp_path / "b", model)
    assert_equal(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_texts(model, tmp_path):
    texts = ["a cat", "", "two\u2028dogs", "word " * 200, "a cat"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    report = embed(file, out, model, "text", dtype="float32")
    assert (report.embedded, report.failed) == (4, 1)
    (reason,) = failures(out).values()
    assert "77" in reason
    short = [text for text in texts if len(text) < 100]
    wanted = model.encode_text(short, normalize=True)
    np.testing.assert_array_equal(np.stack(list(contents(out).values())), wanted)
    report = embed(file, out, model, "text", dtype="float32", truncate=True)
    assert (report.embedded, report.skipped, report.failed) == (1, 4, 0)
    assert not (out / "errors.jsonl").exists() or not failures(out)


@pytest.mark.parametrize("out", ["", "out"])
def test_a_collection_inside_its_source_is_no_source(model, tmp_path, out):
    for format in ("npy", "parquet"):
        source = tmp_path / format
        source.mkdir()
        (source / "a.txt").write_text("a cat\n" + "word " * 100 + "\n")
        for again in range(3):
            report = embed(source, source / out, model, "text", format=format)
            assert (report.embedded, report.failed) == (not again, 1)


def test_an_embedding_that_cannot_be_stored_is_one_failure(photos, model, tmp_path, monkeypatch):
    some, encode = sorted(photos.iterdir())[:5], npclip.CLIP.encode_image

    def huge(self, x, normalize):
        embeddings = encode(self, x, normalize)
        embeddings[2] = 1e5  # beyond float16
        return embeddings

    monkeypatch.setattr(npclip.CLIP, "encode_image", huge)
    report = embed(some, tmp_path / "out", model)
    assert (report.embedded, report.failed) == (4, 1)
    assert failures(tmp_path / "out") == {str(some[2]): "its embedding is not finite in float16"}
    assert contents(tmp_path / "out").keys() == {str(path) for path in some} - {str(some[2])}


def test_what_comes_twice_is_embedded_once(photos, model, tmp_path):
    one = sorted(photos.iterdir())[0]
    report = embed([one, photos, one], tmp_path / "out", model)
    assert (report.embedded, report.failed) == (PICTURES, 0)
    assert len(contents(tmp_path / "out")) == PICTURES


def test_another_model_is_refused(photos, checkpoint, model, tmp_path):
    one = sorted(photos.iterdir())[0]
    embed(one, tmp_path / "out", model)
    other = npclip.load(checkpoint, device="cpu", dtype="bfloat16")
    with pytest.raises(npclip.ProvenanceError, match="dtype"):
        embed(photos, tmp_path / "out", other)
    with pytest.raises(npclip.ProvenanceError, match="reduced"):
        embed(photos, tmp_path / "out", model, fast_decode=True)
    assert len(contents(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "video"},
        {"batch": 0},
        {"workers": 0},
        {"max_pixels": 0},
        {"truncate": True},
        {"kind": "text", "fast_decode": True},
        {"dtype": "int8"},
        {"format": "csv"},
    ],
    ids=str,
)
def test_wrong_arguments_leave_nothing_behind(photos, model, tmp_path, options):
    with pytest.raises(npclip.InputError):
        embed(photos, tmp_path / "out", model, **options)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_exist_leave_nothing_behind(model, tmp_path):
    with pytest.raises(npclip.InputError, match="nowhere"):
        embed(tmp_path / "nowhere", tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_threads_are_ahead_of_the_encoder_and_not_far(model):
    read = []

    def item(i):
        return bulk.Item(str(i), str(i), lambda: read.append(i) or "a cat")

    options = bulk.Options("text")
    outcomes = bulk.decoded(map(item, range(10_000)), model, options, workers=2, ahead=256)
    next(outcomes)
    time.sleep(0.5)
    assert 256 <= len(read) <= 256 + 3 * 64
    outcomes.close()


def test_large_images_are_refused_and_jpegs_reduced(model, tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    report = embed(tmp_path, tmp_path / "out", model, max_pixels=400 * 300 - 1)
    assert (report.embedded, report.failed) == (1, 1)
    (reason,) = failures(tmp_path / "out").values()
    assert "400 x 300" in reason


def test_fast_decode_is_close(model, pictures, tmp_path):
    exact = embed(pictures / "rocket.jpg", tmp_path / "exact", model, dtype="float32")
    fast = embed(
        pictures / "rocket.jpg", tmp_path / "fast", model, dtype="float32", fast_decode=True
    )
    assert exact.embedded == fast.embedded == 1
    (a,), (b,) = contents(tmp_path / "exact").values(), contents(tmp_path / "fast").values()
    assert 0.99 < a @ b < 1 - 1e-7
    with Reader(tmp_path / "fast") as reader:
        assert reader.provenance.fast_decode


def start(*arguments, **options):
    command = [sys.executable, "-m", "npclip", "embed", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options)


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_and_started_again_it_has_every_row_once(photos, checkpoint, tmp_path):
    options = "--model", checkpoint, "--device", "cpu", "--batch", "8"
    began = time.monotonic()
    _, error = start(photos, "-o", tmp_path / "unbroken", *options).communicate()
    assert not error, error
    duration, done, kills = time.monotonic() - began, False, 0
    while not done:
        run = start(photos, "-o", tmp_path / "broken", *options)
        if kills < KILLS:
            time.sleep(random.uniform(0.3, 0.3 + 2 * duration / KILLS))
            done = run.poll() is not None
            run.send_signal(signal.SIGKILL)
            kills += not done
        _, error = run.communicate()
        done = done or run.returncode == 0
        assert run.returncode in (0, -signal.SIGKILL), error
    print(f"{kills} kills")
    unbroken = contents(tmp_path / "unbroken")
    assert len(unbroken) == PICTURES
    assert_equal(contents(tmp_path / "broken"), unbroken)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken EXIF
@pytest.mark.skipif(os.name == "nt", reason="links, fifos, names that are not UTF-8")
def test_a_hostile_folder(checkpoint, model, tmp_path):
    good, bad, either = write_hostile_folder(tmp_path / "in")
    assert len(good | bad | either) >= 200
    run = start("in", "-o", "out", "--model", checkpoint, "--device", "cpu", cwd=tmp_path)
    printed, error = run.communicate(timeout=120)
    assert (run.returncode, error) == (0, b"")
    rows, failed = contents(tmp_path / "out"), failures(tmp_path / "out")
    names = {os.path.join("in", name) for name in good}
    assert names <= rows.keys()
    assert {os.path.join("in", name) for name in bad} <= failed.keys()
    assert not rows.keys() & failed.keys()
    assert rows.keys() | failed.keys() == {f"in/{name}" for name in good | bad | either}
    assert all(reason and "\n" not in reason for reason in failed.values())
    assert f"{len(failed)} failed" in printed.decode()
    for name in good:
        wanted = model.encode_image((tmp_path / "in" / name).read_bytes(), normalize=True)
        np.testing.assert_array_equal(rows[f"in/{name}"], wanted.astype(np.float16))


def test_the_command_line(photos, checkpoint, tmp_path, capsys):
    arguments = ["embed", str(photos), "-o", str(tmp_path / "out"), "--model", str(checkpoint)]
    assert main([*arguments, "--store", "float32", "--format", "npy", "--device", "cpu"]) == 0
    assert f"{PICTURES} embedded" in capsys.readouterr().out
    assert main([*arguments, "--device", "cpu"]) == 1  # another storage
    assert "float32" in capsys.readouterr().err


def test_the_bar_of_a_terminal(photos, checkpoint, tmp_path):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "npclip", "embed", photos, "-o", tmp_path / "out"]
    command += ["--model", checkpoint, "--device", "cpu", "--batch", "32"]
    run = subprocess.Popen(command, stderr=other_end, stdout=subprocess.PIPE)
    run.communicate(timeout=60)
    os.close(other_end)
    shown = ""
    with suppress(OSError):  # its end
        while piece := os.read(terminal, 1 << 16).decode():
            shown += piece
    assert f"{PICTURES}/{PICTURES}" in shown and "items/s" in shown


def test_lines_where_there_is_no_terminal(photos, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands_embed, "LINES_EVERY", 0.0)
    arguments = ["embed", str(photos), "-o", str(tmp_path / "out"), "--model", str(checkpoint)]
    assert main([*arguments, "--device", "cpu", "--batch", "100"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(100, PICTURES + 1, 100))


def test_the_bar_takes_nothing_from_standard_input(photos, checkpoint, tmp_path):
    """It counts the sources in a thread, which a list with "-" in it must not be read by."""
    (tmp_path / "list").write_text("-\n")
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "npclip", "embed", "@list", "-o", "out", "--device", "cpu"]
    paths = "\n".join(map(str, sorted(photos.iterdir())[:30]))
    run = subprocess.run(
        [*command, "--model", checkpoint],
        cwd=tmp_path, input=paths.encode(), stderr=other_end, timeout=60,
    )  # fmt: skip
    os.close(other_end)
    os.close(terminal)
    assert run.returncode == 0
    assert len(contents(tmp_path / "out")) == 30


def test_a_source_that_is_not_there_is_said_before_a_model_is_read(capsys, tmp_path):
    assert main(["embed", str(tmp_path / "typo"), "-o", str(tmp_path / "out")]) == 1
    assert "typo: no such file" in capsys.readouterr().err
    assert main(["embed", "", "-o", str(tmp_path / "out")]) == 1


def test_texts_from_stdin(model, checkpoint, tmp_path):
    run = start(
        "-",
        "--text",
        "-o",
        "out",
        "--model",
        checkpoint,
        "--device",
        "cpu",
        cwd=tmp_path,
        stdin=subprocess.PIPE,
    )
    run.communicate(b"a cat\na dog\n", timeout=60)
    assert run.returncode == 0
    wanted = model.encode_text(["a cat", "a dog"], normalize=True).astype(np.float16)
    np.testing.assert_array_equal(np.stack(list(contents(tmp_path / "out").values())), wanted)
