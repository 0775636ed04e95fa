"""Ray: the rows and the bits of one process alone, whatever happens to the others."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_bulk
from PIL import Image
from test_bulk import PICTURES, assert_equal, contents, failures

import npclip
from npclip import bulk, threads
from npclip.__main__ import main
from npclip.ray import ImageEmbedder, TextEmbedder
from npclip.ray import engine as ray_engine
from npclip.store import Reader

ray = pytest.importorskip("ray")
if sys.platform != "linux":
    pytest.skip("processes are found in /proc", allow_module_level=True)

checkpoint, model, photos = test_bulk.checkpoint, test_bulk.model, test_bulk.photos
pytestmark = [  # Ray's own
    pytest.mark.filterwarnings("ignore:::ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def ids(folder):
    with Reader(folder) as reader:
        return [id for id, _ in reader.rows(range(len(reader)))]


def workers_of(driver):
    """The ids of the processes with a model."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[process.name] = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if (process / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(process.name)
        except OSError:  # it has ended
            continue

    def is_below(pid):
        return pid == str(driver) or (pid in parents and is_below(parents[pid]))

    return [int(pid) for pid in found if is_below(pid)]


def is_running(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # b"" of a zombie
    except OSError:
        return False


def test_the_same_collection_as_by_one_process(cluster, photos, checkpoint, model, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    sources, options = [tmp_path / "bad.jpg", photos], {"dtype": "float32"}
    alone = bulk.embed(sources, tmp_path / "alone", model, **options)
    options |= {"workers": 2, "batch": 16, "device": "cpu"}
    report = ray_engine.embed(sources, tmp_path / "out", checkpoint, **options)
    assert dataclasses.replace(report, seconds=alone.seconds) == alone
    assert (report.embedded, report.failed) == (PICTURES, 1)
    assert ids(tmp_path / "out") == ids(tmp_path / "alone")
    assert_equal(contents(tmp_path / "out"), contents(tmp_path / "alone"))
    assert failures(tmp_path / "out") == failures(tmp_path / "alone")
    with Reader(tmp_path / "out") as reader:
        assert reader.provenance == model.provenance()
    again = ray_engine.embed(photos, tmp_path / "out", checkpoint, **options)
    assert (again.embedded, again.skipped) == (0, PICTURES)


def test_texts_in_parquet(cluster, checkpoint, model, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"picture {i}" for i in range(300)] + ["word " * 200]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    arguments = [tmp_path / "texts.parquet", tmp_path / "out", checkpoint, "text"]
    report = ray_engine.embed(*arguments, batch=64, workers=1, device="cpu", dtype="float32")
    assert (report.embedded, report.failed) == (300, 1)
    wanted = model.encode_text(texts[:300], normalize=True)
    np.testing.assert_array_equal(list(contents(tmp_path / "out").values()), wanted)


def task(checkpoint, model, **changes):
    load = partial(npclip.load, str(checkpoint), "cpu")
    found = ray_engine.Task(load, bulk.Options(), model.provenance(), os.getcwd())
    return dataclasses.replace(found, **changes)


def deadly_items(photos, times, folder):
    """An image a file; the tenth kills its worker as often as that."""

    def read(path):
        for i in range(times):
            flag = folder / str(i)
            if path.name == "00010.jpg" and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return path.read_bytes()

    paths = sorted(photos.iterdir())[:50]
    return [bulk.Item(path.name, str(path), partial(read, path)) for path in paths]


def test_what_a_killed_worker_had_is_done_by_another(cluster, photos, checkpoint, model, tmp_path):
    items = deadly_items(photos, times=2, folder=tmp_path)
    engine = ray_engine.Engine(task(checkpoint, model), 4, workers=2)
    done = list(engine(iter(items)))
    assert len(list(tmp_path.iterdir())) == 2
    found = [item.id for some in done for item in some.items]
    assert found == [item.id for item in items]
    wanted = model.encode_image([item.path for item in items], normalize=True)
    np.testing.assert_array_equal(np.concatenate([some.embeddings for some in done]), wanted)


def test_what_kills_every_worker_ends_the_run(cluster, photos, checkpoint, model, tmp_path):
    items = deadly_items(photos, times=100, folder=tmp_path)
    engine = ray_engine.Engine(task(checkpoint, model), 4, workers=1)
    with pytest.raises(npclip.BackendError, match=r"3 workers died.*00008\.jpg"):
        list(engine(iter(items)))
    assert len(list(tmp_path.iterdir())) == 3


def test_all_workers_killed_from_outside(cluster, photos, checkpoint, model, tmp_path):
    killed = []

    def kill(report):
        if report.embedded >= 100 and not killed:
            killed.extend(workers_of(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    options = {"workers": 2, "batch": 8, "device": "cpu", "dtype": "float32"}
    ray_engine.embed(photos, tmp_path / "out", checkpoint, on_progress=kill, **options)
    assert killed
    bulk.embed(photos, tmp_path / "alone", model, dtype="float32")
    assert ids(tmp_path / "out") == ids(tmp_path / "alone")
    assert_equal(contents(tmp_path / "out"), contents(tmp_path / "alone"))


def test_workers_without_the_drivers_model(cluster, photos, checkpoint, model, tmp_path):
    items = deadly_items(photos, times=0, folder=tmp_path)[:1]
    other = dataclasses.replace(model.provenance(), weights_sha256="0" * 64)
    with pytest.raises(npclip.ProvenanceError, match=r"worker on .*SHA-256"):
        list(ray_engine.Engine(task(checkpoint, model, provenance=other), 4)(iter(items)))
    missing = task(checkpoint, model, load=partial(npclip.load, "/nowhere.pt"))
    with pytest.raises(npclip.ModelNotFoundError, match=r"nowhere.*same path or name"):
        list(ray_engine.Engine(missing, 4)(iter(items)))


def test_one_cluster_at_a_time(cluster, checkpoint, model):
    engine = ray_engine.Engine(task(checkpoint, model), 4, address="auto")
    with pytest.raises(npclip.InputError, match="already"):
        next(engine(iter([bulk.Item("a", "a", bytes)])))


def start(photos, folder, checkpoint, *more):
    """npclip embed, in a session of its own, once it has written something."""
    command = [sys.executable, "-m", "npclip", "embed", photos, "-o", folder / "out", "--batch"]
    command += ["4", "--device", "cpu", "--engine", "ray", "--workers", "2", "--model", checkpoint]
    run = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, start_new_session=True)
    while not any(path.stat().st_size for path in folder.glob("out/*.journal")):
        assert run.poll() is None
        time.sleep(0.005)
    return run


def test_a_machine_of_a_cluster_is_lost(photos, checkpoint, model, tmp_path):
    from ray.cluster_utils import Cluster

    one = {"num_cpus": 1, "include_dashboard": False}
    machines = Cluster(initialize_head=True, head_node_args=one)
    try:
        other = machines.add_node(num_cpus=1)
        machines.wait_for_nodes()
        run = start(photos, tmp_path, checkpoint, "--address", machines.address)
        machines.remove_node(other, allow_graceful=False)
        _, error = run.communicate(timeout=60)
        assert run.returncode == 0, error
    finally:
        machines.shutdown()
    bulk.embed(photos, tmp_path / "alone", model)
    assert ids(tmp_path / "out") == ids(tmp_path / "alone")
    assert_equal(contents(tmp_path / "out"), contents(tmp_path / "alone"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_was_ended_is_resumed(cluster, photos, checkpoint, model, tmp_path, end):
    run = start(photos, tmp_path, checkpoint)
    workers = workers_of(run.pid)
    if end == signal.SIGINT:
        os.killpg(run.pid, end)  # as the terminal does
    else:
        run.send_signal(end)
    _, error = run.communicate(timeout=60)
    if end == signal.SIGINT:
        assert run.returncode == 130
        assert error.endswith(b"npclip: interrupted\n") and b"Traceback" not in error
    assert workers
    for _ in range(600):
        if not any(is_running(pid) for pid in workers):
            break
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)
    report = ray_engine.embed(photos, tmp_path / "out", checkpoint, workers=2, device="cpu")
    assert report.skipped and report.embedded + report.skipped == PICTURES
    wanted = bulk.embed(photos, tmp_path / "alone", model)
    assert wanted.embedded == PICTURES
    assert ids(tmp_path / "out") == ids(tmp_path / "alone")
    assert_equal(contents(tmp_path / "out"), contents(tmp_path / "alone"))


def by_path(dataset, embedder, checkpoint, **arguments):
    """path -> row, of a pipeline."""
    arguments = {"model": str(checkpoint), **arguments}
    mapped = dataset.map_batches(
        embedder, fn_constructor_kwargs=arguments, batch_size=8, num_cpus=1, concurrency=1
    )
    return {row["path"]: row for row in mapped.take_all()}


def test_images_in_a_pipeline(cluster, checkpoint, model, pictures, tmp_path):
    paths = [str(pictures / name) for name in ("chelsea.png", "rocket.jpg")]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    files = [*paths, str(tmp_path / "bad.jpg")]
    wanted = dict(zip(paths, model.encode_image(paths, normalize=True), strict=True))

    encoded = ray.data.read_binary_files(files, include_paths=True)
    found = by_path(encoded, ImageEmbedder, checkpoint, on_error="null")
    assert found.keys() == set(files)
    for path, embedding in wanted.items():
        assert found[path]["embedding"].dtype == np.float32
        np.testing.assert_array_equal(found[path]["embedding"], embedding)
        assert found[path]["error"] == ""
    assert np.isnan(found[files[-1]]["embedding"]).all()
    assert "image" in found[files[-1]]["error"]

    decoded = ray.data.read_images(paths[:2], mode="RGB", include_paths=True)
    found = by_path(decoded, ImageEmbedder, checkpoint)
    np.testing.assert_array_equal(found[paths[1]]["embedding"], wanted[paths[1]])


def test_texts_in_a_pipeline_from_and_to_parquet(cluster, checkpoint, model, tmp_path):
    texts = [f"picture {i}" for i in range(20)]
    items = [{"path": str(i), "text": text} for i, text in enumerate(texts)]
    ray.data.from_items(items).write_parquet(str(tmp_path / "in"))
    dataset = ray.data.read_parquet(str(tmp_path / "in"))
    found = by_path(dataset, TextEmbedder, checkpoint, normalize=False, output="features")
    wanted = model.encode_text(texts)
    for i in range(20):
        np.testing.assert_array_equal(found[str(i)]["features"], wanted[i])


def test_an_actor_uses_its_own_cpus(cluster, checkpoint):
    class Probe(ImageEmbedder):
        def __call__(self, batch=None):
            return threads.get_num_threads(), self._model.device

    for cpus in (1, 2):
        actor = ray.remote(Probe).options(num_cpus=cpus).remote(str(checkpoint))
        assert ray.get(actor.__call__.remote()) == (cpus, "cpu")
        ray.kill(actor)


def column(*values):
    found = np.empty(len(values), object)
    found[:] = values
    return found


def test_what_an_image_may_be(checkpoint, model, pictures):
    path = pictures / "rocket.jpg"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    values = [path.read_bytes(), str(path), pixels, {"bytes": path.read_bytes(), "path": None}]
    embedder = ImageEmbedder(checkpoint, device="cpu", column="x", on_error="null")
    found = embedder({"x": column(*values, None, b"", np.zeros(3))})
    wanted = model.encode_image(path, normalize=True)
    for i in range(4):
        np.testing.assert_array_equal(found["embedding"][i], wanted)
        assert found["error"][i] == ""
    assert np.isnan(found["embedding"][4:]).all()
    assert all(found["error"][4:])
    stacked = embedder({"x": np.stack([pixels, pixels])})
    np.testing.assert_array_equal(stacked["embedding"], [wanted, wanted])
    assert embedder({"x": column()})["embedding"].shape == (0, 16)


def test_what_is_wrong_raises(checkpoint):
    embedder = ImageEmbedder(checkpoint, device="cpu")
    with pytest.raises(npclip.ImageError, match=r"row 0 of a batch, a\.jpg"):
        embedder({"bytes": column(b"no"), "path": column("a.jpg")})
    with pytest.raises(npclip.InputError, match="no column image, bytes, path among other"):
        embedder({"other": column(b"")})
    with pytest.raises(npclip.InputError, match="on_error"):
        ImageEmbedder(checkpoint, device="cpu", on_error="ignore")
    texts = {"text": column("word " * 200, "a cat")}
    with pytest.raises(npclip.InputError, match="77"):
        TextEmbedder(checkpoint, device="cpu")(texts)
    found = TextEmbedder(checkpoint, device="cpu", truncate=True)(texts)
    assert np.isfinite(found["embedding"]).all()


@pytest.mark.parametrize(
    "nodes, workers, cpus, on_gpu, wanted",
    [
        ([{"CPU": 2}], None, None, False, (1, 2)),
        ([{"CPU": 2}], 2, None, False, (2, 1)),
        ([{"CPU": 2}], 3, None, False, (3, 1)),
        ([{"CPU": 16}, {"CPU": 64}, {"memory": 1}], None, None, False, (20, 4)),
        ([{"CPU": 16}, {"CPU": 64}], None, 16, False, (5, 16)),
        ([{"CPU": 16}, {"CPU": 64}], 2, None, False, (2, 16)),
        ([{"CPU": 64}, {"CPU": 32, "GPU": 4}], None, None, True, (4, 8)),
        ([], None, None, False, (1, 1)),
    ],
)
def test_workers_and_their_cpus(nodes, workers, cpus, on_gpu, wanted):
    assert ray_engine.share_out(nodes, workers, cpus, on_gpu) == wanted


def test_without_ray(photos, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["embed", str(photos), "-o", str(tmp_path / "out"), "--model", str(checkpoint)]
    assert main([*arguments, "--engine", "ray"]) == 1
    assert 'pip install "npclip[ray]"' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--address", "auto"])
    assert "--engine ray" in capsys.readouterr().err


def test_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()

    def embed(sources, out, model, kind, **options):
        print("Ray: a worker died")
        assert (sources, out, model, kind) == (["in"], "out", "model.pt", "text")
        assert options["workers"] == 3 and options["cpus_per_worker"] == 2
        assert options["model_dtype"] == "bfloat16" and options["dtype"] == "float16"
        return bulk.Report(embedded=5, seconds=1.0)

    monkeypatch.setattr(ray_engine, "embed", embed)
    arguments = "embed in -o out --model model.pt --text --engine ray --workers 3 --dtype bfloat16"
    assert main([*arguments.split(), "--cpus-per-worker", "2"]) == 0
    printed, error = capsys.readouterr()
    assert printed == "out: 5 embedded in 1.0 s, 5.0 a second\n"
    assert error == "Ray: a worker died\n"


def test_wrong_arguments_leave_nothing_behind(photos, checkpoint, tmp_path):
    for wrong in {"workers": 0}, {"cpus_per_worker": 0}, {"device": "cuda:1"}, {"kind": "video"}:
        with pytest.raises(npclip.InputError):
            ray_engine.embed(photos, tmp_path / "out", checkpoint, **wrong)
    with pytest.raises(npclip.InputError, match="nowhere"):
        ray_engine.embed(tmp_path / "nowhere", tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists()
