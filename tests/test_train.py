"""npclip train as a whole, on a tiny model of coloured shapes."""

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kernel_rule import new_rng
from safetensors.numpy import load_file

import npclip
from npclip.__main__ import main
from npclip.commands.train import Progress
from npclip.errors import InputError, TrainingError
from npclip.training import loop
from npclip.training.run import Listener, run
from npclip.training.run_folder import RunFolder, read_rows
from npclip.training.settings import read_settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from draw_shapes import SHAPES, write_all  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_blas_thread")
CONFIG = """
[model]
embed_dim = 32
image_resolution = 32
vision_layers = 1
vision_width = 64
vision_patch_size = 8
context_length = 10
vocab_size = 2048
transformer_layers = 1
transformer_width = 16

[data]
sources = "shapes/train.tar"

[augment]
scale = [0.8, 1.0]
flip = 0.5

[train]
batch = 16
steps = 9
learning_rate = 2e-3
warmup = 4
max_norm = 1.0

[output]
folder = "run"
save_every = 3
keep = 2
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_all(folder, train=256, validation=40, classes=4)
    return folder


@pytest.fixture
def folder(shapes, tmp_path, monkeypatch):
    """The working directory, with shapes/ and train.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").symlink_to(shapes)
    (tmp_path / "train.toml").write_text(CONFIG)
    return tmp_path


def train(*changes, resume=False):
    """The command's exit code."""
    options = [word for change in changes for word in ("--set", change)]
    return main(["train", "train.toml", *options, *["--resume"][: int(resume)]])


def weights(folder="run", step=9):
    return {
        name: array.tobytes()
        for file in ("model", "training")
        for name, array in load_file(Path(folder) / f"step-{step}" / f"{file}.safetensors").items()
    }


def log(folder="run"):
    return list(read_rows(Path(folder) / "log.jsonl"))


@pytest.fixture(scope="module")
def unbroken(shapes, tmp_path_factory):
    """The weights of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "train.toml").write_text(CONFIG.replace("shapes/", f"{shapes.as_posix()}/"))
    changes = [f"output.folder={folder.as_posix()}/run", "output.save_every=100"]
    run(read_settings(folder / "train.toml", changes))
    return weights(folder / "run")


def test_it_learns(folder, capsys):
    (folder / "prompts.txt").write_text("a {}\n")
    steps = "train.steps=80", "output.evaluate_every=40", "output.save_every=40"
    pairs = "train.batch=32", "data.validation=shapes/validation.tar"
    classes = "data.zero_shot=shapes/classes", "data.templates=prompts.txt"
    assert train(*steps, *pairs, *classes) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"run{os.sep}step-80: 80 steps, held-out loss ")
    assert err.count("held-out loss") == 3
    before, _, after = (row["evaluation"] for row in log() if "evaluation" in row)
    assert before["text_to_image@1"] < 0.12 and before["pairs"] == 40
    for name in ("image_to_text@1", "text_to_image@1"):
        assert after[name] > 0.2  # chance is about 0.03
    assert after["loss"] < before["loss"] - 1 and 0 <= after["zero_shot@1"] <= 1
    rows = [row for row in log() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert set(rows[0]) == {
        *("step", "loss", "image_accuracy", "text_accuracy", "gradient_norm"),
        *("learning_rate", "logit_scale", "pairs", "seconds"),
    }
    model = npclip.load("run/step-80", device="cpu")
    assert model.encode_text("a small red circle").shape == (32,)
    assert os.readlink("run/latest") == "step-80"
    assert npclip.load("run/best", device="cpu").weights_sha256


def test_the_same_run_gives_the_same_bits_on_any_number_of_readers(folder, unbroken):
    assert train("data.workers=4") == 0
    assert weights() == unbroken
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-6", "step-9"]


def test_killed_five_times_it_gives_the_bits_of_an_unbroken_run(folder, unbroken):
    rng = new_rng()
    limits = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "npclip", "train", "train.toml", "--resume"]
    for wanted in (1, 3, 4, 6, 8):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **limits},
            start_new_session=True,  # or a signal to the tests' group would end it, and be saved
        )
        while (not log() or log()[-1]["step"] < wanted) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:  # done before a test that had to wait came to kill it
            assert log()[-1]["step"] == 9
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert train(resume=True) == 0
    assert weights() == unbroken
    assert [row["step"] for row in log()] == list(range(1, 10))
    assert not list(Path("run").glob(".*.tmp"))


KILLED_AT = """
import os, signal, sys
from npclip.__main__ import main

events = "open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"
left, folder = int(sys.argv[1]), sys.argv[2]

