"""The arrows of the design: no module imports one to its left, and imports cost nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import npclip
from npclip.__main__ import COMMANDS

PACKAGE = Path(npclip.__file__).parent
ORDER = [  # left to right; a module may import those further right only
    "__main__", "commands", "training.run", "training.loop", "training.validation",
    "training.curves", "training.run_folder", "training.data", "training.augment",
    "training.index", "training.settings", "training.checked", "training", "training.step",
    "training.state", "training.optim", "training.initialize", "training.parameters",
    "training.loss", "training.model", "training.ops", "search.gallery", "search.faiss_export",
    "search", "evaluation", "evaluation.confusion_picture", "evaluation.probe",
    "evaluation.zero_shot", "evaluation.image_folder", "evaluation.retrieval", "ray",
    "ray.engine", "ray.groups", "bulk", "sources", "sources.pairs", "sources.pair_files",
    "sources.walk", "sources.parquet", "sources.tars", "sources.texts", "sources.items",
    "store", "store.writer", "store.reader", "store.shards", "store.journal", "store.failures",
    "store.ids", "store.collection", "info", "convert", "__init__", "embedder", "zeroshot",
    "clip", "cuda_towers", "params", "provenance", "checkpoint", "torch_file",
    "safetensors_file", "key_names", "metadata_files", "unpickle", "tensor", "model", "resnet",
    "ops", "cuda_preprocess", "hub", "config", "inputs", "preprocess", "report", "cuda",
    "cuda_products", "cuda_attention", "cuda_images", "cuda_linear", "cuda_rows", "cuda_device",
    "nvrtc", "cublaslt", "tensor_map", "cuda_driver", "cuda_launch", "pil_pixels", "cpu_training",
    "cpu", "weights", "cpu_library", "threads", "tokenizer", "whole_file", "errors", "kernels",
]  # fmt: skip


def name_of(path):
    """npclip/store/ids.py -> "store.ids", npclip/store/__init__.py -> "store"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("commands", "kernels"):
        return parts[0]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PATHS = {name: path for name, path in PATHS.items() if name not in ("commands", "kernels")}
MODULES = sorted(PATHS)


def imports(module):
    """Modules of npclip that a module imports at its top level, by name."""
    path = PATHS[module]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].relative_to(PACKAGE).parts
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (known(".".join([*base, name])) for name in names)


def known(name):
    """The module, also where a name in it was imported."""
    while name not in ORDER and "." in name:
        name = name.rpartition(".")[0]
    return name


def third_party(module):
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_one_to_its_left(module):
    assert module in ORDER, "a new module: give it its place in ORDER"
    position = ORDER.index(module)
    for other in imports(module):
        assert ORDER.index(other) > position, f"{module} imports {other}"


@pytest.mark.parametrize("module", ["model", "resnet"])
def test_the_model_knows_ops_and_no_backend(module):
    assert set(third_party(module)) == {"__future__"}
    assert set(imports(module)) <= {"ops", "config", "resnet"}


@pytest.mark.parametrize("module", MODULES)
def test_frameworks_are_imported_nowhere(module):
    allowed = {"cupy"} if module == "cuda_device" else set()
    assert not set(third_party(module)) & {"torch", "cupy", "pickle", "tensorflow", "jax"} - allowed


def test_import_loads_numpy_and_nothing_heavy():
    code = "import sys, npclip; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "numpy" in loaded
    assert not {
        "PIL",
        "ftfy",
        "regex",
        "safetensors",
        "tqdm",
        "filelock",
        "urllib3",
        "pyarrow",
    } & set(loaded)


def test_every_module_of_commands_is_a_command():
    modules = {path.stem for path in (PACKAGE / "commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)
