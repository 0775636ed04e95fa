"""What mutations begin with: small, sound files of every format that npclip reads."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch_writer
from fuzz_mutate import pack
from PIL import Image
from safetensors.numpy import save

from npclip.config import Metadata
from npclip.provenance import Provenance

CONFIG = replace(
    tiny_models.VIT, vision_layers=1, vision_mlp=64, transformer_layers=1, transformer_mlp=64
)
WORDS = replace(CONFIG, vocab_size=49408, context_length=77)
TEXTS = ["a photo of a cat", "it's 5 o'clock", "naïve café &amp; <b>", "日本語 ½ ﬁ 🤷‍♀️", "İẞ́"]
PROVENANCE = Provenance("tiny", "0" * 64, "float32", "shortest 16 bicubic", True, 4, "0.1.0")


@functools.cache
def model_bytes(words: bool = False) -> bytes:
    """safetensors of a CLIP of 140 KB; words: one whose vocabulary is the real one, 6 MB."""
    arrays = tiny_models.weights(WORDS if words else CONFIG, "float16")
    return save(arrays, Metadata(activation="gelu").to_strings())


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    return tiny_models.weights(CONFIG, "float16")


def _few() -> dict[str, np.ndarray]:
    return {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16)}


def safetensors() -> list[bytes]:
    return [save(_few()), save(_few(), {"format": "pt"}), save({}), model_bytes()]


def pickles() -> list[bytes]:
    writer = torch_writer.TorchWriter()
    values = [
        torch_writer.state_dict(writer, _few()),
        {"state_dict": torch_writer.state_dict(writer, _few()), "epoch": 3, "lr": 0.1, "x": None},
        torch_writer.script_module(writer, {"a.mlp.b": np.ones(2, np.float32)}),
        torch_writer.Persistent(("storage", torch_writer.Name("torch", "HalfStorage"), "0", "", 3)),
    ]
    return [torch_writer.dump(value) for value in values]


def archives() -> list[bytes]:
    """Of torch.save and torch.jit.save, old ones, and what is none at all."""
    found = []
    for arrays in (_few(), _arrays()):
        writer = torch_writer.TorchWriter()
        root: Any = torch_writer.state_dict(writer, arrays)
        found.append(writer.archive({"state_dict": root, "epoch": 3}))
        found.append(torch_writer.without_crc(writer.archive(root)))
        writer = torch_writer.TorchWriter()
        root = torch_writer.script_module(writer, arrays)
        found.append(writer.archive(root, code__a_py=b"class A: pass"))
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + pickles()[0]
    return [
        *found,
        legacy,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
        pickles()[0],
    ]


def folders() -> list[bytes]:
    """Of Hugging Face, whole and sharded, and of open_clip."""
    arrays = _arrays()
    theirs = tiny_models.to_hugging_face(arrays)
    section = {"hidden_act": "quick_gelu", "num_attention_heads": 1}
    vision = section | {"patch_size": 8, "image_size": 16, "hidden_size": 64}
    text = section | {"eos_token_id": 2, "bos_token_id": 0}
    config = {"model_type": "clip", "vision_config": vision, "text_config": text}
    images = {
        "do_resize": True, "size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    beside = {
        "config.json": json.dumps(config).encode(),
        "preprocessor_config.json": json.dumps(images).encode(),
    }
    names = sorted(theirs)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    sharded = {file: save({k: theirs[k] for k in some}) for file, some in shards.items()}
    cfg = {
        "embed_dim": 16, "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 7, "vocab_size": 11, "width": 64, "heads": 1, "layers": 1},
    }  # fmt: skip
    whole = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    return [
        pack(beside | {"model.safetensors": save(theirs)}),
        pack(beside | {"model.safetensors.index.json": json.dumps(index).encode()} | sharded),
        pack(
            {
                "open_clip_config.json": json.dumps(whole).encode(),
                "open_clip_model.safetensors": save(arrays),
            }
        ),
    ]


def texts() -> list[bytes]:
    return [text.encode() for text in [*TEXTS, " ".join(TEXTS) * 5, ""]]


def token_ids() -> list[bytes]:
    rows = [[49406, 320, 2368, 49407], [0, 49407], [*range(250, 270)], [-1, 49408]]
    return [np.array(ids, "<i4").tobytes() for ids in rows]


def _picture(mode: str = "RGB", size: tuple[int, int] = (24, 17)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


def _encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    _picture(mode).save(stream, format, **options)
    return stream.getvalue()


@functools.cache
def images() -> list[bytes]:
    """Of every format that Pillow can write here, and of every kind that matters."""
    Image.init()
    found = []
    for format in sorted(Image.SAVE):
        for mode in ("RGB", "P", "L", "1", "RGBA"):
            try:
                found.append(_encoded(format, mode))
            except Exception:  # it cannot write that
                continue
            if format not in ("PNG", "TIFF"):
                break
    frames = [_picture() for _ in range(3)]
    found.append(_encoded("JPEG", "CMYK"))
    found.append(_encoded("JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(20)))
    found += [_encoded(f, save_all=True, append_images=frames) for f in ("GIF", "PNG", "WEBP")]
    for how in ("tiff_lzw", "packbits", "tiff_deflate"):
        found.append(_encoded("TIFF", compression=how))
    found.append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return found


def tars() -> list[bytes]:
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
            for name, data in (
                ("a.png", _encoded("PNG")),
                ("a.txt", b"a cat\n"),
                ("sub/" * 40 + "long.png", b"x"),
                ("a.png", _encoded("GIF")),
                ("empty.png", b""),
                ("é.txt", "é".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
                info = tarfile.TarInfo(f"{kind!r}.png")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        found.append(stream.getvalue())
    return [*found, gzip.compress(found[0], mtime=0), found[1][:2000], b""]


def parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet

    picture = _encoded("PNG")
    image = pa.array([picture, b"", None, b"x"])
    struct_ = pa.array([{"bytes": picture, "path": "a"}, None, {"bytes": None, "path": "b"}])
    tables = [
        pa.table({"id": ["a", "b", "b", None], "image": image, "text": ["x", None, "", "é"]}),
        pa.table({"image": struct_, "caption": ["a", "b", "c"]}),
        pa.table({"text": pa.array(["a", "b"] * 9).dictionary_encode(), "jpg": [b"y"] * 18}),
    ]
    found = []
    for table in tables:
        for options in ({}, {"compression": "none", "row_group_size": 2, "use_dictionary": False}):
            stream = io.BytesIO()
            pyarrow.parquet.write_table(table, stream, **options)
            found.append(stream.getvalue())
    return found


def text_files() -> list[bytes]:
    """The first byte says which extension: text_files.EXTENSIONS of fuzz_targets."""
    rows = 'id,text,n\n1,a cat,2\n2,"a, b\nc",3\n3,é,4\n'
    objects = '{"text": "a", "id": 1}\n"b"\n{"caption": "c"}\n\n{"text": null}\n'
    return [
        b"0" + "\n".join(TEXTS).encode(),
        b"1" + objects.encode(),
        b"2" + rows.encode(),
        b"3" + rows.replace(",", "\t").encode(),
        b"0\xef\xbb\xbfa\r\nb\x00c\r\n",
    ]


def lists() -> list[bytes]:
    return [b"a.png\nsub\n*.png\nb.tar\n@c.txt\n-\n", b"a.png\0b.tar\0", b"**/*.png\r\n\n[a\n{}\n"]


def _collection(format: str, close: bool, dtype: str = "float16") -> bytes:
    from npclip.store import Writer

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(folder, PROVENANCE, "image", dtype=dtype, format=format, shard_rows=4)
        writer.append(list("abcdef"), list("ABCDEF"), np.ones((6, 4), np.float32))
        writer.fail("g", "G", "empty")
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix != ".lock"}
        writer.close()
        if close:
            paths = sorted(Path(folder).iterdir())
            files = {path.name: path.read_bytes() for path in paths if path.suffix != ".lock"}
        return pack(files)


def collections() -> list[bytes]:
    kinds = [(f, close) for f in ("npy", "parquet") for close in (True, False)]
    return [_collection(*kind) for kind in kinds] + [_collection("npy", True, "float32")]


def command_lines() -> list[bytes]:
    """Arguments between NULs; the files are those that fuzz_targets.command_line writes."""
    model = "--model model.safetensors"
    return [
        line.replace(" ", "\0").encode()
        for line in (
            "info model.safetensors", "info model.safetensors --json", "info model --tensors",
            f"classify a.png cat dog {model}",
            f"classify a.png cat {model} --json --template a{{}}",
            "convert model.safetensors b.safetensors --dtype float16", "models", "models --json",
            f"embed a.png texts -o out {model} --format npy", "--version", "", "embed", "--help",
            f"embed texts --text -o out {model} --truncate --batch 2 --workers 1 --store float32",
            f"embed @list texts/a.csv --text -o out {model} --column text --id-column id",
            f"embed *.png -o out {model} --max-pixels 99 --fast-decode --no-normalize "
            "--dtype float32",
        )
    ]  # fmt: skip


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "safetensors": safetensors,
    "pickle": pickles,
    "torch": archives,
    "folder": folders,
    "tokenizer": texts,
    "decode": token_ids,
    "image": images,
    "tar": tars,
    "parquet": parquets,
    "text-files": text_files,
    "list": lists,
    "store": collections,
    "command-line": command_lines,
}
