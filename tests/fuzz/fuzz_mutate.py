"""Mutations: of bytes, of lines, of JSON, and of formats whose checksums or lengths must fit.

Each takes a random.Random and data, and gives data. What does not parse any more is changed as
bytes. A folder is one input, too: pack() and unpack().
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutate = Callable[[random.Random, bytes], bytes]

MAX = 1 << 20  # bytes of an input
INTERESTING = [0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536]
INTERESTING += [2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [*INTERESTING, -1, -(2**31), -(2**63), 2**70, 1e300, 1e-320, 0.5, float("nan")]
NUMBERS += [float("inf"), -float("inf")]
STRINGS = ["", "\0", "a" * 300, "../x", "/etc/passwd", "\ud800", "\N{GRINNING FACE}", "%s{}{0}"]
STRINGS += ["F64", "BF16", "F8_E4M3", "I64", "null", "gelu", "quick_gelu", "model", "NaN", "-"]
PLAIN: list[Any] = [None, True, False, [], {}, [[]], [{}]]


def some_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to a few changes at places that are random."""
    changed = bytearray(data)
    for _ in range(min(1 + int(rng.expovariate(0.6)), 12)):
        _change(rng, changed)
    return bytes(changed[:MAX])


def _change(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # formats say most at their beginning
        at = min(at, int(rng.expovariate(1 / 64)))
    size = 1 + int(rng.expovariate(1 / 8))
    kind = rng.randrange(9)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + size]
    elif kind == 3:
        data[at:at] = rng.randbytes(size)
    elif kind == 4:
        data[at:at] = data[at : at + size] * rng.randrange(1, 4)
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(INTERESTING) & (256**width - 1)
        data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    elif kind == 7:
        other = rng.randrange(len(data) + 1)
        data[at : at + size] = data[other : other + size]
    elif kind == 8:
        data[at : at + size] = bytes([rng.choice((0, 255, 32, 10, 34))]) * size


def lines(rng: random.Random, data: bytes) -> bytes:
    """Of lines and their fields."""
    found = data.split(b"\n")
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(found))
        kind = rng.randrange(6)
        if kind == 0:
            found[at] = some_bytes(rng, found[at])
        elif kind == 1:
            found[at:at] = [found[rng.randrange(len(found))]] * rng.randrange(1, 5)
        elif kind == 2 and len(found) > 1:
            del found[at]
        elif kind == 3:
            found[at] = rng.choice(STRINGS).encode("utf-8", "surrogatepass")
        elif kind == 4:
            found[at] = rng.choice((b'"', b",", b"\t", b"\r", b"\xff", b"\xef\xbb\xbf")) + found[at]
        else:
            found[at] = some_json(rng, found[at])
    return b"\n".join(found)[:MAX]


