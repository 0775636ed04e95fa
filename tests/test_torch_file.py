"""torch's files, written by hand: read right, or refused with nothing executed."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_writer import (
    ORDERED_DICT,
    Built,
    Call,
    Module,
    Name,
    Persistent,
    Raw,
    TorchWriter,
    dump,
    dump_value,
    save,
    script_module,
    state_dict,
    without_crc,
    zip_bytes,
)

from npclip import unpickle as unpickle_module
from npclip.errors import CheckpointError
from npclip.tensor import MappedFile
from npclip.torch_file import MAX_PICKLE, TorchFile, read_torch
from npclip.unpickle import unpickle

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(2, 3)).astype("f4"),
    "b.weight": RNG.normal(size=(4,)).astype("f2"),
    "c": np.array(2.5, "f8"),
    "d": np.array([1, -2], "i8"),
    "empty": np.zeros((0, 3), "f4"),
    "bf16": np.arange(5, dtype="u2"),
}


def open_bytes(tmp_path, data: bytes) -> TorchFile:
    return read_torch(MappedFile(save(tmp_path / "model.pt", data)))


def values(file: TorchFile) -> dict[str, tuple]:
    return {k: (t.dtype, t.shape, t.read().tobytes()) for k, t in file.tensors.items()}


def plain(**arrays: np.ndarray) -> bytes:
    writer = TorchWriter()
    return writer.archive(state_dict(writer, arrays or ARRAYS))


# --- what is read ---


def test_state_dict(tmp_path):
    file = open_bytes(tmp_path, plain())
    assert (file.kind, file.activation) == ("state_dict", None)
    assert file.tensors["bf16"].dtype == "bfloat16"
    for name, array in ARRAYS.items():
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(file.tensors[name].read(), array)
        assert not file.tensors[name].read().flags.writeable or array.size == 0


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrapped_with_other_entries(tmp_path, wrapper):
    writer = TorchWriter()
    optimizer = {"state": {0: {"step": 3}}, "betas": (0.9, 0.95), "dtype": Name("torch", "float32")}
    root = {
        "epoch": 3,
        "name": "run",
        "loss": 0.25,
        "device": Call(Name("torch", "device"), ("cpu",)),
        "size": Call(Name("torch", "Size"), ((1, 2),)),
        "huge": 1 << 80,
        "list": [1, None, True],
        "optimizer": optimizer,
        wrapper: state_dict(writer, ARRAYS),
    }
    assert set(open_bytes(tmp_path, writer.archive(root)).tensors) == set(ARRAYS)


def test_parameters(tmp_path):
    writer = TorchWriter()
    rebuild = Name("torch._utils", "_rebuild_parameter")
    tensor = writer.tensor(ARRAYS["a"])
    data = writer.archive({"a": Call(rebuild, (tensor, True, Call(ORDERED_DICT, ())))})
    np.testing.assert_array_equal(open_bytes(tmp_path, data).tensors["a"].read(), ARRAYS["a"])


def test_views_of_one_storage(tmp_path):
    base = np.arange(60, dtype="f4").reshape(3, 4, 5)
    views = {"t": base.transpose(2, 0, 1), "row": base[1], "step": base[::2, 1:, ::3], "all": base}
    writer = TorchWriter()
    data = writer.archive({k: writer.tensor(v, storage=base) for k, v in views.items()})
    file = open_bytes(tmp_path, data)
    for name, view in views.items():
        np.testing.assert_array_equal(file.tensors[name].read(), view)


@pytest.mark.parametrize(
    ("cls", "activation"), [("QuickGELU", "quick_gelu"), ("GELU", "gelu"), ("ReLU", None)]
)
def test_torchscript(tmp_path, cls, activation):
    arrays = {"x": ARRAYS["a"], "blocks.0.mlp.c_fc.weight": ARRAYS["b.weight"]}
    writer = TorchWriter()
    root = script_module(writer, arrays, cls)
    tag = Name("torch.jit._pickle", "restore_type_tag")
    root.attributes["_sizes"] = Call(tag, ([1, 2], "List[int]"))
    file = open_bytes(tmp_path, writer.archive(root, code__model=b"import os"))
    assert (file.kind, file.activation) == ("TorchScript", activation)
    assert set(file.tensors) == set(arrays)
    np.testing.assert_array_equal(
        file.tensors["blocks.0.mlp.c_fc.weight"].read(), arrays.popitem()[1]
    )


def test_cyclic_and_shared_modules_end(tmp_path):
    writer = TorchWriter()
    make, x, y = b"c__torch__.m\nM\n)\x81", dump_value("x"), dump_value("y")
    chain = make + b"q\x00}(" + x + b"h\x00" + y + b"h\x00ub"  # holds itself twice
    for _ in range(60):  # each holds the one before twice: 2^60 paths
        chain = make + b"}(" + x + chain + b"q\x01" + y + b"h\x01ub"
    tensor = writer.tensor(ARRAYS["a"])
    root = Module(Name("__torch__", "Root"), {"t": tensor, "chain": Raw(chain)})
    assert set(open_bytes(tmp_path, writer.archive(root)).tensors) == {"t"}


def test_both_activations(tmp_path):
    root = Module(Name("__torch__", "A"), {})
    root.attributes = {c: Module(Name("__torch__.m", c), {}) for c in ("GELU", "QuickGELU")}
    with pytest.raises(CheckpointError, match="both QuickGELU and GELU"):
        open_bytes(tmp_path, TorchWriter().archive(root))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol):
    value = {"a": [1, 2.5, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "b": {"c": None, 3: True}}
    value["same"] = value["a"]
    assert unpickle(pickle.dumps(value, protocol)) == value


# --- what is refused ---


class Canary:
    """Creates a file if it is ever run."""

    def __init__(self, path) -> None:
        self.path = path
        self.command = f"touch {path}"

    def assert_alive(self) -> None:
        assert not self.path.exists()


def attacks(command: str) -> dict[str, bytes]:
    text = dump_value(command)
    line = command.encode()
    posix = b"cposix\nsystem\n"
    return {
        "GLOBAL": posix + b"(" + text + b"tR",
        "builtins": b"cbuiltins\nexec\n(" + text + b"tR",
        "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93(" + text + b"tR",
        "INST": b"(" + text + b"iposix\nsystem\n",
        "OBJ": b"(" + posix + text + b"o",
        "NEWOBJ": posix + b"(" + text + b"t\x81",
        "NEWOBJ_EX": posix + b"(" + text + b"t}\x92",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "PERSID": b"Pposix.system\n",
        "dotted": b"\x8c\x05torch\x8c\x10serialization.os\x93)R",
        "getattr": b"cbuiltins\ngetattr\n(" + posix + text + b"tR",
        "import": b"cimportlib\nimport_module\n(" + text + b"tR",
        "torch code": b"ctorch.hub\nload\n(" + text + b"tR",
        "torch attribute": b"ctorch\nload\n(" + text + b"tR",
        "setstate": b"cpathlib\nPath\n)\x81}X\x0c\x00\x00\x00__setstate__" + posix + b"sb",
        "string": b"S'" + line + b"'\n0" + posix + b"(h\x00tR",
    }


@pytest.mark.parametrize("attack", attacks(""))
@pytest.mark.parametrize("where", ["root", "in a state_dict", "attribute"])
def test_nothing_is_executed(tmp_path, attack, where):
    canary = Canary(tmp_path / "canary")
    raw = Raw(attacks(canary.command)[attack])
    writer = TorchWriter()
    good = writer.tensor(ARRAYS["a"])
    root = {
        "root": raw,
        "in a state_dict": {"a": good, "evil": raw},
        "attribute": Module(Name("__torch__", "M"), {"a": good, "evil": raw}),
    }[where]
    with pytest.raises(CheckpointError, match="nothing was executed"):
        open_bytes(tmp_path, writer.archive(root))
    canary.assert_alive()


def test_the_attacks_are_real(tmp_path):
    """The same bytes do run in Python's own pickle: the canary works."""
    canary = Canary(tmp_path / "canary")
    data = b"\x80\x02" + attacks(canary.command)["GLOBAL"] + b"."
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, data.hex()], check=True)
    assert canary.path.exists() or os.name == "nt"


