"""The stages of gpu_check.py that run whole towers of random models: launches, models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import Case, place
from gpu_journal import Journal
from gpu_kernels import open_kernel_gpu
from gpu_rates import LEAST_SECONDS, interleaved, known_rates
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import cuda
from npclip.checkpoint import open_checkpoint
from npclip.config import ARCHITECTURES, Config, Metadata, infer_config
from npclip.cuda_towers import GRAPH_TOKENS
from npclip.model import encode_image, encode_text
from npclip.params import load_parameters

BATCHES = 1, 8, 64, 256, 1024
FIRST = 256, 1  # of all models, before the others of any
LAUNCH_BATCHES = 1, 8, 32
COMPARED = 4  # inputs whose embeddings are computed on the CPU in float64, too
LEAST_COSINE = {"float16": 0.9999, "bfloat16": 0.999, "float32": 0.999999}
MODELS = [  # name, what, dtype; most important first
    ("ViT-B/32", "image", "float16"), ("ViT-B/32", "image", "bfloat16"),
    ("ViT-L/14", "image", "float16"), ("ViT-B/32", "text", "float16"),
    ("ViT-L/14@336px", "image", "float16"), ("ViT-B/16", "image", "float16"),
    ("ViT-L/14", "text", "float16"),
]  # fmt: skip


class SyncTimer:
    """Seconds of work after which the host has waited for the device, as who needs the result."""

    def __init__(self, synchronize: Callable[[], Any]) -> None:
        """synchronize: waits for all work on the device."""
        self.synchronize = synchronize

    def __call__(self, work: Callable[[], Any], times: int = 1) -> float:
        """Seconds of work() repeated so often, each time waited for."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
            self.synchronize()
        return time.perf_counter() - start


def device_timer(device: Any) -> SyncTimer:
    """Of a GPU."""
    return SyncTimer(device.xp.cuda.runtime.deviceSynchronize)


def checkpoint(name: str, work: Path) -> Path:
    """A file with random weights of that architecture, in a folder where it may be already."""
    path = work / f"{name.replace('/', '-')}.safetensors"
    if not path.exists():
        part = path.with_suffix(".part")
        metadata = Metadata(activation="quick_gelu").to_strings()
        save_file(random_tensors(ARCHITECTURES[name]), part, metadata)
        part.replace(path)
    return path