def some_json(rng: random.Random, data: bytes) -> bytes:
    """A value in it becomes another."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return some_bytes(rng, data)
    if rng.random() < 0.05:
        depth = rng.choice((50, 5000, 200_000))
        return b"[" * depth + b"]" * depth
    for _ in range(1 + rng.randrange(3)):
        value = _other(rng, value)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {rng.choice([*STRINGS, *value]): value[key]}
        return value | {key: _other(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        middle = rng.choice(([], [value[at]] * 2, [_other(rng, value[at])]))
        return [*value[:at], *middle, *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 8, 1 << 31, 1 << 62))
    return rng.choice([*NUMBERS, *STRINGS, *PLAIN])


def some_text(rng: random.Random, data: bytes) -> bytes:
    """Of characters, also of those that UTF-8 has none for."""
    try:
        text = list(data.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        text = list(data.decode("utf-8", "replace"))
    for _ in range(1 + rng.randrange(4)):
        at = rng.randrange(len(text) + 1)
        more = rng.choice((*STRINGS, "&amp;", "&#x110000;", "<|endoftext|>", " ", "\r\n", "'s"))
        kind = rng.randrange(5)
        if kind == 0:
            more = "".join(chr(rng.randrange(1 << rng.choice((7, 11, 16, 20)))) for _ in range(6))
        elif kind == 1:
            more = "".join(text[at : at + 20]) * rng.choice(
                (2, 3, 20, 20 if rng.random() < 0.9 else 500)
            )
        elif kind == 2:
            del text[at : at + 1 + rng.randrange(8)]
            more = ""
        elif kind == 3:
            more = chr(rng.choice((0x130, 0x307, 0xFB01, 0x1E9E, 0xD800, 0xFEFF, 0x85, 0xA0, 0)))
        text[at:at] = more
    return "".join(text[: 1 << 16]).encode("utf-8", "surrogatepass")


def framed_json(rng: random.Random, data: bytes) -> bytes:
    """safetensors: the header, and its length with it."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) or rng.random() < 0.3:
        return some_bytes(rng, data)
    header = some_json(rng, data[8 : 8 + length])
    header += b" " * (-len(header) % 8 if rng.random() < 0.8 else 0)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def zip_entries(rng: random.Random, data: bytes) -> bytes:
    """One entry's content or name, with the right CRC; often a pickle's."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return some_bytes(rng, data)
    if not entries or rng.random() < 0.3:
        return some_bytes(rng, data)
    at = rng.randrange(len(entries))
    if rng.random() < 0.7:
        at = next((i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")), at)
    name, content = entries[at]
    kind = rng.randrange(10)
    if kind == 0:
        entries[at] = rng.choice([*STRINGS[2:5], name + "x", entries[0][0]]), content
    elif kind == 1:
        entries[at:at] = [entries[rng.randrange(len(entries))]]
    elif kind == 2:
        del entries[at]
    else:
        entries[at] = name, opcodes(rng, content)
    stream = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", how) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, how)
    return stream.getvalue()


OPCODES = [b"(", b".", b"0", b"1", b"2", b"N", b"R", b"a", b"b", b"d", b"e", b"l", b"o", b"s", b"t"]
OPCODES += [b"u", b"}", b"]", b")", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x94", b"Q"]
OPCODES += [b"h\0", b"q\0", b"K\7", b"J\xff\xff\xff\xff", b"X\1\0\0\0a", b"\x8c\1a", b"\x93"]
OPCODES += [
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"c__torch__.a\nB\n",
    b"I9\n",
    b"V\\ud800\n",
]
OPCODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x8a\x08" + b"\x7f" * 8, b"G" + b"\x7f" * 8]


def opcodes(rng: random.Random, data: bytes) -> bytes:
    """Of a pickle: opcodes among its own."""
    if rng.random() < 0.4:
        return some_bytes(rng, data)
    changed = bytearray(data)
    for _ in range(1 + rng.randrange(3)):
        at, new = (
            rng.randrange(len(changed) + 1),
            rng.choice(OPCODES) * rng.choice((1, 1, 1, 2, 99)),
        )
        changed[at : at + rng.choice((0, len(new)))] = new
    return bytes(changed)


def png_chunks(rng: random.Random, data: bytes) -> bytes:
    """Of a PNG's chunks, with the right CRC; other images as bytes."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or rng.random() < 0.4:
        return some_bytes(rng, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    which = rng.randrange(len(chunks)) if chunks else 0
    for i, (name, content) in enumerate(chunks):
        if i == which:
            name = rng.choice((name, name, b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"acTL", b"eXIf"))
            if name == b"IDAT" and rng.random() < 0.5:
                content = zlib.compress(rng.randbytes(rng.randrange(400)), 1)
            else:
                content = some_bytes(rng, content)
            chunks[i] = name, content
    parts = (
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c))
        for name, c in chunks
    )
    return data[:8] + b"".join(parts)


