"""The stages of gpu_check.py that run whole towers of random models: launches, models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
from npclip.config import ARCHITECTURES, Config, Metadata

BATCHES = 1, 8, 64, 256, 1024
COMPARED = 4  # inputs whose embeddings are computed on the CPU, too
LEAST_COSINE = {"float16": 0.9999, "bfloat16": 0.999, "float32": 0.999999}
MODELS = [  # name, what, dtype; most important first
    ("ViT-B/32", "image", "float16"), ("ViT-L/14", "image", "float16"),
    ("ViT-B/32", "text", "float16"), ("ViT-L/14@336px", "image", "float16"),
    ("ViT-B/16", "image", "float16"), ("ViT-B/32", "image", "bfloat16"),
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


def encoder(model: npclip.CLIP, what: str, device: Any, batch: int) -> tuple[Callable, float]:
    """A call of the model with inputs of that size, images on the device, and its flop."""
    config = model.config
    if what == "text":
        ids = captions(config, batch)
        return lambda: model.encode_text(ids), flop_per_texts(config, ids)
    stored = device.asarray(pixels(config, batch).astype(np.float16))
    return lambda: model.encode_image(stored), batch * flop_per_image(config)


def expected_embeddings(path: Path, what: str) -> Any:
    """Of the first inputs, on the CPU in float32."""
    model = npclip.load(path, device="cpu", dtype="float32", towers=(what,))
    if what == "text":
        return model.encode_text(captions(model.config, COMPARED))
    rounded = pixels(model.config, COMPARED).astype(np.float16)
    return model.encode_image(rounded.astype(np.float32))


def bench_model(
    journal: Journal, device: Any, path: Path, spec: tuple[str, str, str],
    batches: tuple[int, ...], gemm: float, timer: Any, rounds: int = 5,
) -> None:  # fmt: skip
    """One row for every batch size that fits, with the cosine to the CPU's embeddings."""
    name, what, dtype = spec
    expected = expected_embeddings(path, what)
    model = npclip.load(path, device=str(device), dtype=dtype, towers=(what,))
    for batch in batches:
        if journal.left() < 2:
            return
        row: dict[str, Any] = {"model": name, "what": what, "dtype": dtype, "batch": batch}
        try:
            call, flop = encoder(model, what, device, batch)
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
            of_gemm=flop / seconds / gemm,
            cosine=found,
        )


def model_stage(journal: Journal, out: Path, work: Path) -> str | None:
    """The stage `models`."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    gemm, timer = known_rates(out, device).gemm, device_timer(device)
    for spec in MODELS:
        if journal.left() < 5:
            journal.fact(is_complete=False)
            break
        bench_model(journal, device, checkpoint(spec[0], work), spec, BATCHES, gemm, timer)
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


def encode_in_threads(encode: Callable[[Any], Any], inputs: list[Any], repeats: int = 20) -> bool:
    """Whether threads that encode at the same time get what each alone would get."""
    expected = [npclip.asnumpy(encode(x)) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(repeats):
            try:
                if not np.array_equal(npclip.asnumpy(encode(inputs[i])), expected[i]):
                    wrong.append(i)
            except Exception as error:
                wrong.append(i)
                print(f"thread {i}: {error}")

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
    for batch in (1, 8, 32):
        seconds = eager_and_graph(device, model, batch, timer)
        journal.row(
            model="ViT-B/32",
            batch=batch,
            eager_milliseconds=seconds["eager"] * 1e3,
            graph_milliseconds=seconds["graph"] * 1e3,
        )
    images = device.asarray(pixels(model.config, 6).astype(np.float16))
    inputs = [images[:2], images[2:4], images[4:6]]
    ids = captions(model.config, 6)
    for what, encode, parts in (
        ("image", model.encode_image, inputs),
        ("text", model.encode_text, [ids[:2], ids[2:4], ids[4:6]]),
    ):
        journal.row(threads=what, ok=encode_in_threads(encode, parts))
    return None