def pixels(config: Config, batch: int) -> Any:
    """Preprocessed images: float32 [B, 3, R, R]. The first ones are the same for every batch."""
    size, rng = config.image_resolution, np.random.default_rng(0)
    few = rng.standard_normal((min(batch, 64), 3, size, size), dtype=np.float32)
    return np.concatenate([few] * -(-batch // len(few)))[:batch]


def captions(config: Config, batch: int) -> Any:
    """Token ids [B, L] of captions of 5 to 19 tokens. The first ones are the same, too."""
    rng, ids = np.random.default_rng(0), np.zeros((batch, config.context_length), np.int64)
    for row in ids:
        length = int(rng.integers(4, min(19, config.context_length)))
        row[0], row[length] = config.vocab_size - 2, config.vocab_size - 1
        row[1:length] = rng.integers(1, config.vocab_size - 2, length - 1)
    return ids


def flop_per_image(config: Config) -> float:
    """Multiplications and additions of the image tower's matrix products, all of every block."""
    tokens, width = config.grid**2 + 1, config.vision_width
    patches = 2 * config.grid**2 * width * 3 * config.vision_patch_size**2
    block = 2 * tokens * width * (4 * width + 2 * config.vision_mlp) + 4 * tokens**2 * width
    return patches + config.vision_layers * block + 2 * width * config.embed_dim


def flop_per_texts(config: Config, ids: Any) -> float:
    """The same of all texts of a batch, to their last tokens; of attention what is not masked."""
    lengths, width = ids.argmax(1) + 1.0, config.transformer_width
    dense = 2 * lengths.sum() * width * (4 * width + 2 * config.transformer_mlp)
    block = dense + 2 * np.square(lengths).sum() * width
    return float(config.transformer_layers * block + 2 * len(ids) * width * config.embed_dim)


def cosine(a: Any, b: Any) -> float:
    """The smallest of any row."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / norms).min())


def flop_of(config: Config, what: str, batch: int) -> float:
    """Of encoder()'s call."""
    if what == "text":
        return flop_per_texts(config, captions(config, batch))
    return batch * flop_per_image(config)


def encoder(model: npclip.CLIP, what: str, device: Any, batch: int) -> Callable[[], Any]:
    """A call of the model with inputs of that size, images on the device."""
    config = model.config
    if what == "text":
        ids = captions(config, batch)
        return lambda: model.encode_text(ids)
    stored = device.asarray(pixels(config, batch).astype(np.float16))
    return lambda: model.encode_image(stored)


def in_float64(node: Any) -> Any:
    """Parameters."""
    if isinstance(node, dict):
        return {key: in_float64(value) for key, value in node.items()}
    if isinstance(node, list):
        return [in_float64(value) for value in node]
    return node.astype(np.float64)


def expected_embeddings(path: Path, what: str) -> Any:
    """Of the first inputs, on the CPU in float64, of the weights as they are stored."""
    file = path.with_name(f"{path.stem}-{what}.npy")
    if not file.exists():
        saved = open_checkpoint(path)
        config = infer_config({k: t.shape for k, t in saved.tensors.items()}, saved.metadata)
        parameters = in_float64(load_parameters(saved, config, (what,))[what])
        if what == "text":
            y = encode_text(captions(config, COMPARED), parameters, config)
        else:
            rounded = pixels(config, COMPARED).astype(np.float16).astype(np.float64)
            y = encode_image(rounded, parameters, config)
        if y.dtype != np.float64:
            raise TypeError(f"the reference is {y.dtype}")
        np.save(file, y)
    return np.load(file)


def bench_model(
    journal: Journal, device: Any, path: Path, spec: tuple[str, str, str],
    batches: tuple[int, ...], gemm: float, timer: Any, rounds: int = 5,
) -> None:  # fmt: skip
    """One row for every batch size, with the cosine to embeddings in float64."""
    _, what, dtype = spec
    batches = tuple(b for b in batches if not journal.has(**_key(spec, b)))
    if not batches:
        return
    expected = expected_embeddings(path, what)
    model = npclip.load(path, device=str(device), dtype=dtype, towers=(what,))
    for batch in batches:
        row = _key(spec, batch)
        if journal.left() < 2:
            journal.leave_out(" ".join(map(str, row.values())))
            continue
        try:
            call = encoder(model, what, device, batch)
            count = min(batch, COMPARED)
            found = cosine(npclip.asnumpy(call()[:count]), expected[:count])
            seconds = interleaved({"": call}, timer, rounds, 2 * LEAST_SECONDS)[""]
        except Exception as error:
            journal.row(**row, ok=False, error=f"{type(error).__name__}: {error}"[:500])
            continue
        journal.row(
            **row,
            ok=found >= LEAST_COSINE[dtype],
            milliseconds=seconds * 1e3,
            per_second=batch / seconds,
            of_gemm=flop_of(model.config, what, batch) / seconds / gemm,
            cosine=found,
        )


def _key(spec: tuple[str, str, str], batch: int) -> dict[str, Any]:
    """What a row is known by."""
    return dict(zip(("model", "what", "dtype", "batch"), (*spec, batch), strict=True))


def model_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `models`."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    gemm, timer = known_rates(out, device).gemm, device_timer(device)
    rest = tuple(batch for batch in BATCHES if batch not in FIRST)
    for batches, spec in ((b, spec) for b in (FIRST, rest) for spec in MODELS):
        if journal.left() < 5:
            journal.leave_out(" ".join(spec))
            continue
        bench_model(journal, device, checkpoint(spec[0], work), spec, batches, gemm, timer)
        device.xp.get_default_memory_pool().free_all_blocks()
    return None


def launch_seconds(device: Any, timer: Any, times: int = 200) -> float:
    """Of putting one small kernel on the stream, with the allocation of its result."""
    case = Case("layer_norm", (1, 64))
    placed = place(device, case.arguments(), "f16")

    def many() -> None:
        for _ in range(times):
            case.run(cuda, placed)

    many()
    return float(timer(many)) / times


def eager_and_graph(device: Any, model: npclip.CLIP, batch: int, timer: Any) -> dict[str, float]:
    """Seconds of an image batch launch by launch, and as a graph."""
    images = device.asarray(pixels(model.config, batch).astype(np.float16))
    towers: Any = model._towers
    calls = {
        "eager": lambda: towers._encode_pixels(images),
        "graph": lambda: towers.encode_image(images),
    }
    return interleaved(calls, timer, 5)


def new_stream(device: Any) -> AbstractContextManager:
    """A stream that waits for no other, current as long as the context lasts."""
    return device.xp.cuda.Stream(non_blocking=True)


def encode_in_threads(
    encode: Callable[[Any], Any],
    inputs: list[Any],
    stream: Callable[[], AbstractContextManager],
    repeats: int = 20,
) -> bool:
    """Whether threads that encode at once, each on its stream, get what each alone would get."""
    expected = [npclip.asnumpy(encode(x)) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        try:
            with stream():
                start.wait()
                for _ in range(repeats):
                    if not np.array_equal(npclip.asnumpy(encode(inputs[i])), expected[i]):
                        wrong.append(i)
        except Exception as error:
            start.abort()
            wrong.append(i)
            print(f"thread {i}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not wrong


def launch_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `launches`."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    timer = device_timer(device)
    journal.fact(launch_microseconds=launch_seconds(device, timer) * 1e6)
    model = npclip.load(checkpoint("ViT-B/32", work), device=str(device))
    for batch in LAUNCH_BATCHES:
        if journal.has(batch=batch):
            continue
        seconds = eager_and_graph(device, model, batch, timer)
        journal.row(
            model="ViT-B/32",
            batch=batch,
            eager_milliseconds=seconds["eager"] * 1e3,
            graph_milliseconds=seconds["graph"] * 1e3,
        )
    tokens = model.config.grid**2 + 1, 5  # of an image, and of a text at least
    sizes = [GRAPH_TOKENS // n + 1 for n in tokens]  # too many for a graph
    images = device.asarray(pixels(model.config, 3 * sizes[0]).astype(np.float16))
    ids = captions(model.config, 3 * sizes[1])
    for what, encode, inputs, size in (
        ("image", model.encode_image, images, sizes[0]), ("text", model.encode_text, ids, sizes[1]),
    ):  # fmt: skip
        for how, count in (("graphs", 2), ("no graphs", size)):
            if journal.has(threads=f"{what}, {how}"):
                continue
            parts = [inputs[i * count : (i + 1) * count] for i in range(3)]
            same = encode_in_threads(encode, parts, partial(new_stream, device))
            journal.row(threads=f"{what}, {how}", ok=same)
    return None
