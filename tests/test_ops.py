"""ops.py checks what it is given, in words that name the op and the shapes."""

import inspect

import numpy as np
import pytest

from npclip import ops
from npclip.errors import BackendError, InputError
from npclip.kernels import reference


def zeros(*shape):
    return np.zeros(shape, np.float32)


SEQS = np.array([0, 2, 5], np.int32)

BAD_CALLS = {
    "linear: x [5, 3] and weight [4, 2]": lambda: ops.linear(zeros(5, 3), zeros(4, 2)),
    "linear: bias": lambda: ops.linear(zeros(5, 3), zeros(4, 3), zeros(3)),
    "linear: residual": lambda: ops.linear(zeros(5, 3), zeros(4, 3), residual=zeros(5, 3)),
    "linear: activation": lambda: ops.linear(zeros(5, 3), zeros(4, 3), activation="tanh"),
    "attention: width": lambda: ops.attention(zeros(5, 20), SEQS, 2),
    "attention: rank": lambda: ops.attention(zeros(5, 3, 4), SEQS, 2),
    "attention: seqlens end": lambda: ops.attention(zeros(6, 12), SEQS, 2),
    "attention: seqlens start": lambda: ops.attention(zeros(4, 12), SEQS[1:], 2),
    "attention: empty sequence": lambda: ops.attention(zeros(5, 12), np.array([0, 5, 5]), 2),
    "attention_pool: q": lambda: ops.attention_pool(zeros(3, 4), zeros(5, 8), SEQS, 2),
    "attention_pool: kv": lambda: ops.attention_pool(zeros(2, 4), zeros(5, 4), SEQS, 2),
    "layer_norm": lambda: ops.layer_norm(zeros(5, 4), zeros(3), zeros(3)),
    "add_layer_norm": lambda: ops.add_layer_norm(zeros(5, 4), zeros(4, 4), zeros(4), zeros(4)),
    "patchify": lambda: ops.patchify(zeros(1, 3, 8, 9), 4),
    "embed_patches: rows": lambda: ops.embed_patches(
        zeros(7, 4), zeros(4), zeros(5, 4), *2 * [zeros(4)]
    ),
    "embed_patches: class": lambda: ops.embed_patches(
        zeros(8, 4), zeros(3), zeros(5, 4), *2 * [zeros(4)]
    ),
    "embed_patches: gain": lambda: ops.embed_patches(
        zeros(8, 4), zeros(4), zeros(5, 4), zeros(3), zeros(4)
    ),
    "embed_tokens: ids": lambda: ops.embed_tokens(
        np.array([3]), np.array([0]), zeros(3, 2), zeros(3, 2)
    ),
    "embed_tokens: positions": lambda: ops.embed_tokens(
        np.array([0]), np.array([-1]), zeros(3, 2), zeros(3, 2)
    ),
    "conv2d": lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(2, 3, 3, 4)),
    "conv2d: bias": lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(2, 3, 3, 3), zeros(3)),
    "conv2d: residual": lambda: ops.conv2d(
        zeros(1, 4, 4, 3), zeros(2, 3, 3, 3), stride=2, residual=zeros(1, 4, 4, 2)
    ),
    "conv2d: activation": lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(2, 3, 3, 3), activation="x"),
    "avg_pool2d": lambda: ops.avg_pool2d(zeros(1, 4, 5, 3), 2),
    "similarity": lambda: ops.similarity(zeros(2, 3), zeros(5, 4)),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_misfits_are_errors_that_name_the_op(call, request):
    op = request.node.callspec.id.split(":")[0]
    with pytest.raises(InputError, match=f"^{op}: "):
        call()


def test_a_misfit_names_both_shapes():
    with pytest.raises(InputError, match=r"x \[100, 768\], weight \[2048, 512\]"):
        ops.linear(zeros(100, 768), zeros(2048, 512))


def test_every_op_has_the_signature_of_its_reference():
    shared = [n for n, f in inspect.getmembers(ops, inspect.isfunction) if hasattr(reference, n)]
    assert len(shared) >= 11
    for name in shared:
        wanted = list(inspect.signature(getattr(reference, name)).parameters)
        found = list(inspect.signature(getattr(ops, name)).parameters)
        assert found == [p for p in wanted if p != "eps"], name


def test_pack_tokens_keeps_each_row_up_to_its_first_largest_id():
    ids = np.array([[8, 1, 9, 0, 0], [8, 9, 3, 9, 0], [8, 1, 2, 3, 9]])
    tokens, positions, seqs, last = ops.pack_tokens(ids)
    assert last.tolist() == (seqs[1:] - 1).tolist()
    assert tokens.tolist() == [8, 1, 9, 8, 9, 8, 1, 2, 3, 9]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert seqs.tolist() == [0, 3, 5, 10]
    assert seqs.dtype == np.int32


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "tpu"])
def test_a_device_that_is_missing_is_an_error(device):
    with pytest.raises(BackendError, match=device):
        ops.resolve(device)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half"])
def test_a_dtype_that_is_missing_is_an_error(dtype):
    with pytest.raises(BackendError, match=dtype):
        ops.resolve("cpu", dtype)


@pytest.mark.parametrize("dtype", [None, "float32", np.float32, np.dtype("float32")])
def test_float32_on_the_cpu(dtype):
    assert ops.resolve(None, dtype) == ("cpu", "float32")


def test_other_dtypes_on_the_cpu():
    assert ops.resolve("cpu", np.float16) == ("cpu", "float16")
    assert ops.resolve("cpu", "bfloat16") == ("cpu", "bfloat16")
