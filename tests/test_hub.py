"""Downloads by name, against a local server that misbehaves in every way that networks do."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import npclip
from npclip import hub
from npclip.errors import DownloadError, ModelNotFoundError

DATA = random.Random(7).randbytes(1_000_003)
WRONG = DATA[:-1] + bytes([DATA[-1] ^ 1])
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = hub.RemoteFile("test.pt", SHA256, 1)
SCRIPT = f"""
from npclip import hub
hub.MODELS["test"] = hub.RemoteFile("test.pt", "{SHA256}", 1)
hub.CHUNK = 1 << 14
print(hub.resolve("test"))
"""


class Server(ThreadingHTTPServer):
    """Takes one behaviour per request from script, then `default`; serves DATA."""

    daemon_threads = False  # so that server_close() waits for the handlers

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Behaviour] = []
        self.default: Behaviour = ranged
        self.ranges: list[str | None] = []  # the Range header of each request
        self.paths: list[str] = []
        self.sent = 0  # bytes of bodies
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.ranges.append(self.headers["Range"])
            server.paths.append(self.path)
            behaviour = server.script.pop(0) if server.script else server.default
        try:
            behaviour(self)
        except ConnectionError:
            self.close_connection = True

    def start(self, data: bytes, honour_range: bool = True) -> bytes:
        """Send the head of a right answer; what its body should be."""
        start = 0
        if honour_range and (asked := self.headers["Range"]):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.status(416)
                return b""
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        return data[start:]

    def body(self, data: bytes) -> None:
        self.wfile.write(data)
        with self.server.lock:
            self.server.sent += len(data)

    def status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


Behaviour = Callable[[Handler], None]


def ranged(handler: Handler) -> None:
    handler.body(handler.start(DATA))


def whole(handler: Handler) -> None:
    handler.body(handler.start(DATA, honour_range=False))


def wrong(handler: Handler) -> None:
    handler.body(handler.start(WRONG))


def slow(handler: Handler) -> None:
    body = handler.start(DATA)
    for at in range(0, len(body), 1 << 14):
        handler.body(body[at : at + (1 << 14)])
        if handler.server.stopping.wait(0.1):
            return


def cut(size: int) -> Behaviour:
    return lambda handler: handler.body(handler.start(DATA)[:size])


def stall(size: int) -> Behaviour:
    def behaviour(handler: Handler) -> None:
        handler.body(handler.start(DATA)[:size])
        handler.server.stopping.wait(20)

    return behaviour


def status(code: int) -> Behaviour:
    return lambda handler: handler.status(code)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        for name in ("NPCLIP_CACHE", "NPCLIP_OFFLINE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.setenv("NPCLIP_MIRROR", server.url)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setitem(hub.MODELS, "test", FILE)
        monkeypatch.setattr(hub, "BACKOFF", 0.01)
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def target(server: Server, tmp_path: Path) -> Path:
    """Where the file belongs; its directory exists."""
    path = tmp_path / ".cache" / "npclip" / "test.pt"
    path.parent.mkdir(parents=True)
    return path


def part_of(path: Path) -> Path:
    return path.with_name("test.pt.part")


def assert_resolves(target: Path) -> None:
    assert hub.resolve("test") == target
    assert target.read_bytes() == DATA
    assert not part_of(target).exists()


def start_process() -> subprocess.Popen[str]:
    root = str(Path(npclip.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_downloads_to_the_cache_and_only_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / ".cache" / "npclip" / "test.pt"
    assert_resolves(target)
    assert_resolves(target)
    assert server.paths == [f"/{SHA256}/test.pt"]
    assert server.ranges == [None]
    assert server.sent == len(DATA)


def test_cache_directories(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.resolve("test") == tmp_path / "xdg" / "npclip" / "test.pt"
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "env"))
    assert hub.resolve("test") == tmp_path / "env" / "test.pt"
    assert hub.resolve("test", tmp_path / "root") == tmp_path / "root" / "test.pt"


def test_resumes_what_an_earlier_attempt_left(server: Server, target: Path) -> None:
    part_of(target).write_bytes(DATA[:400_000])
    assert_resolves(target)
    assert server.ranges == ["bytes=400000-"]
    assert server.sent == len(DATA) - 400_000


def test_starts_again_where_the_server_refuses_ranges(server: Server, target: Path) -> None:
    server.default = whole
    part_of(target).write_bytes(DATA[:400_000])
    assert_resolves(target)
    assert server.ranges == ["bytes=400000-"]
    assert server.sent == len(DATA)


def test_cut_connections_cost_no_byte_twice(server: Server, target: Path) -> None:
    server.script = [cut(100_000)] * (hub.RETRIES + 3)  # more than RETRIES: each brings something
    assert_resolves(target)
    assert server.ranges == [None] + [f"bytes={n}00000-" for n in range(1, hub.RETRIES + 4)]
    assert server.sent == len(DATA)


def test_gives_up_when_connections_bring_nothing(server: Server, target: Path) -> None:
    server.default = cut(0)
    with pytest.raises(DownloadError, match="cut"):
        hub.resolve("test")
    assert len(server.ranges) == hub.RETRIES
    assert not target.exists()


def test_wrong_bytes_are_fetched_again(server: Server, target: Path) -> None:
    server.script = [wrong]
    assert_resolves(target)
    assert server.ranges == [None, None]


def test_a_part_of_another_file_is_thrown_away(server: Server, target: Path) -> None:
    part_of(target).write_bytes(bytes(1000))
    assert_resolves(target)
    assert server.ranges == ["bytes=1000-", None]


def test_always_wrong_bytes_are_an_error(server: Server, target: Path) -> None:
    server.default = wrong
    with pytest.raises(DownloadError) as caught:
        hub.resolve("test")
    assert SHA256 in str(caught.value)
    assert hashlib.sha256(WRONG).hexdigest() in str(caught.value)
    assert server.ranges == [None, None]
    assert not target.exists()
    assert not part_of(target).exists()


@pytest.mark.parametrize("size", [0, 50_000, 600_000])
def test_a_stalled_connection_is_replaced(server: Server, target: Path, size: int) -> None:
    server.script = [stall(size)]
    assert_resolves(target)
    assert len(server.ranges) == 2


def test_a_stalled_connection_keeps_what_it_brought(server: Server, target: Path) -> None:
    server.script = [stall(50_000), stall(250_000)]
    assert_resolves(target)
    assert server.ranges == [None, "bytes=50000-", "bytes=300000-"]
    assert server.sent == len(DATA)


def test_not_found_is_one_error_that_says_what_to_do(server: Server, target: Path) -> None:
    server.default = status(404)
    with pytest.raises(DownloadError) as caught:
        hub.resolve("test")
    for words in ("404", "test.pt", SHA256, str(target), FILE.url, "NPCLIP_MIRROR"):
        assert words in str(caught.value)
    assert len(server.ranges) == 1
    assert not target.exists()


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_passing_error_is_tried_again(server: Server, target: Path, code: int) -> None:
    server.script = [status(code)] * (hub.RETRIES - 1)
    assert_resolves(target)
    assert len(server.ranges) == hub.RETRIES


def test_a_lasting_server_error_is_an_error(server: Server, target: Path) -> None:
    server.default = status(500)
    with pytest.raises(DownloadError, match="HTTP 500"):
        hub.resolve("test")
    assert len(server.ranges) == hub.RETRIES


def test_nothing_beyond_a_whole_part(server: Server, target: Path) -> None:
    part_of(target).write_bytes(DATA)
    assert_resolves(target)
    assert server.ranges == [f"bytes={len(DATA)}-"]
    assert server.sent == 0


def test_a_part_longer_than_the_file(server: Server, target: Path) -> None:
    part_of(target).write_bytes(DATA + b"more")
    assert_resolves(target)
    assert server.ranges == [f"bytes={len(DATA) + 4}-", None]


def test_no_server(target: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    monkeypatch.setenv("NPCLIP_MIRROR", f"http://127.0.0.1:{port}")
    with pytest.raises(DownloadError, match="NPCLIP_MIRROR"):
        hub.resolve("test")


def test_offline(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPCLIP_OFFLINE", "1")
    with pytest.raises(DownloadError, match="NPCLIP_OFFLINE") as caught:
        hub.resolve("test")
    assert SHA256 in str(caught.value)
    target.write_bytes(WRONG)
    with pytest.raises(DownloadError, match=hashlib.sha256(WRONG).hexdigest()):
        hub.resolve("test")
    assert target.read_bytes() == WRONG
    target.write_bytes(DATA)  # put there by hand
    assert_resolves(target)
    assert server.ranges == []


def test_processes_share_one_download(server: Server, target: Path) -> None:
    processes = [start_process() for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == str(target)
    assert target.read_bytes() == DATA
    assert server.sent == len(DATA)
    assert len(server.ranges) == 1


def test_a_killed_download_is_resumed(server: Server, target: Path) -> None:
    server.script = [slow]
    part = part_of(target)
    with start_process() as process:
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    size = part.stat().st_size
    assert 0 < size < len(DATA)
    assert not target.exists()
    assert_resolves(target)
    assert server.ranges == [None, f"bytes={size}-"]


def test_openai_clips_cache_is_used(server: Server, target: Path) -> None:
    shared = target.parents[1] / "clip" / "test.pt"
    shared.parent.mkdir()
    shared.write_bytes(DATA)
    assert hub.resolve("test") == shared
    assert server.ranges == []
    assert list(shared.parent.iterdir()) == [shared]  # read only
    shared.write_bytes(WRONG)
    assert_resolves(target)
    assert shared.read_bytes() == WRONG


def test_a_file_that_changed_is_moved_away(server: Server, target: Path) -> None:
    assert_resolves(target)
    target.write_bytes(WRONG)
    os.utime(target, (1, 1))
    assert_resolves(target)
    assert target.with_name("test.pt.wrong").read_bytes() == WRONG
    assert len(server.ranges) == 2


def test_a_touched_file_is_hashed_and_kept(server: Server, target: Path) -> None:
    assert_resolves(target)
    os.utime(target, (1, 1))
    assert_resolves(target)
    assert len(server.ranges) == 1


def test_a_right_file_in_a_read_only_cache(server: Server, target: Path) -> None:
    """Neither lock nor record can be written: directories are in their places."""
    for suffix in ("lock", "verified"):
        target.with_name(f"test.pt.{suffix}").mkdir()
    with pytest.raises(DownloadError):
        hub.resolve("test")
    target.write_bytes(WRONG)
    with pytest.raises(DownloadError):
        hub.resolve("test")
    target.write_bytes(DATA)
    assert_resolves(target)
    assert server.ranges == []


def test_the_record_is_only_to_save_time(server: Server, target: Path) -> None:
    record = target.with_name("test.pt.verified")
    record.mkdir()
    assert_resolves(target)
    record.rmdir()
    record.write_bytes(b"\xff\xfe")
    assert_resolves(target)
    assert len(server.ranges) == 1
    assert SHA256 in record.read_text()


@pytest.mark.parametrize(
    "mirror",
    [
        "foo/bar",
        "http://[bad",
        "http://a..com/",
        "http://127.0.0.1:1/é",
        "http://x:y/",
        "http://x/ ",
    ],
)
def test_a_mirror_that_is_no_url(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, mirror: str
) -> None:
    monkeypatch.setenv("NPCLIP_MIRROR", mirror)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(DownloadError, match=r"invalid URL.*NPCLIP_MIRROR"):
        hub.resolve("test")


@pytest.mark.skipif(os.name == "nt", reason="POSIX accounts")
def test_no_home_directory(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(DownloadError, match="NPCLIP_CACHE"):
        hub.resolve("test")
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    assert hub.resolve("test") == tmp_path / "cache" / "test.pt"


def test_a_cache_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    for root in (blocked, blocked / "below"):
        with pytest.raises(DownloadError, match="NPCLIP_CACHE"):
            hub.resolve("test", root)
    assert server.ranges == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [("vit-b-32", "ViT-B/32"), ("rn50X4.pt", "RN50x4"), ("ViT-L-14-336", "ViT-L/14@336px")],
)
def test_unknown_names(name: str, meant: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(name)
    assert f"did you mean {meant!r}?" in str(caught.value)


@pytest.mark.parametrize("name", ["", "nothing like it"])
def test_names_without_a_suggestion(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="names: RN50, ") as caught:
        hub.resolve(name)
    assert "did you mean" not in str(caught.value)


def test_paths_that_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.resolve("a" * 5000)

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(ModelNotFoundError, match="Permission denied"):
        hub.resolve(tmp_path / "mine.pt")


def test_paths_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"")
    assert hub.resolve(path) == path
    assert hub.resolve(str(path)) == path
