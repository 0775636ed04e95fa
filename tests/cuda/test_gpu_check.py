"""tools/gpu_check.py without a GPU: its logic, and its checks on a fake device and the shim."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple
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
import gpu_targets
import numpy as np
import pytest
from cuda import ptx, shim
from cuda.fake_device import FakeDevice, on_device
from gpu_cases import Case
from gpu_journal import Journal
from gpu_rates import EventTimer, HostTimer, Rates, interleaved, median_seconds, rotation

import npclip
from npclip import cuda, cuda_device, cuda_linear, cuda_towers, nvrtc
from npclip.config import ARCHITECTURES
from npclip.kernels import reference

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
    assert gpu_check.chosen_stages("models,kernels") == ["environment", "kernels", "models"]
    first, *peers = gpu_check.chosen_stages("peers")
    assert first == "environment"
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
def slow(journal, out, work):
    found = [n for n in range(4) if not journal.has(case=n)]
    for n in found[:2]: journal.row(case=n, dtype="f16", process=os.getpid())
    for n in found[2:]: journal.leave_out(f"case {n}")
"""


@pytest.fixture
def made_up_stages(tmp_path, monkeypatch):
    """Stages of a module in tmp_path, also in the processes that are started."""
    (tmp_path / "made_up.py").write_text(STAGES)
    program = tmp_path / "program.py"
    names = ("good", "skips", "wrong", "fails", "dies", "hangs", "slow")
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
    results = gpu_check.run_all(["hangs"], 4, tmp_path, first)
    assert time.monotonic() - start < 4
    stage = results["stages"]["hangs"]
    assert stage["status"] == "timed out"
    assert stage["rows"] == [{"value": 5}]
    assert results["stages"]["good"]["status"] == "done"  # of the run before
    assert not list(tmp_path.glob("*.part"))


def test_another_run_goes_on_where_one_ended(made_up_stages, tmp_path, capsys):
    def run(*more):
        names = ["--stages", "good,wrong,slow", "--budget", "60"]
        gpu_check.main(["--out", str(tmp_path / "out"), *names, *more])
        text = (tmp_path / "out" / "gpu_check.json").read_text()
        assert gpu_report.markdown(json.loads(text)) == capsys.readouterr().out
        return json.loads(text)["stages"]

    first = run()
    assert first["slow"]["status"] == "incomplete"
    assert first["slow"]["facts"]["left_out"] == ["case 2", "case 3"]
    second = run()
    assert second["slow"]["status"] == "done"
    assert second["slow"]["rows"][:2] == first["slow"]["rows"]
    assert [row["case"] for row in second["slow"]["rows"]] == [0, 1, 2, 3]
    assert len({row["process"] for row in second["slow"]["rows"]}) == 2
    assert second["good"] == first["good"]  # with its time
    assert second["wrong"]["rows"] == [{"value": 2, "ok": False}]  # tried again
    third = run()
    assert {name: third[name] for name in ("good", "slow")} == {
        name: second[name] for name in ("good", "slow")
    }
    anew = run("--anew")["slow"]
    assert [row["case"] for row in anew["rows"]] == [0, 1]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"stages": second}))
    assert run("--resume", str(other))["slow"] == second["slow"]
    kept = json.loads((tmp_path / "out" / "gpu_check.earlier.json").read_text())
    assert kept["stages"] == second


def test_results_of_other_code_or_another_gpu_are_not_gone_on_with(made_up_stages, tmp_path):
    old = gpu_check.run_all(["slow", "good"], 60, tmp_path)
    for key in ("code", "device"):
        changed = {name: {**stage, key: "other"} for name, stage in old["stages"].items()}
        found = gpu_check.run_all(["slow"], 60, tmp_path, {"stages": changed})["stages"]
        assert list(found) == ["slow"]
        assert [row["case"] for row in found["slow"]["rows"]] == [0, 1]
    (tmp_path / "a.cu").write_text("one")
    key = gpu_check.code_key((tmp_path,))
    (tmp_path / "a.cu").write_text("two")
    assert gpu_check.code_key((tmp_path,)) != key


