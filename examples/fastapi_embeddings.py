"""An embeddings endpoint in OpenAI's shape, for texts and images, behind limits.

    pip install npclip fastapi uvicorn
    NPCLIP_MODEL=ViT-B/32 uvicorn --app-dir examples fastapi_embeddings:app

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.embeddings.create(model="ViT-B/32", input=["a cat", "data:image/jpeg;base64,..."])

Inputs of all requests that wait are embedded in batches, by one thread; images are decoded in
others. At most MAX_REQUESTS x MAX_BYTES of bodies are in memory. Who asks is not checked: put that,
and a limit for each client, in front of it.
"""

import asyncio
import base64
import binascii
import io
import logging
import os
from contextlib import asynccontextmanager
from typing import Literal

import numpy as np
import PIL.Image
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

import npclip

MODEL = os.environ.get("NPCLIP_MODEL", "ViT-B/32")
MAX_BYTES = 16 << 20  # of a request
MAX_INPUTS = 128  # of a request
MAX_CHARACTERS = 10_000  # of a text; CLIP reads 77 tokens
MAX_PIXELS = 25_000_000  # of an image
MAX_REQUESTS = 64  # at a time; one more is told to come again
MAX_SECONDS = 30  # for a body to arrive
BATCH, WAIT = 32, 0.004  # inputs of a batch, and seconds in which others may join the first
FORMATS = "JPEG", "PNG", "WEBP", "GIF"

embedder = npclip.Embedder(MODEL, device=os.environ.get("NPCLIP_DEVICE"))
in_flight = 0


class Body(BaseModel):
    """What is asked for."""

    input: str | list[str] = Field(min_length=1)
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Batcher:
    """await batcher(array) gives its embedding, computed together with others'."""

    def __init__(self, embed):
        self.embed, self.waiting = embed, asyncio.Queue(4 * BATCH)

    async def __call__(self, array):
        future = asyncio.get_running_loop().create_future()
        await self.waiting.put((array, future))
        return await future

    async def run(self):
        while True:
            some = [await self.waiting.get()]
            await asyncio.sleep(WAIT)
            while len(some) < BATCH and not self.waiting.empty():
                some.append(self.waiting.get_nowait())
            some = [(array, future) for array, future in some if not future.done()]  # others left
            try:
                arrays = np.stack([array for array, _ in some]) if some else []
                results = await asyncio.to_thread(self.embed, arrays) if some else []
            except Exception as error:  # of the model, not of one input: they were checked
                results = [error] * len(some)
            for (_, future), result in zip(some, results, strict=True):
                if not future.done():
                    failed = isinstance(result, Exception)
                    (future.set_exception if failed else future.set_result)(result)


@asynccontextmanager
async def lifespan(app):
    """No request is accepted before the model has computed something."""
    await asyncio.to_thread(embedder.embed_texts, "a cat")
    await asyncio.to_thread(embedder.embed_images, PIL.Image.new("RGB", (8, 8)))
    batchers = app.state.texts, app.state.images = (
        Batcher(embedder.embed_texts),
        Batcher(embedder.embed_images),
    )
    tasks = [asyncio.create_task(batcher.run()) for batcher in batchers]
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(title="CLIP embeddings", lifespan=lifespan)


@app.exception_handler(AnyHTTPException)
async def in_openais_shape(request, error):
    """{"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    content = {"message": str(error.detail), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, error.status_code, error.headers)


@app.get("/health")
async def health():
    """For load balancers."""
    return {"status": "ok", "model": MODEL, "dimension": embedder.dimension, "requests": in_flight}


@app.post("/v1/embeddings")
@app.post("/embeddings")
async def embeddings(request: Request):
    """The embeddings, normalised, in the order of the inputs."""
    global in_flight
    if in_flight >= MAX_REQUESTS:
        raise HTTPException(429, "too many requests at a time", {"Retry-After": "1"})
    in_flight += 1
    try:
        return await answer(request)
    finally:
        in_flight -= 1


async def answer(request):
    """The response. Raises HTTPException."""
    try:
        body = await asyncio.wait_for(limited(request), MAX_SECONDS)
        asked = await asyncio.to_thread(Body.model_validate_json, body)
    except ClientDisconnect:
        raise HTTPException(400, "the client left") from None
    except asyncio.TimeoutError:
        raise HTTPException(408, f"no whole request in {MAX_SECONDS} seconds") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HTTPException(422, f"{where}: {first['msg']}".removeprefix(": ")) from None
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    if asked.model != MODEL:
        raise HTTPException(404, f"no model {asked.model!r:.100} here, but {MODEL!r}")
    if len(inputs) > MAX_INPUTS:
        raise HTTPException(422, f"{len(inputs)} inputs are more than {MAX_INPUTS}")
    if asked.dimensions not in (None, embedder.dimension):
        raise HTTPException(422, f"embeddings of {MODEL} have {embedder.dimension} dimensions")
    ready = await asyncio.to_thread(lambda: [prepared(i, x) for i, x in enumerate(inputs)])
    batchers = request.app.state.texts, request.app.state.images
    try:
        rows = await asyncio.gather(*(batchers[array.ndim > 1](array) for array in ready))
    except Exception as error:  # a GPU without memory, for example
        logging.exception("the model failed")
        raise HTTPException(503, "the model failed", {"Retry-After": "1"}) from error
    tokens = sum(int(array.argmax()) + 1 for array in ready if array.ndim == 1)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": written(row, asked.encoding_format)}
            for i, row in enumerate(rows)
        ],
        "model": MODEL,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def limited(request):
    """The body. Raises HTTPException as soon as it is too long."""
    found = bytearray()
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise HTTPException(413, f"a request may have {MAX_BYTES} bytes")
    async for part in request.stream():
        found += part
        if len(found) > MAX_BYTES:
            raise HTTPException(413, f"a request may have {MAX_BYTES} bytes")
    return bytes(found)


def prepared(number, text):
    """int32 [77] of a text, float32 [3, R, R] of an image as a data: URI. Raises HTTPException."""
    try:
        if not text.startswith("data:"):
            if len(text) > MAX_CHARACTERS:
                raise npclip.InputError(f"more than {MAX_CHARACTERS} characters")
            return npclip.tokenize(text)[0]
        data = base64.b64decode(text.partition(";base64,")[2], validate=True)
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise npclip.ImageError(f"more than {MAX_PIXELS} pixels")
            return embedder.preprocess(image)
    except npclip.NpclipError as error:
        raise HTTPException(422, f"input {number}: {error}") from error
    except (binascii.Error, ValueError):
        raise HTTPException(422, f"input {number}: not base64") from None
    except Exception:  # Pillow raises anything on what is broken
        raise HTTPException(422, f"input {number}: not an image of {', '.join(FORMATS)}") from None


def written(row, encoding_format):
    """A list of numbers, or base64 of float32."""
    if encoding_format == "float":
        return row.tolist()
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