def on_event(event, arguments):
    global left
    if event in events and any(folder in str(path) for path in arguments[:2]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(on_event)
sys.exit(main(["train", "train.toml", "--set", f"output.folder={folder}"]))
"""


def test_killed_before_any_change_of_its_folder_it_goes_on(folder, unbroken):
    """Of Python's own events a run of 9 steps has 67 in its folder; without matplotlib, 55."""
    limits = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    for event in new_rng().choice(np.arange(1, 68), 4, replace=False).tolist():
        name = f"killed-at-{event}"
        command = [sys.executable, "-c", KILLED_AT, str(event), name]
        killed = subprocess.run(command, env={**os.environ, **limits}, stderr=subprocess.PIPE)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr.decode()
        assert train(f"output.folder={name}", resume=True) == 0
        assert weights(name) == unbroken, name
        assert [row["step"] for row in log(name)] == list(range(1, 10))
        assert os.readlink(f"{name}/latest") == "step-9"
        assert {path.name for path in Path(name).rglob(".*")} == {".lock"}


class InterruptedAt(Listener):
    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step(self, row):
        if row["step"] == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_saved_and_goes_on(folder, unbroken, monkeypatch, capsys):
    at_4 = InterruptedAt(4)
    monkeypatch.setattr("npclip.commands.train.Progress.on_step", lambda _, row: at_4.on_step(row))
    assert train() == 130
    assert capsys.readouterr().err.endswith("npclip: interrupted\n")
    assert (folder / "run" / "step-4").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    os.chdir(folder)
    assert train(resume=True) == 0
    assert weights() == unbroken


def test_what_was_due_when_a_run_was_stopped_is_caught_up_on(folder, monkeypatch):
    """An evaluation that an interrupt left out; links and picture that a kill did."""
    monkeypatch.setattr(loop.Validation, "__call__", lambda *_: {"text_to_image@1": 0.5})
    changes = "data.validation=shapes/validation.tar", "output.evaluate_every=4"
    settings = read_settings("train.toml", changes)
    with pytest.raises(KeyboardInterrupt):
        run(settings, listener=InterruptedAt(4))
    assert [row["step"] for row in log() if "evaluation" in row] == [0]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(loop.Training, "_tidy", killed_at(9))
        run(settings, resume=True)
    assert os.readlink("run/latest") == "step-6"
    for path in Path("run").glob("*.svg"):
        path.unlink()
    run(settings, resume=True)
    assert os.readlink("run/latest") == "step-9" and os.readlink("run/best") == "step-4"
    assert [row["step"] for row in log()] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9]
    pytest.importorskip("matplotlib")
    assert Path("run/curves.svg").exists()


def killed_at(step):
    """_tidy, which fails at a step."""
    original = loop.Training._tidy

    def tidy(training, log):
        if training.model.state.step == step:
            raise OSError("killed")
        original(training, log)

    return tidy


