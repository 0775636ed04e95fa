"""The documentation's programs and commands, run on a tiny model with random weights."""

import importlib.util
import re
import shlex
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tiny_models import VIT, weights

import npclip
from npclip.__main__ import main
from npclip.config import Metadata

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from draw_shapes import write_all  # noqa: E402

PAGES = sorted(page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md"))
WITH_MODEL = "classify", "embed", "eval", "search"
BY_CI = ("pip", "pytest", "ruff", "mypy", "sphinx-build")  # .ci/run runs these in earnest


def configuration():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conf = configuration()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """With the vocabulary, pixels and embedding of ViT-B/32, and little between them."""
    config = replace(
        VIT, embed_dim=512, image_resolution=224, vision_patch_size=32,
        context_length=77, vocab_size=49408,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(weights(config), path, Metadata(activation="quick_gelu").to_strings())
    return path


@pytest.fixture
def folder(tmp_path, pictures, monkeypatch):
    """The working directory of a page's programs, with the files that they name."""
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPCLIP_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, tmp_path / "tests" / "data")
    shutil.copytree(ROOT / "examples" / "drawings", tmp_path / "examples" / "drawings")
    for name in ("photo.jpg", "CLIP.png", "query.jpg"):
        shutil.copy(pictures / "chelsea.png", tmp_path / name)
    for label, name in (("tabby_cat", "chelsea.png"), ("rocket", "rocket.jpg")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            shutil.copy(pictures / name, tmp_path / "photos" / label / f"{i}-{name}")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        shard.add(pictures / "chelsea.png", "0.png")
    (tmp_path / "captions.jsonl").write_text('{"text": "a cat"}\n{"text": "a rocket"}\n')
    (tmp_path / "names.json").write_text('{"tabby_cat": ["tabby cat", "tabby"]}')
    return tmp_path


def blocks(page, language):
    text = conf.expand((ROOT / "docs" / page).read_text("utf-8"))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def with_blocks(language):
    return [page for page in PAGES if blocks(page, language)]


def prepare_training(folder):
    """train.toml: the example, of a few steps."""
    write_all(folder / "shapes", train=64, validation=8, classes=2)
    text = (ROOT / "examples" / "train_shapes.toml").read_text()
    for long, short in (("steps = 1500", "steps = 2"), ("warmup = 100", "warmup = 1")):
        assert long in text
        text = text.replace(long, short)
    (folder / "train.toml").write_text(text.replace("batch = 128", "batch = 32"))


@pytest.mark.filterwarnings("ignore:::ray")
@pytest.mark.parametrize("page", with_blocks("python"), ids=str)
def test_programs(page, tiny, folder):
    program = "\n".join(blocks(page, "python"))
    if page.name == "training.md":
        prepare_training(folder)
    if "import ray" in program:
        pytest.importorskip("ray")
    exec(compile(program.replace("ViT-B/32", tiny.as_posix()), str(page), "exec"), {})


@pytest.mark.parametrize("page", with_blocks("sh"), ids=str)
def test_commands(page, tiny, folder):
    if page.name == "searching.md":
        run(["npclip", "embed", "photos", "-o", "collection"], tiny)
    if page.name == "training.md":
        prepare_training(folder)
    for line in "\n".join(blocks(page, "sh")).splitlines():
        for command in line.split("&&"):
            run(shlex.split(command, comments=True), tiny)


def run(words, tiny):
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    if not words or words[0] in BY_CI:
        return
    if words[0] == "python":
        assert (ROOT / words[1]).exists(), words
        if words[1] == "tools/random_checkpoint.py":
            shutil.copy(tiny, words[3])
        return
    assert words[0] == "npclip", f"a command that no test runs: {words}"
    arguments = [str(tiny) if word == "ViT-B/32" else word for word in words[1:]]
    knows_its_model = arguments[:2] == ["search", "drawings"]  # the model `tiny`
    if arguments[0] in WITH_MODEL and "--model" not in arguments and not knows_its_model:
        arguments += ["--model", str(tiny)]
    if arguments[0] == "train":
        short = {"examples/train_shapes.toml": "train.toml", "train.steps=3000": "train.steps=3"}
        arguments = [short.get(word, word) for word in arguments]
    if "ray" in arguments:
        pytest.importorskip("ray")
    if "--address" in arguments:  # of a cluster, which there is not
        return
    if {"--confusion", "--linear-probe"} & set(arguments):
        pytest.importorskip("matplotlib")
        pytest.importorskip("sklearn")
    assert main(arguments) == 0, words


def test_every_extra_that_is_named_exists():
    text = (ROOT / "pyproject.toml").read_text()
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", table, re.M))
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for names in re.findall(r"install .*?\"?\.\[(.+?)\]", file.read_text("utf-8")):
            assert set(names.split(",")) <= extras, file


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. auto(?:class|function):: npclip\.(\w+)$", pages, re.M)
    errors = {name for name in npclip.__all__ if name.endswith("Error")}
    assert sorted(documented) == sorted(set(npclip.__all__) - errors)
    assert ".. automodule:: npclip.errors\n" in pages
    assert errors <= set(vars(npclip.errors))


def test_an_include_ends_at_the_next_heading_and_skips_comments_in_code(tmp_path, monkeypatch):
    text = "# A\n\n```sh\n# B\n```\n\nab [x](docs/x.md)\n\n## B\n\nb\n"
    (tmp_path / "text.md").write_text(text)
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    assert conf.section("text.md", "A") == "```sh\n# B\n```\n\nab [x](docs/x.md)"
    assert conf.section("text.md", "B") == "b"
    assert conf.expand("<!-- text.md: A -->\n").endswith("ab [x](x.md)\n")
    with pytest.raises(ValueError, match="no heading 'C'"):
        conf.section("text.md", "C")


def test_docstrings_become_fields_and_references():
    lines = ["Do.", "", "x: one", "    more. Raises InputError.", "y: two. z: three", "", "End: x."]
    assert conf.fields(lines, {"x", "y", "z"}) == [
        "Do.",
        "",
        ":param x: one",
        "    more.",
        "",
        "Raises :exc:`~npclip.errors.InputError`.",
        "",
        ":param y: two.",
        ":param z: three",
        "",
        "End: x.",
    ]