def test_message_names_the_global(tmp_path):
    writer = TorchWriter()
    root = {"x": Call(Name("os", "system"), ("true",))}
    with pytest.raises(CheckpointError, match=r"refers to 'os.system', which is not part"):
        open_bytes(tmp_path, writer.archive(root))


@pytest.mark.parametrize(
    "value",
    [
        Call(Name("__torch__", "f"), ()),  # a TorchScript class is not callable
        Call(Name("torch", "FloatStorage"), ()),
        Call(Name("torch", "float32"), ()),
        Call(Name("torch.jit._pickle", "restore_type_tag"), ()),
        Call(ORDERED_DICT, ([("a", 1)],)),
        Raw(b"ccollections\nOrderedDict\n)\x81"),  # NEWOBJ of what is no module
        Raw(b"c__torch__.m\nM\n(K\x01t\x81"),
        Built([1], {"a": 1}),
        Built("text", {"__class__": 1}),
        Persistent("storage"),
        Persistent(("storage", "torch.FloatStorage", "0", "cpu", 1)),
        Persistent(("storage", Name("torch", "float32"), "0", "cpu", 1)),
        Persistent(("storage", Name("torch", "FloatStorage"), 0, "cpu", 1)),
        Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", -1)),
        Persistent(("storage", Name("torch", "FloatStorage"), "0", "cpu", True)),
        Persistent(("module", Name("torch", "FloatStorage"), "0", "cpu", 1)),
        Persistent(()),
        {(1, 2): 3},  # a tuple as key: hashing it may take forever
        Raw(b"h\x07"),  # never memoized
        Raw(b"}K\x01s"),
        Raw(b"(K\x01"),
        Raw(b"](K\x01u"),
        Raw(b"}(K\x01u"),
        Raw(b"\x86"),
        Raw(b"t"),
        Raw(b"X\xff\xff\xff\x7fshort"),
        Raw(b"\x8b\xff\xff\xff\x7fshort"),
        Raw(b"\xff"),
        Raw(b"F1e5\n"),
        Raw(b"I" + b"9" * 5000 + b"\n"),
        Raw(b""),
    ],
    ids=str,
)
def test_misfit_pickles(value):
    with pytest.raises(CheckpointError):
        unpickle(dump(value))