def test_a_signal_that_is_ignored_stays_so(folder, unbroken):
    """As SIGINT does in what a script runs with &."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(read_settings("train.toml"), listener=InterruptedAt(4, times=2))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert weights() == unbroken


def test_a_second_interrupt_does_not_wait(folder):
    with pytest.raises(KeyboardInterrupt):
        run(read_settings("train.toml"), listener=InterruptedAt(4, times=2))
    assert [path.name for path in Path("run").glob("step-*")] == ["step-3"]


def poisoned(at):
    """train_step, before which a parameter becomes NaN at a step."""
    original = loop.train_step

    def step(state, *args, **options):
        if state.step == at:
            state.params["ln_final.weight"][:] = np.nan
        return original(state, *args, **options)

    return step


@pytest.mark.parametrize(("at", "last"), [(5, "checkpoint is run"), (1, "no checkpoint yet")])
def test_nan_stops_the_run_and_names_what_is_good(folder, unbroken, monkeypatch, capsys, at, last):
    monkeypatch.setattr(loop, "train_step", poisoned(at))
    assert train() == 1
    err = capsys.readouterr().err
    assert err.startswith(f"npclip: error: step {at + 1}: the loss is nan") and last in err
    assert (f"run{os.sep}step-3" in err) == (at == 5)
    monkeypatch.undo()
    os.chdir(folder)
    assert train(resume=True) == 0
    assert weights() == unbroken


def test_divergence_is_a_loss_that_is_back_at_chance():
    watch = loop.Watch(16)
    falling = [*np.linspace(2.7, 1.0, 100), *([1.0] * 100)]
    assert not any(map(watch, falling))
    assert not any(map(watch, [2.0] * 300))  # worse, and far from chance
    assert any(map(watch, [2.77] * 300)) and watch.since_lowest > 300
    assert not any(map(loop.Watch(16), [2.8] * 300))  # has learned nothing yet


@pytest.mark.parametrize(
    ("step", "since", "last"),
    [
        (3, 1, "there is no checkpoint yet in run"),
        (8, 4, f"the last good checkpoint is run{os.sep}step-3"),  # not step-6
        (8, 7, "there is no good checkpoint in run"),
    ],
)
def test_a_good_checkpoint_is_of_before_the_divergence(folder, monkeypatch, step, since, last):
    class Diverged(loop.Watch):
        def __call__(self, loss):
            self.seen, self.since_lowest = self.seen + 1, since
            return self.seen == step

    monkeypatch.setattr(loop, "Watch", Diverged)
    message = re.escape(f"step {step}: the loss is back at chance; {last}")
    with pytest.raises(TrainingError, match=message):
        run(read_settings("train.toml"))


def test_a_run_goes_on_only_with_its_own_settings(folder, capsys):
    steps = "train.steps=2", "train.warmup=1"
    assert train(*steps) == 0
    assert train(*steps) == 1
    assert "run has a run already: --resume goes on with it" in capsys.readouterr().err
    assert train(*steps, "train.seed=3", "augment.flip=0", resume=True) == 1
    err = capsys.readouterr().err
    assert "other settings: augment.flip: 0.5 -> 0.0; train.seed: 0 -> 3" in err
    assert train("train.steps=3", "train.warmup=1", "train.micro_batch=4", resume=True) == 0
    assert [row["step"] for row in log()] == [1, 2, 3]


def test_what_is_wrong_is_said_before_there_is_a_run(folder, capsys):
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    bad_curves = "must end in one of" if has_matplotlib else "needs matplotlib"
    for change, reason in {
        "data.sources=missing.tar": "missing.tar: no such file",
        "data.validation=missing.tar": "missing.tar: no such file",
        "data.zero_shot=missing": "missing",
        "data.zero_shot=shapes/classes": "data.templates can name a file of shorter prompts",
        "train.batch=1000": "256 pairs do not fill a batch of 1000",
        "train.freeze.image=7": "image=7 is neither 0 .. 1",
        "train.device=tpu": "device 'tpu'",
        "output.curves=x.nothing": f"output.curves {bad_curves}",
        "train.bach=3": "did you mean train.batch?",
    }.items():
        assert train(change) == 1, change
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
        assert not Path("run/config.toml").exists()
    with pytest.raises(InputError, match="warmup 4 is more than the run's 3 steps"):
        config = (folder / "train.toml").read_text().replace("steps = 9", "epochs = 1")
        (folder / "epochs.toml").write_text(config)
        run(read_settings("epochs.toml", ["train.batch=80"]))
    with pytest.raises(SystemExit) as exit:
        train("steps")
    assert exit.value.code == 2
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").touch()
    (folder / "full" / ".thesis.tmp").touch()
    assert train("output.folder=full") == 1
    assert "is not empty, and has no run: .thesis.tmp" in capsys.readouterr().err
    assert sorted(os.listdir("full")) == [".lock", ".thesis.tmp", "thesis.tex"]
    assert train("train.steps=1", "train.warmup=0") == 0


def test_a_kill_before_the_first_step_leaves_a_folder_that_can_be_used(folder):
    """As one while the settings or an index are written leaves it."""
    steps = "train.steps=1", "train.warmup=0"
    (folder / "run" / "pairs" / ".train-0123.4567.tmp").mkdir(parents=True)
    (folder / "run" / ".config.toml.0123.part").touch()
    assert train(*steps) == 0
    (folder / "run" / "pairs" / ".validation-0123.4567.tmp").mkdir()
    assert train(*steps, resume=True) == 0
    assert not [path for path in Path("run").rglob(".*") if path.name != ".lock"]


def test_a_folder_has_one_writer(folder):
    with RunFolder("run"), pytest.raises(TrainingError, match="written by another process"):
        RunFolder("run").__enter__()


def test_pairs_that_cannot_be_read_are_told_once(folder, capsys):
    classes = (folder / "shapes" / "classes").resolve()
    paths = sorted(str(path) for path in classes.rglob("*.png"))[:15]
    rows = [
        *({"path": path, "text": f"a {i}"} for i, path in enumerate(paths)),
        {"path": "gone.png", "text": "gone"},
        {"path": paths[0]},
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("data.sources=t.jsonl", "train.steps=3", "train.warmup=0", "train.batch=16") == 0
    out, err = capsys.readouterr()
    assert out == f"run{os.sep}step-3: 3 steps, 1 unreadable pairs left out\n"
    assert err.count("t.jsonl::16") == 1 and "1 of train are no pairs" in err
    assert [row["pairs"] for row in log()] == [15, 15, 15]
    (failed,) = read_rows(Path("run/failed.jsonl"))
    assert failed == {"id": "t.jsonl::16", "reason": "No such file or directory"}
    Path("run/failed.jsonl").write_text('{"id": "t.jso')  # a kill may leave that
    changes = "data.sources=t.jsonl", "train.steps=4", "train.warmup=0", "train.batch=16"
    assert train(*changes, resume=True) == 0
    assert list(read_rows(Path("run/failed.jsonl"))) == [failed]


def test_fine_tuning_changes_what_is_not_frozen(folder):
    assert train("train.steps=1", "train.warmup=0") == 0
    (folder / "tune.toml").write_text("[data]" + CONFIG.partition("[data]")[2])
    changes = "model.checkpoint=run/step-1", "train.freeze.image=all", "output.folder=tuned"
    settings = read_settings("tune.toml", changes)
    result = run(settings)
    folders = Path("run/step-1"), result.checkpoint
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    for name, array in before.items():
        assert (array.tobytes() == after[name].tobytes()) == name.startswith("visual."), name
    assert result.step == 9 and result.evaluation == {}
    hashes = {npclip.load(folder, device="cpu").weights_sha256 for folder in folders}
    assert len(hashes) == 2


def test_the_best_checkpoint_is_kept(folder, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.7, 0.9, 0.2])
    monkeypatch.setattr(loop.Validation, "__call__", lambda *_: {"text_to_image@1": next(scores)})
    changes = "data.validation=shapes/validation.tar", "output.evaluate_every=2", "output.keep=1"
    assert train(*changes, "train.steps=10", "output.save_every=2") == 0
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-10", "step-4"]
    assert (os.readlink("run/latest"), os.readlink("run/best")) == ("step-10", "step-4")


def test_where_there_are_no_links_a_file_names_the_checkpoint(folder, monkeypatch):
    def refused(*_args, **_options):
        raise OSError("a privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refused)
    assert train("train.steps=1", "train.warmup=0") == 0
    assert Path("run/latest").read_text() == "step-1\n"


def test_curves(folder):
    pytest.importorskip("matplotlib")
    for name, head in {"curves.svg": b"<?xml", "c.png": b"\x89PNG"}.items():
        changes = "train.steps=3", "train.warmup=0", "data.validation=shapes/validation.tar"
        assert train(*changes, f"output.folder={name}-run", f"output.curves={name}") == 0
        assert Path(f"{name}-run", name).read_bytes().startswith(head)


def test_without_matplotlib_there_is_no_picture(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert train("train.steps=1", "train.warmup=0") == 0
    assert not list(Path("run").glob("*.svg"))
    with pytest.raises(npclip.errors.BackendError, match=r"output\.curves needs matplotlib"):
        run(read_settings("train.toml", ["output.folder=x", "output.curves=c.svg"]))


def test_the_example_is_a_configuration(folder):
    settings = read_settings(ROOT / "examples" / "train_shapes.toml")
    assert settings.model.config() is not None
    with pytest.raises(InputError):
        read_settings(ROOT / "examples" / "train_shapes.toml", ["train.step=1"])


def test_progress_on_a_terminal_and_elsewhere(capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("npclip.commands.train.time.monotonic", lambda: next(clock))
    rows = [{"step": i, "loss": 4.0 - i, "pairs": 8} for i in (1, 2, 3)]
    evaluated = {"step": 3, "evaluation": {"loss": 1.5, "text_to_image@1": 0.25}}
    said = []
    for is_terminal in (True, False):
        monkeypatch.setattr("npclip.commands.train.LINES_EVERY", 0)
        progress = Progress(is_terminal)
        progress.on_start(0, 5, 8)
        for row in rows:
            progress.on_step(row)
        progress.on_evaluation(evaluated)
        progress.on_note("a note")
        progress.close()
        said.append(capsys.readouterr().err)
    bar, lines = said
    assert "loss=1.000" in bar and "3/5" in bar and "pairs=" in bar
    for text in said:
        assert "step 3: held-out loss 1.500; text to image, top 1 25.0%" in text
        assert "npclip: a note" in text
    assert "step 3 of 5: loss 1.000, 3 pairs a second, 0:00:06 left" in lines


def test_an_augmentation_of_ones_own(folder):
    seen = []

    def augmentation(image, text, size, rng):
        seen.append((image.size, text.split()[-1], size, rng.random()))
        return np.zeros((size, size, 3), np.uint8)

    settings = read_settings("train.toml", ["train.steps=1", "train.warmup=0"])
    run(settings, augmentation=augmentation)
    assert len({draw for *_, draw in seen}) == len(seen) >= 16
    assert {size for size, *_ in seen} == {(32, 32)}
    assert {word for _, word, *_ in seen} <= set(SHAPES)
