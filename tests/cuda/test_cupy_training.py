"""npclip.training on the fake CuPy, which copies nothing implicitly: the gradients of the host."""

import sys
from pathlib import Path

import numpy as np
import pytest
from cuda import fake_cupy
from cuda.test_cupy_device import xp  # noqa: F401 - a fixture
from test_training import BATCH, assert_same_bits, batch, params, relative
from tiny_models import VIT

from npclip import cuda_device, training
from npclip.config import Metadata
from npclip.training import AdamW, Freeze, State, loss_and_gradients, train_step
from npclip.training.run import run
from npclip.training.settings import read_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from draw_shapes import write_all  # noqa: E402


@pytest.fixture
def old_gpu(monkeypatch):
    """Two GPUs without kernels of ours: CuPy computes all."""
    module = fake_cupy.module([(7, 0), (7, 0)])
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(cuda_device, "_devices", {})
    cuda_device.cupy.cache_clear()
    yield module
    cuda_device.cupy.cache_clear()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_step_on_a_gpu_is_that_of_the_host(old_gpu, device):
    data, optimizer = batch(np.random.default_rng(0)), AdamW(steps=9, max_norm=0.1)
    states = State.start(params()), State.start(params()).to(device)
    steps = [train_step(state, *data, VIT, optimizer, micro_batch=3) for state in states]
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=1e-12)
    assert steps[1].image_accuracy == steps[0].image_accuracy
    back = states[1].to("cpu")
    for name, expected in states[0].params.items():
        assert states[1].params[name].device.id == int(device[-1] == "1")
        assert relative(back.params[name], expected) < 1e-10, name


def test_a_state_on_a_gpu_is_saved_as_on_the_host(old_gpu, tmp_path):
    state = State.start(params(np.float32))
    training.save(state.to("cuda"), tmp_path / "a", VIT, Metadata())
    assert_same_bits(training.restore(tmp_path / "a")[0].params, state.params)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 1e-1)]
)
def test_gradients_with_the_kernels_are_those_of_the_host(xp, dtype, bound):  # noqa: F811
    images, ids = batch(np.random.default_rng(0))
    data = images.astype(np.float32), ids
    state = State.start(params(np.float32))
    _, expected = loss_and_gradients(state.params, *data, VIT)
    on_gpu = state.to("cuda").params
    _, gradients = loss_and_gradients(on_gpu, *data, VIT, BATCH - 2, Freeze(), dtype, 64.0)
    symbols = {launch.symbol.split("_f")[0] for launch in xp.gpus.launches}
    assert {"attention_pool", "layer_norm", "patchify"} <= {s.split("_bf")[0] for s in symbols}
    for name, gradient in gradients.items():
        assert relative(gradient.get() / 64, expected[name]) < bound, name


def test_a_run_on_a_gpu_goes_on_and_is_evaluated(old_gpu, tmp_path):
    write_all(tmp_path, train=16, validation=8, classes=1)
    text = (ROOT / "examples" / "train_shapes.toml").read_text()
    (tmp_path / "train.toml").write_text(text.replace('"shapes/', f'"{tmp_path.as_posix()}/'))
    changes = [f"output.folder={tmp_path.as_posix()}/run", "train.warmup=0", "train.batch=8"]
    changes += ["model.transformer_width=16", "train.device=cuda", "output.save_every=1"]
    found = [
        run(read_settings(tmp_path / "train.toml", [*changes, f"train.steps={steps}"]), resume=True)
        for steps in (1, 2)
    ]
    assert [result.step for result in found] == [1, 2]
    assert {"loss", "text_to_image@1", "zero_shot@1"} <= set(found[1].evaluation)
    state, *_ = training.restore(found[1].checkpoint)
    assert state.step == 2 and np.isfinite(state.params["visual.proj"]).all()
