"""The endpoint, served by uvicorn and asked by OpenAI's own client; hostile requests, too."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npclip

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = 1 << 20  # MAX_BYTES of the server under test
START = (  # the program as it is, with limits that a test can reach
    "import sys, uvicorn, fastapi_embeddings as server\n"
    f"server.MAX_BYTES, server.MAX_PIXELS, server.MAX_SECONDS = {TINY}, 1_000_000, 2\n"
    "uvicorn.run(server.app, port=int(sys.argv[1]), log_level='warning')\n"
)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"NPCLIP_MODEL": model, "NPCLIP_DEVICE": "cpu"}
    command = [sys.executable, "-c", START, str(port)]
    with open(log, "wb") as stderr:
        server = subprocess.Popen(command, env=environment, cwd=EXAMPLES, stderr=stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.1)
        yield url
        assert server.poll() is None, "it died"
    finally:
        server.terminate()
        assert server.wait(20) in (0, -15)  # it ends as it should
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def embedder(model):
    return npclip.Embedder(model, device="cpu")


def uri(picture, format="PNG"):
    stream = io.BytesIO()
    picture.save(stream, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def ask(url, model, text="a cat", **more):
    body = {"model": model, "input": text} | more
    return httpx.post(f"{url}/embeddings", json=body, timeout=60)


def test_openais_client(url, model, embedder, picture):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        inputs = ["a cat", uri(picture), "a dog", uri(picture, "JPEG")]
        found = client.embeddings.create(model=model, input=inputs)  # base64 on the wire
        assert [each.index for each in found.data] == [0, 1, 2, 3]
        rows = np.array([each.embedding for each in found.data], np.float32)
        np.testing.assert_array_equal(rows[[0, 2]], embedder.embed_texts(["a cat", "a dog"]))
        np.testing.assert_array_equal(rows[1], embedder.embed_images(picture))
        assert (found.object, found.model, found.usage.prompt_tokens) == ("list", model, 8)
        size = embedder.dimension
        one = client.embeddings.create(
            model=model, input="a cat", encoding_format="float", dimensions=size
        )
        np.testing.assert_array_equal(np.float32(one.data[0].embedding), rows[0])
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.embeddings.create(model="other", input="a cat")
        with pytest.raises(openai.UnprocessableEntityError, match="dimensions"):
            client.embeddings.create(model=model, input="a cat", dimensions=size - 1)


def test_fifty_at_a_time(url, model, embedder, picture):
    texts = [f"a photo of {i} cats" for i in range(50)]

    async def all_of_them():
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            bodies = [{"model": model, "input": [text, uri(picture)]} for text in texts]
            return await asyncio.gather(
                *(client.post(f"{url}/embeddings", json=body) for body in bodies)
            )

    answers = asyncio.run(all_of_them())
    assert {answer.status_code for answer in answers} == {200}
    rows = np.array([[x["embedding"] for x in a.json()["data"]] for a in answers], np.float32)
    np.testing.assert_array_equal(rows[:, 0], embedder.embed_texts(texts))
    np.testing.assert_array_equal(rows[:, 1], np.tile(embedder.embed_images(picture), (50, 1)))


def test_more_than_it_takes(url, model):
    async def flood():
        async with httpx.AsyncClient(
            timeout=60, limits=httpx.Limits(max_connections=150)
        ) as client:
            body = {"model": model, "input": ["a cat"] * 100}
            return await asyncio.gather(
                *(client.post(f"{url}/embeddings", json=body) for _ in range(150))
            )

    answers = asyncio.run(flood())
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/health").json()["requests"] == 0


def hostile(picture):
    """(name, body as bytes, expected status, part of the message)."""
    bomb = Image.new("1", (5000, 5000))
    torn = uri(picture)[:-60]
    cases = {
        "bomb": ([uri(bomb)], 422, "pixels"),
        "torn": ([torn[: len(torn) // 4 * 4]], 422, "input 0"),
        "no base64": (["data:image/png;base64,!!!!"], 422, "not base64"),
        "no image": (["data:text/plain;base64," + base64.b64encode(b"x" * 99).decode()], 422, "JP"),
        "eps": (["data:;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF").decode()], 422, "JPEG"),
        "empty uri": (["data:"], 422, "input 0"),
        "too long": (["word " * 200], 422, "tokens"),
        "far too long": (["\r\n" * 200_000], 422, "characters"),
        "too many": (["a"] * 129, 422, "129 inputs"),
        "none": ([], 422, "input"),
        "empty": ("", 422, "input"),
        "tokens": ([[1, 2, 3]], 422, "input"),
        "null": (None, 422, "input"),
        "nested": ([[["a"]]], 422, "input"),
    }
    found = [
        (name, json.dumps({"model": "MODEL", "input": value}).encode(), *rest)
        for name, (value, *rest) in cases.items()
    ]
    return [
        *found,
        ("no json", b"{", 422, "JSON"),
        ("binary", bytes(range(256)), 422, "JSON"),
        ("array", b"[1]", 422, "Input"),
        ("deep", b"[" * 100_000, 422, "JSON"),
        ("surrogate", b'{"model": "MODEL", "input": "\\ud800"}', 422, "JSON"),
        ("huge number", b'{"model": "MODEL", "input": 1' + b"0" * 9999 + b"}", 422, "number"),
        ("format", b'{"model": "MODEL", "input": "a", "encoding_format": "x"}', 422, "encoding"),
        ("no body", b"", 422, "JSON"),
        ("other model", b'{"model": "x", "input": "a"}', 404, "no model"),
    ]


def test_hostile_requests(url, model, picture):
    with httpx.Client(timeout=60) as client:
        for name, body, status, message in hostile(picture):
            body = body.replace(b'"MODEL"', json.dumps(model).encode())
            answer = client.post(f"{url}/v1/embeddings", content=body)
            assert answer.status_code == status, (name, answer.text)
            error = answer.json()["error"]
            assert message in error["message"], (name, error)
            assert error["type"] == "invalid_request_error"
        for length in ("-1", "x", "9" * 30):
            request = f"POST /embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
            assert _raw(url, request.encode())[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")
        assert client.get(f"{url}/nowhere").json()["error"]["message"] == "Not Found"
        assert client.get(f"{url}/embeddings").status_code == 405
    assert ask(url, model).status_code == 200


def test_long_bodies_and_slow_ones(url, model):
    with httpx.Client(timeout=60) as client:
        # the answer may come, or the connection be closed, before all of it is sent
        with suppress(httpx.TransportError):
            answer = client.post(f"{url}/embeddings", content=b" " * (TINY + 1))
            assert answer.status_code == 413
        parts = (b" " * 65536 for _ in range(TINY // 65536 + 2))
        with suppress(httpx.TransportError):
            assert client.post(f"{url}/embeddings", content=parts).status_code == 413
    slow = b"POST /embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
    assert _raw(url, slow).startswith(b"HTTP/1.1 408")
    assert ask(url, model).status_code == 200


def _raw(url, request):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def test_who_leaves_does_not_stop_it(url, model):
    async def leave():
        async with httpx.AsyncClient() as client:
            body = {"model": model, "input": ["a cat"] * 100}
            posts = [client.post(f"{url}/embeddings", json=body, timeout=0.01) for _ in range(20)]
            await asyncio.gather(*posts, return_exceptions=True)

    asyncio.run(leave())
    assert ask(url, model).status_code == 200
    assert ask(url, model, ["a cat", "a dog"]).json()["data"][1]["index"] == 1


def test_the_model_fails(model, monkeypatch):
    """As a GPU may: 503 for those in the batch, and the next are served."""
    from starlette.testclient import TestClient

    monkeypatch.setenv("NPCLIP_MODEL", model)
    monkeypatch.syspath_prepend(EXAMPLES)
    import fastapi_embeddings as server

    with TestClient(server.app) as client:
        texts = client.app.state.texts
        works, body = texts.embed, {"model": model, "input": ["a cat", "a dog"]}
        texts.embed = lambda arrays: 1 / 0
        answer = client.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "server_error"
        texts.embed = works
        assert client.post("/v1/embeddings", json=body).status_code == 200
