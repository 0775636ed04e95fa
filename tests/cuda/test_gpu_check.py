"""tools/gpu_check.py without a GPU: its logic, and its checks on a fake device and the shim."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_cases
import gpu_check
import gpu_goldens
import gpu_journal
import gpu_kernels
import gpu_models
import gpu_products
import gpu_report
import numpy as np
import pytest
from cuda import ptx, shim
from cuda.fake_device import FakeDevice
from gpu_cases import Case
from gpu_journal import Journal
from gpu_rates import HostTimer, Rates, interleaved, median_seconds, rotation

import npclip
from npclip import cuda, cuda_device, cuda_linear
from npclip.config import ARCHITECTURES

GOLDENS = Path(__file__).with_name("goldens.npz")
CAPABILITY = (8, 0)
RATES = Rates(copy=1e12, gemm=1e14)


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice(CAPABILITY)
    monkeypatch.setattr(cuda_device, "_devices", {0: device})
    return device


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "stage.json", 100)


# The budget, the processes, the files


def test_a_stage_gets_its_share_of_what_is_left():
    names = gpu_check.chosen_stages(None)
    assert "tiny" not in names
    left, now = 540.0, []
    for i in range(len(names)):
        now.append(gpu_check.allowance(left, names[i:]))
        left -= now[-1]
    assert left == pytest.approx(0, abs=1e-6)
    shares = [gpu_check.STAGES[name].share for name in names]
    np.testing.assert_allclose(np.divide(now, shares), 540 / sum(shares))
    assert gpu_check.allowance(100, names[-1:]) == 100  # what the others left over
    assert gpu_check.allowance(-1, names) == 0


def test_stages_are_chosen_by_name():
    assert gpu_check.chosen_stages("models,kernels") == ["kernels", "models"]
    peers = gpu_check.chosen_stages("peers")
    assert len(peers) == 5
    assert all(name.startswith("peers-") for name in peers)
    with pytest.raises(ValueError, match="no stage 'kernel'"):
        gpu_check.chosen_stages("kernel")


def test_a_process_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    touch = "import sys, time; time.sleep(1.5); open(sys.argv[1], 'w')"
    code = (
        "import subprocess, sys, time; print('started', flush=True);"
        f"subprocess.Popen([sys.executable, '-c', {touch!r}, sys.argv[1]]); time.sleep(60)"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    assert gpu_journal.run_process(command, 1, tmp_path / "log") is None
    assert time.monotonic() - start < 10
    assert (tmp_path / "log").read_text() == "started\n"
    time.sleep(1.5)
    assert not (tmp_path / "file").exists()
    assert gpu_journal.run_process([sys.executable, "-c", "exit(3)"], 30, tmp_path / "log") == 3


STAGES = """
import os, time
def good(journal, out, work): journal.row(value=1, ok=True)
def skips(journal, out, work): return "no such thing"
def wrong(journal, out, work): journal.row(value=2, ok=False)
def fails(journal, out, work): journal.row(value=3); raise ValueError("what is wrong")
def dies(journal, out, work): journal.row(value=4); print("last words", flush=True); os._exit(7)
def hangs(journal, out, work): journal.row(value=5); time.sleep(60)
"""


@pytest.fixture
def made_up_stages(tmp_path, monkeypatch):
    """Stages of a module in tmp_path, also in the processes that are started."""
    (tmp_path / "made_up.py").write_text(STAGES)
    program = tmp_path / "program.py"
    names = ("good", "skips", "wrong", "fails", "dies", "hangs")
    text = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(Path(gpu_check.__file__).parent)]}\n"
        f"import gpu_check\nfrom gpu_check import Stage\n"
        f"gpu_check.STAGES = {{n: Stage('made_up', n, 1) for n in {names}}}\n"
        "sys.exit(gpu_check.main())\n"
    )
    program.write_text(text)
    stages = {name: gpu_check.Stage("made_up", name, 1) for name in names}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    return list(names)


def test_a_broken_stage_stops_nothing(made_up_stages, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--stages", ",".join(made_up_stages[:5]), "--budget", "100"]
    assert gpu_check.main(arguments) == 1
    stages = json.loads((out / "gpu_check.json").read_text())["stages"]
    status = {name: stage["status"] for name, stage in stages.items()}
    assert status == {
        "good": "done", "skips": "skipped", "wrong": "done", "fails": "failed", "dies": "failed",
    }  # fmt: skip
    assert stages["skips"]["reason"] == "no such thing"
    assert "ValueError: what is wrong" in stages["fails"]["reason"]
    assert stages["dies"]["reason"] == "ended with status 7\nlast words"
    values = [stage["rows"][0]["value"] for stage in stages.values() if stage["rows"]]
    assert values == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert printed == (out / "gpu_check.md").read_text()
    assert printed.endswith("ended with status 7 last words\n")
    assert "3 failures" in printed


def test_a_stage_that_hangs_leaves_what_it_found(made_up_stages, tmp_path):
    first = gpu_check.run_all(["good"], 60, tmp_path)
    assert first["stages"]["good"]["status"] == "done"
    start = time.monotonic()
    results = gpu_check.run_all(["hangs"], 4, tmp_path)
    assert time.monotonic() - start < 4
    stage = results["stages"]["hangs"]
    assert stage["status"] == "timed out"
    assert stage["rows"] == [{"value": 5}]
    assert results["stages"]["good"]["status"] == "done"  # of the run before
    assert not list(tmp_path.glob("*.part"))


def test_without_a_gpu_all_is_skipped_and_said(tmp_path):
    reason = cuda_device.why_unavailable()
    if reason is None:
        pytest.skip("there is a GPU")
    names = ["environment", "kernels", "peers-B/32"]
    results = gpu_check.run_all(names, 100, tmp_path)
    assert {s["reason"] for s in results["stages"].values()} == {reason}
    assert {s["status"] for s in results["stages"].values()} == {"skipped"}
    assert results["stages"]["environment"]["facts"]["numpy"] == np.__version__
    assert gpu_report.failures(results) == []


# Times


def test_times_are_medians_of_long_enough_samples():
    class Timer:
        def __init__(self):
            self.times, self.clock = [], iter([2e-3, 5.0, 1.0, 3.0])

        def __call__(self, work, times=1):
            self.times.append(times)
            return next(self.clock)

    timer = Timer()
    assert median_seconds(timer, lambda: None, rounds=3) == 3.0 / 5
    assert timer.times == [1, 5, 5, 5]


def test_interleaved_calls_take_turns():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    timer = SimpleNamespace(clock=0)

    def measure(work, times=1):
        for _ in range(times):
            work()
        return 0.02 * times

    found = interleaved(calls, measure, 3)
    assert found == {"a": 0.02, "b": 0.02}
    assert "".join(seen) == "aabb" + "ab" * 3
    assert timer.clock == 0


def test_buffers_are_rotated_until_no_cache_holds_them():
    assert rotation(1 << 20, 50 << 20) == 64
    assert rotation(10 << 20, 50 << 20) == 10
    assert rotation(1 << 30, 50 << 20) == 1
    assert rotation(1 << 20, 50 << 20, most=16) == 16
    assert rotation(3e9, 8e9, memory=8e9) == 2


def test_flop_are_those_of_open_clip():
    giga = {"ViT-B/32": 8.82, "ViT-B/16": 35.13, "ViT-L/14": 162.03, "ViT-L/14@336px": 381.92}
    for name, expected in giga.items():
        found = gpu_models.flop_per_image(ARCHITECTURES[name]) / 1e9
        assert found == pytest.approx(expected, rel=2e-3), name
    config, ids = ARCHITECTURES["ViT-B/32"], np.zeros((1, 77), np.int64)
    ids[0, 76] = config.vocab_size - 1
    assert gpu_models.flop_per_texts(config, ids) / 1e9 == pytest.approx(5.96, rel=0.02)


# Checks on the fake device


@pytest.mark.parametrize("case", gpu_cases.ALL_CASES.tiny, ids=str)
def test_every_op_is_checked(case, device):
    for kind in case.dtypes() if case.op == "take" else case.dtypes()[:1]:
        row = gpu_kernels.check(device, case, kind, repeats=2)
        assert row["ok"], row
        assert row["equal_repeats"]


def test_preprocessing_is_checked(device):
    row = gpu_kernels.check_preprocess(device, 37, 53, 16)
    assert row["ok"], row


def test_all_ops_have_a_tiny_case_and_one_of_clip():
    ops = {
        "attention", "attention_pool", "layer_norm", "add_layer_norm", "linear", "patchify",
        "embed_patches", "embed_tokens", "take", "l2_normalize", "conv2d", "avg_pool2d",
    }  # fmt: skip
    cases = gpu_cases.ALL_CASES
    assert {case.op for case in cases.clip} == ops | {"patch_linear"}
    assert {case.op for case in cases.tiny} == ops - {"patchify"} | {"patch_linear"}
    for case in [*cases.awkward, *cases.tiny]:
        case.arguments()
    texts = [str(case) for group in vars(cases).values() for case in group]
    assert len(texts) == len(set(texts))


def test_wrong_unwritten_and_changing_results_are_found(device, monkeypatch, journal):
    case, right = Case("take", (5, 2, 24)), cuda.take

    def replace(function):
        monkeypatch.setattr(cuda, "take", function)
        return gpu_kernels.check(device, case, "f16")

    def unwritten(x, rows):
        y = right(x, rows)
        y[1, 5] = device.empty((1,), "f16")[0]
        return y

    row = replace(unwritten)
    assert not row["ok"]
    assert np.isnan(row["relative_error"])
    row = replace(lambda x, rows: right(x, rows) * np.float16(1.01))
    assert not row["ok"]
    assert row["equal_repeats"]
    count = iter(range(9))

    def changing(x, rows):
        y = right(x, rows)
        y[0, 0] += np.float16(next(count) * 2e-3)
        return y

    row = replace(changing)
    assert not row["equal_repeats"]
    assert not row["ok"]

    def fails(x, rows):
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(cuda, "take", fails)
    gpu_kernels.check_all(device, journal, [case], kinds=("f16",))
    assert journal.rows[0]["error"] == "RuntimeError: no such\nluck"
    assert json.loads(journal.path.read_text())["rows"] == journal.rows


def test_checks_stop_when_the_time_is_over(device, tmp_path):
    journal = Journal(tmp_path / "stage.json", 0.5)
    gpu_kernels.check_all(device, journal, gpu_cases.ALL_CASES.tiny)
    assert journal.rows == []
    assert journal.facts["left_out"] == 3 * len(gpu_cases.ALL_CASES.tiny) - 2


@pytest.mark.parametrize("op", ["layer_norm", "attention"])
def test_an_op_is_timed(op, device):
    case = next(case for case in gpu_cases.ALL_CASES.tiny if case.op == op)
    cache = {"layer_norm": 2000, "attention": 40000}[op]
    row = gpu_kernels.timing(device, case, "f16", RATES, HostTimer(), cache)
    assert row["buffers"] > 1
    nbytes = {"layer_norm": 2 * 2 * 3 * 64 + 2 * 4 * 64, "attention": 4 * 2 * 18 * 128}[op]
    assert row["gb_s"] * row["microseconds"] * 1e3 == pytest.approx(nbytes, rel=1e-3)
    flop = {"layer_norm": 0, "attention": 4 * 2 * 2 * 9 * 9 * 64}[op]
    assert row["tflop_s"] * row["microseconds"] * 1e6 == pytest.approx(flop)
    roof = RATES.roof(flop, nbytes)
    assert row["of_roof"] * row["microseconds"] * 1e-6 == pytest.approx(roof, rel=1e-3)


def test_every_way_to_multiply_is_checked_and_timed(device, monkeypatch):
    few = {"16x32x128x4", "64x64x64x4", "64x64x16x3", "128x128x64x3 sm_90a"}
    chosen = {k: [v for v in cuda_linear.variants(k) if str(v) in few] for k in ("f16", "f32")}
    monkeypatch.setattr(cuda_linear, "variants", chosen.get)
    case = Case("linear", (9, 40, 24), "quick_gelu")
    rows = list(gpu_products.compare(device, case, "f16", RATES, HostTimer(), 1 << 12))
    ways = ["16x32x128x4", "64x64x64x4"]  # the one of Hopper does not run here
    assert [row["way"] for row in rows] == [*ways, "chosen"]
    assert all(row["ok"] for row in rows), rows
    (best,) = gpu_report.best_products(rows)
    assert best["own"] in ways
    assert best["own_microseconds"] == min(r["microseconds"] for r in rows if r["way"] in ways)
    rows = list(gpu_products.compare(device, case, "f32", None, HostTimer()))
    assert all(row["ok"] and "microseconds" not in row for row in rows), rows


def test_kernels_of_products_are_those_that_are_launched(device):
    known = set(gpu_products.kernels(CAPABILITY))
    assert not [kernel for kernel in known if kernel.arch]
    for case in gpu_products.AWKWARD[:2]:
        rows = list(gpu_products.compare(device, case, "f32", None, HostTimer()))
        assert all(row["ok"] for row in rows), rows
    launched = {launch.kernel for launch in device.launches if launch.kernel.op == "linear"}
    assert launched
    assert launched <= known
    assert any(kernel.arch == "90a" for kernel in gpu_products.kernels((9, 0)))


def test_towers_are_timed_and_compared(device, golden, journal):
    if "vit" not in golden.path.name:
        pytest.skip("a Vision Transformer is enough")
    for what in ("image", "text"):
        spec = "golden", what, "float16"
        gpu_models.bench_model(journal, device, golden.path, spec, (1, 4), 1e12, HostTimer(), 1)
    assert [row["batch"] for row in journal.rows] == [1, 4, 1, 4]
    assert all(row["ok"] and row["cosine"] > 0.9999 for row in journal.rows), journal.rows
    model = npclip.load(golden.path, device="cuda")
    found = gpu_models.eager_and_graph(device, model, 1, HostTimer())
    assert set(found) == {"eager", "graph"}
    assert gpu_models.launch_seconds(device, HostTimer(), 2) > 0


def test_threads_that_disturb_each_other_are_found():
    assert gpu_models.encode_in_threads(lambda x: x + 1, [np.ones(3), np.zeros(3)], 3)
    calls = iter(range(100))
    assert not gpu_models.encode_in_threads(lambda x: x + next(calls), [np.ones(3)] * 2, 3)


def test_compute_sanitizer_that_refuses_is_no_failure(tmp_path):
    def found(code):
        return gpu_kernels.sanitize([sys.executable, "-c", code], "memcheck", 30, tmp_path / "log")

    summary = "print('========= ERROR SUMMARY: {} errors');"
    assert found(summary.format(0))["ok"]
    wrong = found(summary.format(2) + "exit(99)")
    assert not wrong["ok"]
    assert wrong["result"] == "ERROR SUMMARY: 2 errors"
    refused = found("print('Device not supported'); exit(1)")
    assert refused["ok"]
    assert refused["result"] == "refused, 1: Device not supported"


# Peers: that what they compute is the same model


@pytest.mark.parametrize("module", ["transformers", "open_clip", "clip"])
@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.filterwarnings("ignore")
def test_peers_have_the_same_weights(module, what, golden, journal, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip(module)
    import gpu_peers
    import torch

    model = npclip.load(golden.path, device="cpu", dtype="float32")
    config = model.config
    if not config.is_vit:
        pytest.skip("peers are Vision Transformers")
    monkeypatch.setattr(gpu_peers, "MODULES", {module: gpu_peers.MODULES[module]})
    tower = gpu_peers.torch_tower(config, what, dict(golden.weights), journal)
    assert tower is not None, journal.facts
    inputs = gpu_models.captions(config, 3) if what == "text" else gpu_models.pixels(config, 3)
    encode = model.encode_text if what == "text" else model.encode_image
    own, x = encode(inputs), torch.from_numpy(inputs)
    gpu_peers.compare(
        journal, lambda: encode(inputs), lambda: gpu_peers.encode_with(tower, x), HostTimer(), own,
        lambda y: y.numpy(), rounds=1, model="golden", what=what, batch=3, peer=module,
    )  # fmt: skip
    (row,) = journal.rows
    assert row["cosine"] > 1 - 1e-6
    assert row["ratio"] > 0


# Goldens


def test_goldens_are_packed_and_unpacked(device, tmp_path):
    arrays, failed = gpu_goldens.record(device)
    on_shim = {name for name, probe in gpu_goldens.PROBES.items() if probe.on_shim}
    assert set(failed) == {"mma_1688_f16"}  # its inline PTX is for NVRTC
    (tmp_path / "goldens.npz").write_bytes(gpu_goldens.pack(arrays))
    found = gpu_goldens.unpack(tmp_path / "goldens.npz")
    assert set(found) == on_shim
    for name, (inputs, output) in found.items():
        assert [*inputs] == [*gpu_goldens.PROBES[name].inputs(np.random.default_rng(0))]
        np.testing.assert_array_equal(output, arrays[f"{name}/out"])


def test_the_shim_and_the_interpreter_agree(device):
    arrays, _ = gpu_goldens.record(device)
    for name, probe in gpu_goldens.PROBES.items():
        if not probe.on_shim:
            continue
        inputs = probe.inputs(np.random.default_rng(0))
        output = gpu_goldens.run_probe(ptx.run, probe, inputs, np.array)
        assert gpu_goldens.is_close(output, arrays[f"{name}/out"], probe.tolerance), name


@pytest.mark.skipif(not GOLDENS.exists(), reason="no GPU has written tests/cuda/goldens.npz yet")
@pytest.mark.parametrize("name", gpu_goldens.PROBES)
@pytest.mark.parametrize("stand_in", ["shim", "ptx"])
def test_stand_ins_agree_with_a_gpu(name, stand_in):
    probe, goldens = gpu_goldens.PROBES[name], gpu_goldens.unpack(GOLDENS)
    if name not in goldens or (stand_in == "shim" and not probe.on_shim):
        pytest.skip("not recorded, or not a word of the shim")
    if stand_in == "ptx" and probe.capability == gpu_goldens.HOPPER:
        pytest.skip("the interpreter has no wgmma")
    inputs, expected = goldens[name]
    run = {"shim": shim.run, "ptx": ptx.run}[stand_in]
    output = gpu_goldens.run_probe(run, probe, inputs, np.array)
    assert gpu_goldens.is_close(output, expected, probe.tolerance)


# The report


def test_tables_leave_out_empty_columns_and_keep_their_shape():
    columns = [("a", "a", ""), ("b", "b", ".1f"), ("c", "c", "d")]
    text = gpu_report.table(columns, [{"a": "x|y\nz", "b": 1.25}, {"a": "w"}])
    assert text == "| a | b |\n| --- | --- |\n| x/y z | 1.2 |\n| w |  |\n"
    assert gpu_report.table(columns, []) == ""
    assert len(gpu_report.cell("x" * 500)) == gpu_report.CELL


def test_the_report_has_every_stage_and_what_is_wrong():
    done = {"status": "done", "reason": "", "seconds": 1.0}
    facts = {
        "device": "a GPU", "capability": "9.0", "memory_gib": 80, "l2_mib": 50, "cupy": "14",
        "driver_cuda": "13.0", "runtime_cuda": "12.9", "nvrtc": ["libnvrtc.so 12.9"],
        "cublaslt": "120903", "copy_gb_s": 3000.0, "gemm_tflop_s": 700.0,
    }  # fmt: skip
    model = {"model": "ViT-B/32", "what": "image", "dtype": "float16", "batch": 8}
    rows = {
        "environment": [], "goldens": [{"probe": "mma", "ok": True}],
        "kernels": [{"case": "take 1", "dtype": "f16", "ok": False, "relative_error": 0.5}],
        "sanitizer": [{"tool": "memcheck", "ok": True, "result": "refused"}],
        "timings": [{"case": "layer_norm", "dtype": "f16", "microseconds": 2.0, "gb_s": 100.0,
                     "tflop_s": 0.0, "of_copy": 0.9, "of_gemm": 0.0, "of_roof": 0.9}],
        "products": [{"case": "linear 1x2x3", "way": "chosen", "ok": True, "microseconds": 3.0,
                      "tflop_s": 1.0, "of_roof": 0.5}],
        "launches": [{"model": "ViT-B/32", "batch": 1, "eager_milliseconds": 1.0,
                      "graph_milliseconds": 0.2}, {"threads": "image", "ok": True}],
        "models": [{**model, "ok": True, "milliseconds": 1.0, "per_second": 8000.0,
                    "of_gemm": 0.7, "cosine": 0.99999}],
        "peers-B/32": [{**model, "peer": "torch eager", "npclip_milliseconds": 1.0,
                        "milliseconds": 2.0, "ratio": 2.0, "cosine": 0.99999}],
    }  # fmt: skip
    stages = {name: {**done, "facts": {}, "rows": found} for name, found in rows.items()}
    stages["environment"]["facts"] = facts
    stages["peers-B/32"]["facts"] = {"missing": {"TensorRT": "not installed"}}
    results = {"date": "2026-01-01", "stages": stages}
    text = gpu_report.markdown(results)
    for name in rows:
        assert f"\n## {name}\n" in text
    peer = "| ViT-B/32 | image | 8 | torch eager | 1.000 | 2.000 | 2.00 |"
    for part in ("copies 3000 GB/s", peer,
                 "Not measured: TensorRT: not installed", "image equal", "90%"):  # fmt: skip
        assert part in text
    assert gpu_report.failures(results) == ["kernels: case take 1, dtype f16, relative_error 0.5"]
