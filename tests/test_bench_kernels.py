"""tools/bench_kernels.py: it finds every kernel, measures, and writes what it says that it does."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from npclip import cpu, cpu_library

if reason := cpu_library.why_unavailable():
    pytest.skip(f"no C kernels: {reason}", allow_module_level=True)

import bench_kernels
from kernel_cases import OPS
from kernel_work import normal

# Exported, but no ops: some pack what products read, the others measure the machine.
PACKING = {"pack", "packed_size", "round_pack", "round_pack_transposed"}
HELPERS = PACKING | {"peak", "bandwidth"}
TINY = {
    "linear": "7x15x17", "attention": "2x5x2x8", "attention_pool": "2x5x2x8", "layer_norm": "3x33",
    "add_layer_norm": "3x33", "patchify": "1x8x4", "embed_patches": "1x5x16",
    "conv2d": "1x5x3x4x3x2", "avg_pool2d": "1x4x3x2", "l2_normalize": "3x17", "resize": "24x32x8",
    "similarity": "3x7x17", "quick_gelu": "3x17", "gelu": "3x17", "quick_gelu_backward": "3x17",
    "gelu_backward": "3x17", "layer_norm_backward": "3x33", "attention_backward": "2x5x2x8",
    "attention_pool_backward": "2x5x2x8", "embed_tokens_backward": "9x17x5", "adamw": "33",
    "square_sums": "33", "linear_weight_backward": "33x15x17",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One round of linear at one tiny shape: the JSON, and the SVG."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["linear", "--shapes", TINY["linear"], "--rounds", "1"]
    outputs = ["--json", str(folder / "out.json"), "--svg", str(folder / "out.svg")]
    assert bench_kernels.main(arguments + outputs) == 0
    return json.loads((folder / "out.json").read_text()), (folder / "out.svg").read_text()


def test_every_kernel_that_the_library_exports_is_timed():
    dtypes, isas = "|".join(bench_kernels.DTYPES), "|".join(cpu_library.ISAS)
    strings = re.findall(rb"[a-z][a-z_0-9]+\0", Path(cpu_library.library_path()).read_bytes())
    exported = set()
    for string in strings:
        words = string[:-1].decode().split("_")
        for start in range(len(words)):  # a linker stores a name once that ends another
            name = "_".join(words[start:])
            match = re.fullmatch(rf"(.+)_([a-z]{{1,3}}[0-9]{{1,2}})_({isas})", name)
            if match and hasattr(cpu_library.library(), name):
                exported.add(match.groups())
    assert all(re.fullmatch(dtypes, dtype) for _, dtype, _ in exported)
    assert {op for op, _, _ in exported} >= {*OPS, "peak"}
    runnable = {name for name in exported if name[2] in cpu_library.machine_isas()}
    timed = {tuple(kernel) for op in OPS for kernel in bench_kernels.kernels(op)}
    assert timed == {name for name in runnable if name[0] not in HELPERS}
    assert set(OPS) == set(cpu_library.SIGNATURES) - HELPERS


def test_json(measured):
    result, _ = measured
    assert [row["kernel"] for row in result["rows"]] == [
        "numpy",
        *map(str, bench_kernels.kernels("linear")),
    ]
    flop = 2 * 7 * 15 * 17
    for row in result["rows"]:
        weight = 15 * 17 * (4 if row["dtype"] == "f32" else 2)
        in_pairs = row["dtype"] == "bf16" and row["isa"] in cpu.PAIRS
        nbytes = (2 if in_pairs else 4) * (7 * 15 + 7 * 17) + 4 * 17 + weight
        assert (row["op"], row["shape"], row["state"]) == ("linear", "7x15x17", "warm")
        assert 0 < row["seconds"] < 1
        assert row["gflops"] == pytest.approx(flop / row["seconds"] / 1e9)
        assert row["gbytes"] == pytest.approx(nbytes / row["seconds"] / 1e9)
        assert row["intensity"] == pytest.approx(flop / nbytes)
        assert row["roof"] > 0
        assert row["numpy"] > 0
    assert result["rows"][0]["numpy"] == 1
    peaks = [key for key in result["peaks"] if "_" in key]
    assert {key.partition("_")[2] for key in peaks} == set(cpu_library.machine_isas())
    assert all(0 < rate < 1e6 for rate in result["peaks"].values())
    assert set(result["versions"]) == {"npclip", "python", "numpy", "blas"}


def test_svg(measured):
    _, svg = measured
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    shown = {kernel.dtype: kernel for kernel in reversed(bench_kernels.kernels("linear"))}
    for kernel in bench_kernels.kernels("linear"):
        assert texts.count(str(kernel)) == (kernel in shown.values())
    assert len([e for e in root.iter() if e.tag.endswith("}circle")]) == len(shown)
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize("op", OPS)
def test_a_recorded_call_computes_what_numpy_does(op):
    shape = tuple(map(int, TINY[op].split("x")))
    for kernel in bench_kernels.kernels(op):
        work = OPS[op].work(*shape)
        copies = 1 if work.weight is None else 2
        expected = bench_kernels.numpy_calls(work, kernel._replace(isa=""), 1)[0]()
        for call in bench_kernels.kernel_calls(work, kernel, copies):
            call()
            tolerance = 0.05 if kernel.dtype == "bf16" else 1e-2 if kernel.dtype == "f16" else 1e-4
            for array in expected if isinstance(expected, tuple) else (expected,):
                assert any(_equal(array, kept, tolerance) for kept in call.kept), kernel


def _equal(wanted, kept, tolerance):
    if getattr(kept, "shape", None) != wanted.shape or not isinstance(kept, np.ndarray):
        return False
    kept = cpu.to_float(kept)
    return np.abs(kept - wanted).max() <= tolerance * (1 + np.abs(wanted).max())


def test_a_shape_that_a_model_would_give_to_numpy_is_refused():
    work = OPS["attention"].work(1, cpu.MAX_KEYS + 1, 1, 4)
    with pytest.raises(ValueError, match="no C kernel"):
        bench_kernels.kernel_calls(work, bench_kernels.kernels("attention")[0], 1)


def test_the_table_in_a_readme(tmp_path, measured):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- kernels -->\nold\n<!-- /kernels -->\nafter\n")
    arguments = [
        "layer_norm",
        "--rounds",
        "1",
        "--isa",
        cpu_library.machine_isas()[-1],
        "--json",
        "-",
    ]
    assert bench_kernels.main([*arguments, "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- kernels -->\n")
    assert text.endswith("<!-- /kernels -->\nafter\n")
    assert "old" not in text
    assert (
        f"| `layer_norm_f32_{cpu_library.machine_isas()[-1]}` | 50x768 | ViT-B/32, batch 1 |"
        in text
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "linear --isa sse2",
        "linear --dtype f64",
        "attention --dtype f16",
        "linear --shapes 50x768",
        "linear --shapes 50x768xM",
        "linear --shapes 50x0x768",
        "linear --shapes 5x6x7,5x6",
        "linear --shapes 1x24577x1",
        "patchify --shapes 1x9x4",
        "linear --rounds 0",
        "linear --threads 0",
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        bench_kernels.main(arguments.split())
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_inputs_are_the_same_in_every_run():
    np.testing.assert_array_equal(normal(3, 4), normal(3, 4))