def test_endless_hash_and_deep_nesting_end():
    bomb = b")" + b"q\x00h\x00\x86" * 64  # t = (t, t), 64 times: 2^64 leaves
    with pytest.raises(CheckpointError):
        unpickle(b"\x80\x02}" + bomb + b"K\x01s.")
    unpickle(b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".")


def test_no_stop():
    with pytest.raises(CheckpointError, match="damaged"):
        unpickle(b"\x80\x02N")
    with pytest.raises(CheckpointError, match="damaged"):
        unpickle(b"")


@given(st.binary(max_size=200))
def test_garbage_pickles(data):
    with contextlib.suppress(CheckpointError):
        unpickle(b"\x80\x02" + data)


STORAGE = np.arange(6, dtype="f4")


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (3, 2), (1, 5)),
        (-1, (2,), (1,)),
        (1, (-2,), (1,)),
        (5, (2,), (-1,)),
        (0, (1 << 62, 1 << 62), (0, 0)),
        (0, (7,), (0,)),
        (0, (1 << 70,), (1,)),
        (1 << 62, (2,), (1,)),
        (0, (2, 3), (3,)),
        (0, (2,), (3, 1)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (6, (), ()),
    ],
)
def test_tensors_outside_their_storage(tmp_path, offset, shape, strides):
    writer = TorchWriter()
    writer.storages.append(STORAGE.tobytes())
    root = {"a": writer.view("0", STORAGE, offset, shape, strides)}
    with pytest.raises(CheckpointError):
        open_bytes(tmp_path, writer.archive(root))


@pytest.mark.parametrize("key", ["1", "../data.pkl", "/etc/passwd", "", "0/../0", "\0"])
def test_storage_missing(tmp_path, key):
    writer = TorchWriter()
    writer.storages.append(STORAGE.tobytes())
    root = {"a": writer.view(key, STORAGE, 0, (6,), (1,))}
    with pytest.raises(CheckpointError, match="is missing"):
        open_bytes(tmp_path, writer.archive(root))


@pytest.mark.parametrize("size", [0, 5, 7])
def test_storage_of_another_size(tmp_path, size):
    writer = TorchWriter()
    writer.storages.append(STORAGE.tobytes())
    root = {"a": writer.view("0", np.zeros(size, "f4"), 0, (), ())}
    with pytest.raises(CheckpointError, match="24 bytes where its"):
        open_bytes(tmp_path, writer.archive(root))


@pytest.mark.parametrize(
    ("root", "message"),
    [([1], "holds a list"), ({}, "no tensors"), ({"state_dict": {}}, "no tensors"), (3, "an? int")],
)
def test_no_state_dict(tmp_path, root, message):
    with pytest.raises(CheckpointError, match=message):
        open_bytes(tmp_path, TorchWriter().archive(root))


# --- the archive ---


