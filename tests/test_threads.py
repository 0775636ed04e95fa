"""The number of threads, and one pool shared by Python threads, forked children and workers."""

import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import npclip
from npclip import cpu_library, threads
from npclip.errors import InputError


@pytest.fixture
def as_before():
    before = threads._chosen
    yield
    threads._chosen = before
    for listener in threads._listeners:
        listener(threads.get_num_threads())


@pytest.mark.parametrize("n", [0, -1, 1.0, "2", None, True])
def test_a_number_of_threads_that_is_none_is_an_error(n, as_before):
    with pytest.raises(InputError, match="number of threads"):
        npclip.set_num_threads(n)


def test_set_num_threads(as_before):
    npclip.set_num_threads(3)
    assert npclip.get_num_threads() == 3
    if not cpu_library.why_unavailable():
        assert cpu_library.library().npclip_num_threads() == 3


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5"])
def test_a_bad_environment_variable_is_an_error(text, monkeypatch):
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setenv("NPCLIP_NUM_THREADS", text)
    with pytest.raises(InputError, match="NPCLIP_NUM_THREADS"):
        threads.get_num_threads()


def test_the_environment_variable(monkeypatch):
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setenv("NPCLIP_NUM_THREADS", "5")
    assert threads.get_num_threads() == 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_mask_is_heeded():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ.pop("NPCLIP_NUM_THREADS", None)
        import npclip
        print(npclip.get_num_threads())
    """
    assert run(code).split() == ["1"]


def test_quotas_of_cgroup_v2_and_v1(tmp_path):
    membership = tmp_path / "cgroup"
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "pod" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    membership.write_text("0::/pod/box\n")
    assert threads.cgroup_quotas(tmp_path, membership) == [1.5]
    (tmp_path / "cpu" / "job").mkdir(parents=True)
    for folder, quota in ((tmp_path / "cpu" / "job", "250000"), (tmp_path / "cpu", "-1")):
        (folder / "cpu.cfs_quota_us").write_text(quota)
        (folder / "cpu.cfs_period_us").write_text("100000")
    membership.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    assert threads.cgroup_quotas(tmp_path, membership) == [2.5]
    assert threads.cgroup_quotas(tmp_path, tmp_path / "missing") == []


def test_several_python_threads_encode_at_once(golden):
    resolution = golden.model.visual.input_resolution
    images = np.random.default_rng(0).standard_normal((9, 3, resolution, resolution))
    expected = golden.model.encode_image(images)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: golden.model.encode_image(images), range(64)))
    for result in results:
        np.testing.assert_array_equal(result, expected)


PROLOGUE = """
    import os, sys, warnings
    import numpy as np
    import npclip
    warnings.simplefilter("ignore")  # newer Pythons warn of fork in a process with threads
    npclip.set_num_threads(2)
    model = npclip.load(sys.argv[1])
    shape = (9, 3, model.visual.input_resolution, model.visual.input_resolution)
    images = np.random.default_rng(0).standard_normal(shape)
    expected = model.encode_image(images)
    def check(_=None):
        return bool((model.encode_image(images) == expected).all())
    assert check()
"""


def run(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork_the_child_and_the_parent_encode(golden):
    code = """
        for _ in range(5):
            child = os.fork()
            if not child:
                os._exit(0 if check() and check() else 1)
            assert check()
            assert os.waitpid(child, 0)[1] == 0
        print("done")
    """
    assert "done" in run(textwrap.dedent(PROLOGUE) + textwrap.dedent(code), golden.path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(
    cpu_library.why_unavailable() is not None,
    reason="OpenBLAS hangs in a child forked while it computes",
)
def test_fork_while_other_threads_encode(golden):
    code = """
        import threading
        stop = threading.Event()
        def encode():
            while not stop.is_set():
                assert check()
        others = [threading.Thread(target=encode) for _ in range(3)]
        for thread in others: thread.start()
        for _ in range(10):
            child = os.fork()
            if not child:
                os._exit(0 if check() else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in others: thread.join()
        print("done")
    """
    assert "done" in run(textwrap.dedent(PROLOGUE) + textwrap.dedent(code), golden.path)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_workers(golden, tmp_path, method):
    script = tmp_path / "script.py"
    main = """
        if __name__ == "__main__":
            import multiprocessing
            with multiprocessing.get_context(sys.argv[2]).Pool(3) as pool:
                assert all(pool.map(check, range(12)))
            print("done")
    """
    script.write_text(textwrap.dedent(PROLOGUE) + textwrap.dedent(main))
    command = [sys.executable, str(script), str(golden.path), method]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "done" in result.stdout, result.stderr


def test_gunicorn_workers_forked_from_a_process_that_has_encoded(golden, tmp_path):
    pytest.importorskip("gunicorn")
    app = """
        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{os.getpid()} {check()}".encode()]
    """
    text = textwrap.dedent(PROLOGUE).replace("sys.argv[1]", repr(str(golden.path)))
    (tmp_path / "service.py").write_text(text + textwrap.dedent(app))
    socket = tmp_path / "port"
    config = tmp_path / "gunicorn_config.py"
    config.write_text(
        "def when_ready(server):\n"
        f"    open({str(socket)!r}, 'w').write(str(server.LISTENERS[0].sock.getsockname()[1]))\n"
    )
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--threads", "2"]
    command += ["--bind", "127.0.0.1:0", "--config", str(config), "service:app"]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 60
        while not socket.exists() or not socket.read_text():
            assert server.poll() is None, server.stderr.read().decode()
            assert time.monotonic() < end, "gunicorn did not start"
            time.sleep(0.05)
        url = f"http://127.0.0.1:{socket.read_text()}/"
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda _: urllib.request.urlopen(url, timeout=60).read(), range(30))
            )
    finally:
        server.terminate()
        server.wait(30)
        server.stderr.close()
    assert {answer.split()[1] for answer in answers} == {b"True"}
