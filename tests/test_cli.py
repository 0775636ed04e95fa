"""The command line and the README's programs, run for real on ViT-B/32 with random weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import VIT, weights

import npclip
from npclip.__main__ import main
from npclip.checkpoint import open_checkpoint
from npclip.config import Metadata

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "npclip", *map(str, arguments)], capture_output=True, text=True
    )


def test_classify(vit_b_32, pictures):
    picture = pictures / "chelsea.png"
    result = run("classify", picture, "a cat", "a dog", "--model", vit_b_32, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    expected = npclip.load(vit_b_32).classify(picture, ["a cat", "a dog"])
    assert found["a cat"] == pytest.approx(float(expected[0]), abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    table = run("classify", picture, "a cat", "--model", vit_b_32).stdout
    assert table.split()[:3] == ["a", "cat", "100.00%"]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_labels_that_stdout_cannot_encode(vit_b_32, pictures, monkeypatch, options):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run("classify", pictures / "chelsea.png", "café", "--model", vit_b_32, *options)
    assert (result.returncode, result.stderr) == (0, "")
    if options:
        assert json.loads(result.stdout) == {"café": 1.0}
    else:
        assert result.stdout.startswith("caf\\xe9")


def test_equal_labels_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["classify", "x.jpg", "cat", "dog", "cat", "--json"])
    assert exit.value.code == 2
    assert "'cat' is given twice" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_a_closed_output_is_no_error():
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "npclip", "models"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_output_whose_reader_has_left_is_no_message():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "npclip", "models"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "npclip", "models"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr == "npclip: error: standard output: No space left on device\n"


def test_convert_keeps_every_bit(vit_b_32, tmp_path, capsys):
    target = tmp_path / "converted.safetensors"
    assert main(["convert", str(vit_b_32), str(target)]) == 0
    assert "quick_gelu" in capsys.readouterr().out
    before, after = (open_checkpoint(p) for p in (vit_b_32, target))
    assert after.metadata.source == vit_b_32.name
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after.tensors[name].read(), tensor.read())


def test_info(vit_b_32, capsys):
    assert main(["info", str(vit_b_32), "--json", "--tensors"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 151_277_313
    assert report["config"]["activation"] == "quick_gelu"
    assert report["tensors"]["visual.proj"] == ["float16", 768, 512]
    assert len(report["fingerprint"]["weights_sha256"]) == 64
    assert main(["info", str(vit_b_32)]) == 0
    assert report["fingerprint"]["weights_sha256"] in capsys.readouterr().out


def test_info_of_one_tower_without_logit_scale(tmp_path, capsys):
    arrays = weights(VIT, towers=("image",))
    del arrays["logit_scale"]
    save_file(arrays, tmp_path / "image.safetensors", Metadata(activation="gelu").to_strings())
    assert main(["info", str(tmp_path / "image.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["towers"] == ["image"]
    assert report["parameters"] == sum(array.size for array in arrays.values())
    assert len(report["fingerprint"]["image"]) == 4


def test_models(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == npclip.available_models()


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "missing.jpg", "a cat", "--model", "MODEL"),
        ("classify", "PICTURE", "a cat", "--model", "no such model"),
        ("classify", "PICTURE", "a cat", "--model", "PICTURE"),
        ("classify", "PICTURE", "word " * 100, "--model", "MODEL"),
        ("convert", "MODEL", "MODEL"),
        ("convert", "MODEL", "no/such/folder/out.safetensors"),
        ("convert", "MODEL", ""),
        ("info", "PICTURE"),
    ],
    ids=" ".join,
)
def test_a_users_error_is_one_line_and_no_traceback(arguments, vit_b_32, pictures):
    names = {"MODEL": vit_b_32, "PICTURE": pictures / "rocket.jpg"}
    result = run(*(names.get(a, a) for a in arguments))
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"npclip: error: .+\n", result.stderr)


@pytest.mark.parametrize("arguments", [[], ["train"], ["classify", "x.jpg"], ["models", "x"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


def test_openais_quick_start_runs(vit_b_32, pictures, monkeypatch, capsys):
    """The README's program for those who come from openai/CLIP, with our model and picture."""
    section = README.partition("### Coming from openai/CLIP")[2]
    program = section.partition("```python\n")[2].partition("```")[0]
    program = program.replace("ViT-B/32", str(vit_b_32))
    program = program.replace("CLIP.png", str(pictures / "chelsea.png"))
    names: dict = {}
    exec(program, names)
    assert "Label probs" in capsys.readouterr().out
    assert names["image_features"].shape == (512,)
    assert names["probs"].shape == (1, 3)
    assert names["logits_per_text"].shape == (3, 1)


def test_the_readmes_labels_fit_the_template():
    """ "a photo of a {}." already has the article."""
    commands = re.findall(r"npclip classify \S+\.png (.*)", README)
    assert [command.split()[0] for command in commands] == ["fox", "cat", "cat"]


def test_the_readme_lists_every_model():
    for name in npclip.available_models():
        assert f"| {name} |" in README