def tar_headers(rng: random.Random, data: bytes) -> bytes:
    """Of a header, with the right sum."""
    if rng.random() < 0.4 or len(data) < 512 or data.startswith(b"\x1f\x8b"):
        return some_bytes(rng, data)
    changed = bytearray(data)
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(starts or [0])
    fields = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
    start, width = rng.choice([*fields.values(), (rng.randrange(500), 8)])
    value = rng.choice(
        (
            rng.randbytes(width),
            oct(rng.choice(INTERESTING))[2:].rjust(width - 1, "0").encode() + b"\0",
            b"\x80" + rng.randbytes(width - 1),
            rng.choice(b"0123456789gxLKSVDMN7").to_bytes(1, "big") * width,
            b"../" * 33,
        )
    )
    changed[at + start : at + start + width] = value[:width].ljust(width, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    total = sum(changed[at : at + 512])
    changed[at + 148 : at + 156] = f"{total:06o}\0 ".encode()
    return bytes(changed)


def journal(rng: random.Random, data: bytes) -> bytes:
    """The store's: of the first record, with the right digest."""
    if rng.random() < 0.4 or len(data) < 24:
        return some_bytes(rng, data)
    length = int.from_bytes(data[20:24], "little")
    names = some_json(rng, data[24 : 24 + length])
    size = rng.choice((len(names), len(names), len(names) + rng.randrange(-2, 3)))
    content = data[16:20] + (max(size, 0)).to_bytes(4, "little") + names + data[24 + length :]
    if rng.random() < 0.2:
        content = some_bytes(rng, content)
    return hashlib.blake2b(content, digest_size=16).digest() + content


def pack(files: dict[str, bytes]) -> bytes:
    """Of a folder: name, NUL, length, content, and so on."""
    return b"".join(
        name.encode("utf-8", "surrogateescape") + b"\0" + struct.pack("<I", len(data)) + data
        for name, data in files.items()
    )


def unpack(data: bytes) -> dict[str, bytes]:
    """The inverse, for any bytes; a name is a plain one, of a file in that folder itself."""
    files: dict[str, bytes] = {}
    while data and len(files) < 20:
        name, _, rest = data.partition(b"\0")
        length = int.from_bytes(rest[:4], "little")
        name = name[:100].replace(b"/", b"_")
        if name not in (b"", b".", b".."):
            files[name.decode("utf-8", "surrogateescape")] = rest[4 : 4 + length]
        data = rest[4 + length :]
    return files


def in_folder(by_suffix: dict[str, Mutate]) -> Mutate:
    """Of a file in a packed folder, as its name says; or a file more, less, or under that name."""

    def mutate(rng: random.Random, data: bytes) -> bytes:
        files = unpack(data)
        if not files:
            return some_bytes(rng, data)
        name, other = rng.choice(list(files)), rng.choice(list(files))
        kind = rng.randrange(12)
        if kind == 0:
            del files[name]
        elif kind == 1:
            files[other] = files[name]
        elif kind == 2:
            files[name.replace("0", "1")] = files[name]
        else:
            suffix = next((end for end in by_suffix if name.endswith(end)), "")
            files[name] = by_suffix.get(suffix, some_bytes)(rng, files[name])
        return pack(files)

    return mutate


# fmt: off
OPTIONS = [
    "--model=model.safetensors", "--activation=gelu", "--device=cpu", "--json", "--template={}",
    "--dtype=float32", "--tensors", "-o=out", "--out=other", "--text", "--store=float16",
    "--format=npy", "--no-normalize", "--batch=2", "--workers=1", "--column=text",
    "--id-column=id", "--max-pixels=99999", "--fast-decode", "--truncate",
]
WORDS = [
    "--help", "--", "-", "cpu", "cuda:1", "gelu", "0", "1", "-1", "99999", "nan", "embed", "info",
    "convert", "classify", "models", "a.png", "texts", "list", "@list", "*.png",
    "model.safetensors", "ViT-B_32", "out", "--out", "--model", "--device=cuda", "--batch=0",
]
# fmt: on


def arguments(rng: random.Random, data: bytes) -> bytes:
    """Of a command line: options more or fewer, in other places, or other values."""
    found = data.split(b"\0")
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(found):
            found[at] = some_text(rng, found[at])[:300].replace(b"\0", b"")
        elif kind == 1 and at < len(found):
            del found[at]
        elif kind == 2 and at < len(found):
            found[at] = rng.choice(WORDS).encode()
        elif kind == 3:
            found.insert(at, rng.choice(WORDS).encode())
        else:
            found.append(rng.choice(OPTIONS).encode())
    return b"\0".join(found)