def test_what_is_wrong_is_no_part_of_what_is_kept():
    def row(case, ok=True):
        return {"case": case, "dtype": "f16", "ok": ok}

    rows = [row("a"), row("b"), row("b", False), {"model": "c"}, {"model": "d", "error": "e"}]
    assert gpu_journal.good_rows(rows) == [row("a"), {"model": "c"}]


def test_without_npclip_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "npclip", None)
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "pip install --no-build-isolation" in capsys.readouterr().err


def test_what_is_not_installed_is_said_first(made_up_stages, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "NEEDED", {"no_such_module": "all of it"})
    results = gpu_check.run_all(["good"], 60, tmp_path)
    assert capsys.readouterr().err.startswith("not installed: no_such_module: all of it\n")
    assert "- not installed: no_such_module: all of it\n" in gpu_report.markdown(results)


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
    assert len(journal.facts["left_out"]) == 3 * len(gpu_cases.ALL_CASES.tiny) - 2
    journal.close("done")
    assert journal.status == "incomplete"


def test_cases_that_are_known_are_not_checked_again(device, tmp_path):
    rows = [{"case": "take 5x2x24", "dtype": "f16", "ok": True}]
    earlier = {"facts": {}, "rows": rows}
    journal = Journal(tmp_path / "stage.json", 100, earlier)
    gpu_kernels.check_all(device, journal, [Case("take", (5, 2, 24))], kinds=("f16", "f32"))
    assert journal.rows[0] == rows[0]
    assert [row["dtype"] for row in journal.rows] == ["f16", "f32"]


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
    few = {"16x32x128x4", "64x64x64x4", "64x64x16x3", "128x128x64x7 2x1 sm_90a"}
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


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("epilogue", gpu_products.EPILOGUES, ids=gpu_products.Epilogue.how)
def test_every_epilogue_is_checked(epilogue, kind, device, monkeypatch):
    few = {"64x64x64x4", "64x64x16x3"}
    chosen = [v for v in cuda_linear.variants(kind) if str(v) in few]
    monkeypatch.setattr(cuda_linear, "variants", lambda _: chosen)
    monkeypatch.setattr(cuda_linear, "default_variant", lambda *_: chosen[0])
    case = Case("linear", (9, 40, 24), epilogue.how())
    rows = list(gpu_products.check_epilogue(device, case, kind, epilogue))
    assert len(rows) == 1
    assert rows[0]["ok"], rows
    launched = {launch.kernel for launch in device.launches if launch.kernel.op == "linear"}
    assert launched <= set(gpu_products.kernels(CAPABILITY))


@pytest.mark.parametrize("forgets", ["", "bias", "residual", "activation", "precision"])
def test_cublaslt_is_checked_with_every_epilogue(forgets, device, monkeypatch):
    def by_cublaslt(key, index, x, w, bias, r, y):
        x, w, bias, r = (None if a is None else a.get().astype(float) for a in (x, w, bias, r))
        bias = None if forgets == "bias" else bias
        r = None if forgets == "residual" else r
        total = reference.linear(x, w, bias, None, r)
        if key.activation and forgets != "activation":
            total = reference.ACTIVATIONS[key.activation](total)
        y[...] = on_device(total.astype(np.float16) if forgets == "precision" else total)

    products = device.products
    monkeypatch.setattr(products, "_by_cublaslt", by_cublaslt)
    monkeypatch.setattr(products, "_count_plans", lambda key, *_: 1)
    monkeypatch.setattr(cuda_linear, "variants", lambda _: [])
    monkeypatch.setattr(cuda_linear, "default_variant", lambda *_: "none")
    wrong = []
    for epilogue in gpu_products.EPILOGUES:
        case = Case("linear", (9, 40, 24), epilogue.how())
        rows = list(gpu_products.check_epilogue(device, case, "f16", epilogue))
        (row,) = [row for row in rows if row["way"] == "cublaslt 0"]
        if not row["ok"]:
            wrong.append(epilogue)
    affected = {
        "": lambda e: False, "bias": lambda e: e.bias, "residual": lambda e: e.residual,
        "activation": lambda e: e.activation, "precision": lambda e: e.result == "f32",
    }  # fmt: skip
    assert wrong == [e for e in gpu_products.EPILOGUES if affected[forgets](e)]


