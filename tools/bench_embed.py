#!/usr/bin/env python3
"""Time folders of JPEGs to embeddings on disk: npclip beside its peers, and beside its own floor.

    python tools/bench_embed.py [--dtype float32] [--write README.md]
    pip install open_clip_torch; pip install --no-deps clip-retrieval; pip install fsspec pandas

All read the same JPEGs (333x500 to 1920x1080), have the same random weights of ViT-B/32, batches of
32, and as many threads, and processes that load images, as --threads says:

    npclip          npclip.bulk.embed, Parquet
    open_clip       its preprocessing in a torch DataLoader, encode_image, one .npy at the end
    clip-retrieval  its own FilesReader, ClipMapper and NumpyWriter around the same open_clip model
    torch.compile   openai/CLIP's module in bfloat16 (--dtype bfloat16), images decoded in threads

"encoder alone" has pixels in memory, "decoding alone" encodes nothing. Where both share the
processors, the most that is possible is 1 / (1 / encoder + 1 / decoding): the floor. Rounds are
interleaved; the figures are medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_peers import Model, build_torch_compile
from numpy.typing import NDArray
from parity import import_openai_clip, write_or_print
from PIL import Image

import npclip
from npclip import bulk
from npclip.sources import open_sources
from npclip.store import Reader

SIZES = [(640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (500, 375), (333, 500)]
SIZES += [(1920, 1080)]
START, END = "<!-- embed -->\n", "<!-- /embed -->\n"
BATCH = 32
FLOORS = "encoder alone", "decoding alone"
Run = Callable[[], NDArray[Any]]  # embeddings, in the order of the files' names


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs of smooth random pictures with some noise, about as large as photographs' files."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / f"{i:05}.jpg", quality=85
        )


class Bench:
    """The runs, each from the folder of pictures to embeddings on disk."""

    def __init__(self, folder: Path, dtype: str, count: int, threads: int) -> None:
        """Make pictures and weights."""
        self.pictures, self.out = folder / "pictures", folder / "out"
        self.pictures.mkdir()
        write_pictures(self.pictures, count)
        self.count, self.dtype, self.threads = count, dtype, threads
        self.model = Model("ViT-B/32", "image", folder, threads)
        self.clip = npclip.load(self.model.checkpoint, device="cpu", dtype=dtype)
        self.options = bulk.Options()

    def runs(self) -> dict[str, Run]:
        """By name; those that are not installed are left out."""
        found = {"npclip": self.npclip, "npclip --fast-decode": lambda: self.npclip(True)}
        found["encoder alone"] = self._encoder_alone()
        found["decoding alone"] = self._decoding_alone
        if self.dtype == "bfloat16":
            return found | {"torch.compile": self._torch_compile()}
        for name, build in (
            ("open_clip", self._open_clip),
            ("clip-retrieval", self._clip_retrieval),
        ):
            try:
                found[name] = build()
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
        return found

    def npclip(self, fast_decode: bool = False) -> NDArray[Any]:
        """The whole run of `npclip embed`."""
        shutil.rmtree(self.out, ignore_errors=True)
        bulk.embed(self.pictures, self.out, self.clip, fast_decode=fast_decode)
        with Reader(self.out) as reader:
            return np.concatenate([np.array(block) for _, block in reader.blocks(65536)])

    def _encoder_alone(self) -> Run:
        pixels = np.random.default_rng(0).standard_normal((BATCH, 3, 224, 224), np.float32)

        def run() -> NDArray[Any]:
            for first in range(0, self.count, BATCH):
                self.clip.encode_image(pixels[: self.count - first])
            return np.empty(0)

        return run

    def _decoding_alone(self) -> NDArray[Any]:
        items = open_sources([str(self.pictures)], "image")
        for _ in bulk.decoded(items, self.clip, self.options, self.threads, BATCH):
            pass
        return np.empty(0)

    def _paths(self) -> list[Path]:
        return sorted(self.pictures.iterdir())

    def _torch_compile(self) -> Run:
        encode = build_torch_compile(self.model, self.dtype)
        transform = import_openai_clip().clip._transform(224)

        def load(path: Path) -> NDArray[Any]:
            with Image.open(path) as image:
                return transform(image).numpy()

        def run() -> NDArray[Any]:
            paths = self._paths()
            with ThreadPoolExecutor(self.threads) as pool:
                batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
                found = [encode(np.stack(list(pool.map(load, batch)))) for batch in batches]
            np.save(self.out.with_suffix(".npy"), np.concatenate(found))
            return np.concatenate(found)

        return run

    def _open_clip_model(self) -> tuple[Any, Any]:
        """Its ViT-B-32 with the same weights, and its preprocessing."""
        import_openai_clip()  # so that torchvision loads
        import open_clip

        name = "ViT-B-32-quickgelu"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        state = self.model.clip.state_dict()
        model.load_state_dict(
            {key: state[key] for key in model.state_dict() if key in state}, False
        )
        assert set(model.state_dict()) - set(state) <= {"attn_mask"}
        return model.eval(), preprocess

    def _open_clip(self) -> Run:
        import torch

        model, preprocess = self._open_clip_model()

        class Pictures(torch.utils.data.Dataset):
            def __init__(self, paths: list[Path]) -> None:
                self.paths = paths

            def __len__(self) -> int:
                return len(self.paths)

            def __getitem__(self, i: int) -> Any:
                return preprocess(Image.open(self.paths[i]).convert("RGB"))

        def run() -> NDArray[Any]:
            loader = torch.utils.data.DataLoader(
                Pictures(self._paths()), batch_size=BATCH, num_workers=self.threads
            )
            with torch.inference_mode():
                found = [model.encode_image(x, normalize=True).numpy() for x in loader]
            np.save(self.out.with_suffix(".npy"), np.concatenate(found))
            return np.concatenate(found)

        return run

    def _clip_retrieval(self) -> Run:
        model, preprocess = self._open_clip_model()
        _pretend("all_clip", load_clip=lambda **_: (model, preprocess, None))  # it would download
        _pretend("sentence_transformers", SentenceTransformer=None)
        if (spec := importlib.util.find_spec("clip_retrieval")) is None:
            raise ImportError("No module named 'clip_retrieval'")
        folder = Path(spec.submodule_search_locations[0])  # not its servers and their packages
        _pretend("clip_retrieval", __path__=[str(folder)])
        _pretend("clip_retrieval.clip_inference", __path__=[str(folder / "clip_inference")])
        from clip_retrieval.clip_inference.mapper import ClipMapper
        from clip_retrieval.clip_inference.reader import FilesReader
        from clip_retrieval.clip_inference.writer import NumpyWriter

        off = {"enable_text": False, "enable_image": True, "enable_metadata": False}

        def run() -> NDArray[Any]:
            reader = FilesReader(
                lambda keys: keys, preprocess, None, self.pictures, BATCH, self.threads, **off
            )
            mapper = ClipMapper(
                **off, use_mclip=False, clip_model="ViT-B/32", use_jit=False, mclip_model=""
            )
            writer = NumpyWriter(0, str(self.out) + "-cr", **off, output_partition_count=1)
            for batch in reader:
                writer(mapper(batch))
            writer.flush()
            return np.load(f"{self.out}-cr/img_emb/img_emb_0.npy")

        return run


def _pretend(name: str, **contents: Any) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    for key, value in contents.items():
        setattr(module, key, value)


def measure(bench: Bench, rounds: int) -> str:
    """The table."""
    runs = bench.runs()
    outputs = {name: run() for name, run in runs.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.2)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
            print(f"{name:20s} {bench.count / times[name][-1]:7.1f} a second", file=sys.stderr)
    rates = {name: bench.count / float(np.median(t)) for name, t in times.items()}
    encoder, decoding = (rates[name] for name in FLOORS)
    own = rates["npclip"]
    lines = [
        f"{bench.count} JPEGs to ViT-B/32 embeddings on disk in {bench.dtype}, {bench.threads} "
        f"threads, median of {rounds} interleaved rounds; smallest cosine with npclip's.\n",
        "| | images a second | npclip is | cosine |",
        "|---|---|---|---|",
    ]
    for name, rate in rates.items():
        if name not in FLOORS:
            cosine = "" if name == "npclip" else f"{_cosine(outputs[name], outputs['npclip']):.5f}"
            ratio = "" if name == "npclip" else f"{own / rate:.2f}x"
            lines.append(f"| {name} | {rate:.1f} | {ratio} | {cosine} |")
    for name, rate in [
        ("the encoder alone", encoder),
        ("decoding alone, in all threads", decoding),
        ("floor: both share the processors", 1 / (1 / encoder + 1 / decoding)),
    ]:
        lines.append(f"| {name} | {rate:.1f} | {own / rate:.2f}x | |")
    return "\n".join(lines) + "\n"


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The smallest."""
    a, b = (x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True) for x in (a, b))
    return float((a * b).sum(-1).min())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--files", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put both dtypes' tables there")
    args = parser.parse_args()
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    npclip.set_num_threads(args.threads)
    tables = []
    for dtype in ("float32", "bfloat16") if args.write else (args.dtype,):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), dtype, args.files, args.threads)
            tables.append(measure(bench, args.rounds))
    text = "\n".join(tables)
    write_or_print(args.write, text, START, END)


if __name__ == "__main__":
    main()