def test_deflated(tmp_path):
    data = zip_bytes({"m/data.pkl": dump({}) + bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_bytes(tmp_path, data)


def test_deflated_storage(tmp_path):
    """A zip bomb: 64 MB of zeros in 64 kB. Nothing is inflated."""
    writer = TorchWriter()
    writer.storages.append(bytes(64 << 20))
    zeros = np.broadcast_to(np.zeros(1, "f4"), 16 << 20)
    pickled = dump({"a": writer.view("0", zeros, 0, (16 << 20,), (1,))})
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/data/0", writer.storages[0], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch(MappedFile(path))


def test_pickle_too_long(tmp_path):
    data = zip_bytes({"m/data.pkl": dump({}) + bytes(MAX_PICKLE)})
    with pytest.raises(CheckpointError, match="more than the limit"):
        open_bytes(tmp_path, data)


def test_big_endian(tmp_path):
    with pytest.raises(CheckpointError, match="byte order"):
        open_bytes(tmp_path, zip_bytes({"m/data.pkl": dump({}), "m/byteorder": b"big"}))


@pytest.mark.parametrize("names", [["a.npy"], ["data.pkl"], ["a/data.pkl", "b/data.pkl"]])
def test_other_archives(tmp_path, names):
    with pytest.raises(CheckpointError, match=r"not one of torch\.save"):
        open_bytes(tmp_path, zip_bytes(dict.fromkeys(names, b"x")))


def test_an_empty_directory(tmp_path):
    entry, directory = zip_bytes({"m/data.pkl": b"x"}), zip_bytes({})
    with pytest.raises(CheckpointError, match=r"it has no <name>/data\.pkl"):
        open_bytes(tmp_path, entry[:41] + directory)  # the entry alone, then no record of it


def test_the_same_name_twice(tmp_path):
    data = plain()
    evil = data.replace(b"model/data/1", b"model/data/0")
    with pytest.raises(CheckpointError, match="same name"):
        open_bytes(tmp_path, evil)


def test_overlapping_entries(tmp_path):
    """Two directory entries of the same bytes, as in zip bombs that quote one kernel many times."""
    data = bytearray(plain())
    with zipfile.ZipFile(save(tmp_path / "a.pt", bytes(data))) as archive:
        offsets = {i.filename: i.header_offset for i in archive.infolist()}
        start = archive.start_dir
    at = data.index(b"model/data/2", start) - 46  # its directory entry: points to data/1 from now
    assert struct.unpack_from("<I", data, at + 42)[0] == offsets["model/data/2"]
    struct.pack_into("<I", data, at + 42, offsets["model/data/1"])
    with pytest.raises(CheckpointError, match="contradicts"):
        open_bytes(tmp_path, bytes(data))


def test_entry_longer_than_the_gap_to_the_next(tmp_path):
    writer = TorchWriter()
    a, b = np.zeros(2, "f4"), np.ones(2, "f4")
    data = writer.archive({"a": writer.tensor(a), "b": writer.tensor(b)})
    data = bytearray(data)
    local = data.index(b"model/data/0") - 30
    central = data.rindex(b"model/data/0") - 46
    struct.pack_into("<II", data, local + 18, 80, 80)
    struct.pack_into("<II", data, central + 20, 80, 80)
    with pytest.raises(CheckpointError, match="contradicts"):
        open_bytes(tmp_path, bytes(data))


def test_corrupt_storage_is_noticed_when_read(tmp_path):
    data = bytearray(plain(x=np.ones(100, "f4"), y=np.ones(100, "f8")))
    data[data.index(np.float32(1).tobytes() * 3) + 30] ^= 1
    file = open_bytes(tmp_path, bytes(data))
    np.testing.assert_array_equal(file.tensors["y"].read(), 1)
    with pytest.raises(CheckpointError, match=r"model\.pt: entry 'model/data/0' is corrupt"):
        file.tensors["x"].read()


def test_no_crc_recorded(tmp_path):
    expected = values(open_bytes(tmp_path, plain()))
    assert values(open_bytes(tmp_path, without_crc(plain()))) == expected


ARCHIVE = plain(a=ARRAYS["a"], b=ARRAYS["b.weight"])
quick = settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))


@quick
@given(cut=st.integers(0, len(ARCHIVE) - 1))
def test_truncated(tmp_path, cut):
    with pytest.raises(CheckpointError):
        open_bytes(tmp_path, ARCHIVE[:cut])


def same_or_refused(tmp_path, data: bytes, *, exact: bool = True) -> None:
    expected = values(open_bytes(tmp_path, ARCHIVE))
    try:
        found = values(open_bytes(tmp_path, data))
    except CheckpointError:
        return
    assert found == expected or not exact


@quick
@given(at=st.integers(0, len(ARCHIVE) - 1), bits=st.integers(1, 255))
def test_any_byte_changed(tmp_path, at, bits):
    data = bytearray(ARCHIVE)
    data[at] ^= bits
    same_or_refused(tmp_path, bytes(data))


@quick
@given(at=st.integers(0, len(ARCHIVE) - 1), bits=st.integers(1, 255))
def test_any_byte_changed_without_crc(tmp_path, at, bits):
    data = bytearray(without_crc(ARCHIVE))
    data[at] ^= bits
    same_or_refused(tmp_path, bytes(data), exact=False)


def test_the_pickle_module_is_not_used():
    assert not hasattr(unpickle_module, "pickle")
    source = Path(unpickle_module.__file__).read_text(encoding="utf-8")
    for word in ("import pickle\n", "importlib", "__import__", "eval(", "exec(", "getattr("):
        assert word not in source