def test_products_are_compiled_as_the_device_compiles(device, journal, monkeypatch, tmp_path):
    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context):
            super().__init__(1)

    used = []
    device._compiler = tmp_path / "libnvrtc.so.12"
    kernels = gpu_products.kernels((9, 0))
    kernels = [next(k for k in kernels if k.arch == arch) for arch in ("", "90a")]
    monkeypatch.setattr(gpu_products, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(gpu_products, "open_kernel_gpu", lambda: device)
    monkeypatch.setattr(gpu_products, "kernels", lambda _: kernels)
    monkeypatch.setattr(nvrtc, "target", lambda capability, library: f"of {library.name}")
    monkeypatch.setattr(nvrtc, "cubin", lambda *arguments: used.append(arguments[1:]))
    gpu_products.compile_stage(journal, tmp_path, tmp_path)
    assert not journal.rows
    arch = "sm_of libnvrtc.so.12"
    assert sorted(used) == sorted([(arch, device._compiler), ("sm_90a", device._compiler)])


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
    def check(encode, inputs):
        return gpu_models.encode_in_threads(encode, inputs, nullcontext, 3)

    assert check(lambda x: x + 1, [np.ones(3), np.zeros(3)])
    calls = iter(range(100))
    assert not check(lambda x: x + next(calls), [np.ones(3)] * 2)

    def fails_in_threads(x):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("no such stream")
        return x

    assert not check(fails_in_threads, [np.ones(3)] * 2)


def test_every_thread_has_a_stream_of_its_own():
    current, seen = threading.local(), set()

    @contextmanager
    def stream():
        current.stream = object()
        yield
        current.stream = None

    def encode(x):
        seen.add((threading.get_ident(), getattr(current, "stream", None)))
        return x

    assert gpu_models.encode_in_threads(encode, [np.ones(1)] * 3, stream, 4)
    mine = [stream for thread, stream in seen if thread != threading.get_ident()]
    assert len(set(mine)) == len(mine) == 3
    assert None not in mine


def test_launches_are_timed_and_threads_compared(golden, device, journal, tmp_path, monkeypatch):
    """The stage itself, with the streams and graphs of the fake CuPy."""
    if "vit" not in golden.path.name:
        pytest.skip("a Vision Transformer is enough")
    seen, run = set(), device.run

    def notes_stream(launch):
        seen.add((threading.get_ident(), device.xp.cuda.get_current_stream()))
        run(launch)

    monkeypatch.setattr(device, "run", notes_stream)
    monkeypatch.setattr(gpu_models, "open_kernel_gpu", lambda: device)
    monkeypatch.setattr(gpu_models, "checkpoint", lambda *_: golden.path)
    monkeypatch.setattr(gpu_models, "device_timer", lambda _: HostTimer())
    monkeypatch.setattr(gpu_models, "LAUNCH_BATCHES", (1,))
    monkeypatch.setattr(cuda_towers, "GRAPH_TOKENS", 40)
    monkeypatch.setattr(gpu_models, "GRAPH_TOKENS", 40)
    monkeypatch.setattr(gpu_models.encode_in_threads, "__defaults__", (2,))
    gpu_models.launch_stage(journal, tmp_path, tmp_path)
    assert set(journal.rows[0]) > {"eager_milliseconds", "graph_milliseconds"}
    words = [f"{what}, {how}" for what in ("image", "text") for how in ("graphs", "no graphs")]
    assert [row["threads"] for row in journal.rows[1:]] == words
    assert all(row["ok"] for row in journal.rows[1:])
    threads = {thread for thread, _ in seen} - {threading.get_ident()}
    of_threads = [stream for thread, stream in seen if thread in threads]
    assert len(of_threads) >= 6  # what is no graph is launched on a stream of the thread
    assert len(set(map(id, of_threads))) == len(of_threads)


def test_events_time_what_is_captured(device, monkeypatch):
    case = next(case for case in gpu_cases.ALL_CASES.tiny if case.op == "layer_norm")
    recorded, event = [], device.xp.cuda.Event

    class Event:
        def __init__(self):
            self.event = event()

        def record(self, stream):
            recorded.append(stream)
            self.event.record(stream)

        def synchronize(self):
            self.event.synchronize()

    def elapsed(*events):
        return device_elapsed(*(e.event for e in events))

    device_elapsed = device.xp.cuda.get_elapsed_time
    monkeypatch.setattr(device.xp.cuda, "Event", Event)
    monkeypatch.setattr(device.xp.cuda, "get_elapsed_time", elapsed)
    row = gpu_kernels.timing(device, case, "f16", RATES, EventTimer(device), 2000)
    assert row["buffers"] > 1
    assert row["microseconds"] > 0
    (stream,) = set(recorded)
    assert stream != device.xp.cuda.get_current_stream()  # but that of the graph
    assert stream is not None


def test_references_are_in_float64(golden, tmp_path):
    if "vit" not in golden.path.name:
        pytest.skip("a Vision Transformer is enough")
    path = tmp_path / golden.path.name
    path.write_bytes(golden.path.read_bytes())
    model = npclip.load(path, device="cpu", dtype="float32")
    images = gpu_models.pixels(model.config, gpu_models.COMPARED).astype(np.float16)
    ids = gpu_models.captions(model.config, gpu_models.COMPARED)
    for what, found in (
        ("image", model.encode_image(images.astype(np.float32))), ("text", model.encode_text(ids)),
    ):  # fmt: skip
        expected = gpu_models.expected_embeddings(path, what)
        assert expected.dtype == np.float64
        relative, _ = gpu_kernels.errors(found, expected)
        assert 0 < relative < 1e-5
        np.testing.assert_array_equal(gpu_models.expected_embeddings(path, what), expected)


def test_compute_sanitizer_that_refuses_is_no_failure(tmp_path):
    def found(code, rows=({"ok": True},)):
        (tmp_path / "tiny.json").write_text(json.dumps({"rows": rows}))
        return gpu_kernels.sanitize([sys.executable, "-c", code], "memcheck", 30, tmp_path)

    summary = "print('========= ERROR SUMMARY: {} errors');"
    right = found(summary.format(0))
    assert right["ok"]
    assert right["cases"] == 1
    wrong = found(summary.format(2) + "exit(99)")
    assert not wrong["ok"]
    assert wrong["result"] == "ERROR SUMMARY: 2 errors"
    refused = found("print('Device not supported'); exit(1)")
    assert refused["ok"]
    assert refused["result"] == "refused, 1: Device not supported"
    nothing = found(summary.format(0), [])
    assert not nothing["ok"]
    assert nothing["result"] == "no kernel ran"
    fails = found(summary.format(0), [{"ok": False, "case": "take 1"}])
    assert not fails["ok"]
    assert "take 1" in fails["result"]


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDA_PATH"])
def test_compute_sanitizer_is_found_in_a_toolkit(place, tmp_path, monkeypatch):
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "compute-sanitizer"
    program.write_text("")
    program.chmod(0o755)
    assert gpu_kernels.find_sanitizer() != str(program)
    monkeypatch.setenv(place, str(folder if place == "PATH" else tmp_path))
    assert gpu_kernels.find_sanitizer() == str(program)
    assert gpu_kernels.toolkit_folders()[-1] == "/usr/local/cuda/bin"


# Peers: that what they compute is the same model


@pytest.mark.parametrize("module", ["transformers", "open_clip", "clip"])
@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.filterwarnings("ignore")
def test_peers_have_the_same_weights(module, what, golden, journal, monkeypatch):
    torch = pytest.importorskip("torch")
    import gpu_peers

    with suppress(ImportError):
        gpu_peers.import_openai_clip()  # open_clip then loads beside this torch, too
    pytest.importorskip(module)

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
    assert row["error_of_npclip"] == 0  # beside itself
    assert 0 < row["error_of_peer"] < 1e-4


def test_what_the_targets_name_is_measured_first():
    import gpu_peers

    peers = {gpu_peers.EAGER, gpu_peers.DEFAULT, gpu_peers.REDUCE}
    for _, function, _, options, *_ in map(astuple, gpu_check.STAGES.values()):
        if function == "peer_stage":
            plan = gpu_peers.plan(*options)
            assert len(set(plan)) == len(plan)
            assert {(peer, b) for peer in peers for b in gpu_models.BATCHES} <= set(plan)
            decisive = gpu_peers.DECISIVE.get(options, ())
            first = plan[: 3 * len(decisive)]
            assert set(first) == {(peer, batch) for peer in peers for batch in decisive}
    mains = [k for k in gpu_peers.DECISIVE if (gpu_peers.MAX, 256) in gpu_peers.plan(*k)]
    assert mains == [("ViT-B/32", "image")]
    assert gpu_peers.ordered([("a", 1), ("a", 8)], ["a", 1]) == [("a", 8), ("a", 1)]
    assert gpu_peers.ordered([("a", 1), ("a", 8)], None) == [("a", 1), ("a", 8)]


def test_peers_are_measured_in_several_runs(golden, device, tmp_path, monkeypatch):
    """The stage itself, with torch on the CPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import gpu_peers

    if "vit" not in golden.path.name:
        pytest.skip("peers are Vision Transformers")
    config = npclip.load(golden.path, device="cpu").config
    path = tmp_path / golden.path.name
    path.write_bytes(golden.path.read_bytes())
    monkeypatch.setattr(gpu_peers, "ARCHITECTURES", {"golden": config})
    monkeypatch.setattr(gpu_peers, "checkpoint", lambda *_: path)
    monkeypatch.setattr(gpu_peers, "missing_for_peers", lambda: None)
    monkeypatch.setattr(gpu_peers, "open_kernel_gpu", lambda: device)
    monkeypatch.setattr(gpu_peers, "device_timer", lambda _: HostTimer())
    monkeypatch.setattr(gpu_peers, "free_memory", lambda _: None)
    monkeypatch.setattr(gpu_peers, "ROUNDS", 1)
    monkeypatch.setattr(torch.nn.Module, "half", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    to_host = gpu_peers.torch_input
    monkeypatch.setattr(
        gpu_peers, "torch_input", lambda c, what, n, _: to_host(c, what, n, "cpu").float()
    )
    cases = [(gpu_peers.EAGER, 2), (gpu_peers.EAGER, 1), ("TensorRT", 2), (gpu_peers.MAX, 2)]
    monkeypatch.setattr(gpu_peers, "plan", lambda *_: cases)
    monkeypatch.setitem(gpu_peers.PREPARATION, gpu_peers.MAX, 1e6)

    def run(earlier=None):
        journal = Journal(tmp_path / "stage.json", 100, earlier)
        gpu_peers.peer_stage(journal, tmp_path, tmp_path, "golden", "image")
        journal.close("done")
        return json.loads(journal.path.read_text())

    first = run()
    assert [row["batch"] for row in first["rows"]] == [2, 1]
    assert all(row["cosine"] > 0.9999 for row in first["rows"]), first
    assert "TensorRT" in first["facts"]["missing"]
    assert first["facts"]["left_out"] == ["torch.compile max-autotune, batch 2"]
    assert first["status"] == "incomplete"
    assert run({**first, "rows": first["rows"][1:]})["rows"][0] == first["rows"][1]
    assert run(first)["rows"] == first["rows"]


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


def run_on_interpreter(launch):
    return ptx.run(launch, launch.kernel.arch or "80")


STAND_INS = {"shim": shim.run, "ptx": run_on_interpreter}


@pytest.mark.skipif(not GOLDENS.exists(), reason="no GPU has written tests/cuda/goldens.npz yet")
@pytest.mark.parametrize("name", gpu_goldens.PROBES)
@pytest.mark.parametrize("stand_in", ["shim", "ptx"])
def test_stand_ins_agree_with_a_gpu(name, stand_in):
    probe, goldens = gpu_goldens.PROBES[name], gpu_goldens.unpack(GOLDENS)
    if name not in goldens or (stand_in == "shim" and not probe.on_shim):
        pytest.skip("not recorded, or not a word of the shim")
    inputs, expected = goldens[name]
    output = gpu_goldens.run_probe(STAND_INS[stand_in], probe, inputs, np.array)
    assert gpu_goldens.is_close(output, expected, probe.tolerance)


@pytest.mark.parametrize("name", gpu_goldens.PROBES)
@pytest.mark.parametrize("major", [12, 13])
def test_probes_compile(name, major):
    libraries = [path for path in nvrtc.libraries() if nvrtc.cuda_version(path)[0] == major]
    if not libraries:
        pytest.skip(f"no NVRTC of CUDA {major}")
    probe = gpu_goldens.PROBES[name]
    for arch in (80, 90, 100) if probe.runs_on((10, 0)) else (90,):
        if probe.runs_on(divmod(arch, 10)):
            target = f"sm_{probe.kernel.arch or arch}"
            program = nvrtc.compile(probe.kernel.source, target, library=libraries[0])
            assert program.usage[probe.kernel.symbol].spill_bytes == 0
    assert probe.kernel.arch == ("90a" if probe.capability == gpu_goldens.HOPPER else "")


def test_wgmma_is_what_it_says():
    """The only probe whose operands are laid out as in shared memory, in float64 here."""
    probe = gpu_goldens.PROBES["wgmma"]
    inputs = probe.inputs(np.random.default_rng(0))
    output = gpu_goldens.run_probe(run_on_interpreter, probe, inputs, np.array)
    tiles = inputs["in"].view(np.float16).reshape(2, 64, 8, 8).astype(np.float64)
    rows = np.arange(64)[:, None]
    a, b = (tile[rows, np.arange(8) ^ rows % 8].reshape(64, 64) for tile in tiles)
    expected = a @ b.T
    thread, i = np.divmod(np.arange(128 * 32), 32)
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = i // 4 * 8 + thread % 4 * 2 + i % 2
    np.testing.assert_allclose(output.ravel(), expected[row, column], rtol=0, atol=1e-4)


def test_a_later_run_adds_the_probes_that_a_file_lacks(device, journal, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_goldens, "open_gpu", lambda: device)
    arrays, _ = gpu_goldens.record(device)
    some = {key: x for key, x in arrays.items() if not key.startswith("exp2_fast/")}
    some["copy_async/out"] = some["copy_async/out"] + np.uint32(1)
    (tmp_path / gpu_goldens.FILE).write_bytes(gpu_goldens.pack(some))
    gpu_goldens.golden_stage(journal, tmp_path, tmp_path)
    ok = {row["probe"]: row["ok"] for row in journal.rows}
    assert {name for name, right in ok.items() if not right} == {"copy_async", "mma_1688_f16"}
    assert journal.facts["added"] == ["exp2_fast"]
    found = gpu_goldens.unpack(tmp_path / gpu_goldens.FILE)
    assert set(found) == {key.partition("/")[0] for key in arrays}
    np.testing.assert_array_equal(found["exp2_fast"][1], arrays["exp2_fast/out"])
    np.testing.assert_array_equal(found["copy_async"][1], some["copy_async/out"])


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


# The targets


def peer_row(batch, peer, ratio, model="ViT-B/32", what="image", **more):
    return {"model": model, "what": what, "batch": batch, "peer": peer, "ratio": ratio, **more}


def statuses(**stages):
    found = {name: {"rows": rows} for name, rows in stages.items()}
    return {(r["case"], r["what"]): r for r in gpu_targets.rows(found)}


def test_targets_are_met_missed_or_not_measured():
    eager, (default, reduce) = gpu_targets.EAGER, gpu_targets.MODES
    model = {"model": "ViT-B/32", "what": "image", "dtype": "float16", "batch": 1}
    rows = [
        peer_row(256, eager, 1.6), peer_row(1024, eager, 1.2), peer_row(64, eager, 1.0),
        peer_row(1, default, 1.3), peer_row(1, reduce, 1.25), peer_row(1, eager, 5.0),
        peer_row(256, default, 1.3),
        peer_row(256, eager, 9.0, what="text"), peer_row(256, eager, 9.0, "ViT-L/14", error="x"),
    ]  # fmt: skip
    found = statuses(
        **{"peers-B/32": rows},
        models=[{**model, "milliseconds": 0.3}, {**model, "cosine": 0.9998, "milliseconds": 1}],
        timings=[{"case": "attention 256x50x12x64", "dtype": "f16", "of_copy": 0.8}],
    )
    large = found["image B/32, batch >= 256", "vs torch eager"]
    assert large["status"] == "missed by 20 %"
    assert large["measured"] == "1.20 (batch 1024, torch eager)"
    compiled = found["image B/32, batch >= 256", "vs best torch.compile"]
    assert compiled["status"] == f"met so far, not measured: {reduce}, batch 256"
    assert found["image B/32, batch 1", "vs torch eager"]["status"] == "met"
    assert found["image B/32, batch 1", "vs best torch.compile"]["status"] == "met"
    assert found["image B/32, batch 1", "ms"]["status"] == "missed by 20 %"
    assert found["attention, T = 50", "of the copy rate"]["status"] == "met"
    assert found["LayerNorm, T = 50", "of the copy rate"]["status"] == "not measured"
    assert found["float16", "cosine to float64"]["status"] == "missed by 0.01 %"
    text = found["text B/32, captions, batch 256", "vs best torch.compile"]["status"]
    assert text == f"not measured: {default}, batch 256, {reduce}, batch 256"
    autotuned = peer_row(1, "torch.compile max-autotune", 1.1)
    found = statuses(**{"peers-B/32": [*rows, autotuned]})
    assert "missed" in found["image B/32, batch 1", "vs best torch.compile"]["status"]


def test_the_error_may_not_be_above_that_of_torch():
    def error(npclip, torch):
        both = (npclip, torch), (1e-4, 1e-3)
        rows = [
            peer_row(1, gpu_targets.EAGER, 1.0, error_of_npclip=a, error_of_peer=b) for a, b in both
        ]
        return statuses(**{"peers-B/32": rows})["float16", "error / torch's own"]["status"]

    assert error(1e-3, 1e-3) == "met"
    assert error(2e-3, 1e-3) == "missed by 1e+02 %"
    assert statuses()["float16", "error / torch's own"]["status"] == "not measured"


def test_nothing_measured_is_nothing_met():
    assert not [row for row in gpu_targets.rows({}) if "met" in row["status"]]
    for case in ("attention 256x50x12x64", "layer_norm 12800x768", "add_layer_norm 12800x768"):
        assert case in map(str, gpu_cases.TIMED)


def test_end_to_end_has_a_line_for_every_batch():
    rows = [peer_row(8, "torch eager", 2.0, npclip_milliseconds=1.0, milliseconds=2.0)]
    model = {"model": "ViT-B/32", "what": "image", "dtype": "float16", "milliseconds": 0.5}
    stages = {"models": {"rows": [{**model, "batch": 1}]}, "peers-B/32": {"rows": rows}}
    lines = gpu_report.end_to_end(stages).splitlines()
    assert lines[2:] == [
        "| ViT-B/32 | image | 1 | 0.500 |  |", "| ViT-B/32 | image | 8 | 1.000 | 2.000 (2.00x) |",
    ]  # fmt: skip
