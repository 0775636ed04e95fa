"""npclip.training as a whole, on tiny models; tests/parity compares it with torch."""

import dataclasses
import json
import math
import re
import signal

import numpy as np
import pytest
from kernel_rule import new_rng
from safetensors.numpy import load_file, save_file
from tiny_models import RESNET, VIT, weights

import npclip
from npclip import training
from npclip.config import Metadata, tensor_shapes
from npclip.errors import BackendError, CheckpointError, InputError, TrainingError
from npclip.training import AdamW, Freeze, State, loss_and_gradients, train_step
from npclip.training.optim import decays, global_norm
from npclip.training.step import ENCODERS, draw_patches

pytestmark = pytest.mark.usefixtures("one_blas_thread")
BATCH = 7


def batch(rng, size=BATCH):
    """Images, and texts of different lengths: start, words, end (the largest id), padding."""
    images = rng.standard_normal((size, 3, VIT.image_resolution, VIT.image_resolution))
    ids = np.zeros((size, VIT.context_length), np.int64)
    for row, words in zip(ids, rng.integers(0, VIT.context_length - 1, size), strict=True):
        row[0], row[1 : words + 1], row[words + 1] = 9, rng.integers(0, 9, words), 10
    return images, ids


def params(dtype=np.float64, seed=0):
    """Initialised, and then moved so that no bias is 0 and no gain 1."""
    rng = np.random.default_rng(seed)
    flat = training.initialize(VIT, seed)
    return {k: np.asarray(x + 0.05 * rng.standard_normal(x.shape), dtype) for k, x in flat.items()}


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def run(state, steps, **options):
    """Steps on batches that the state's own generator draws."""
    optimizer = AdamW(steps=10, learning_rate=1e-2, warmup=2, max_norm=1.0)
    return [
        train_step(state, *batch(state.rng), VIT, optimizer, **options).loss for _ in range(steps)
    ]


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_every_parameter_has_a_gradient_of_its_shape():
    _, gradients = loss_and_gradients(params(), *batch(np.random.default_rng(0)), VIT)
    assert {name: g.shape for name, g in gradients.items()} == tensor_shapes(VIT)
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_differences_of_the_loss(dropout):
    rng, start = new_rng(), params()
    data, kept = batch(rng), draw_patches(rng, BATCH, VIT.grid**2, dropout)
    _, gradients = loss_and_gradients(start, *data, VIT, kept=kept)
    direction = {k: rng.standard_normal(x.shape) for k, x in start.items()}

    def loss(step):
        moved = {k: np.asarray(x + step * direction[k]) for k, x in start.items()}
        return loss_and_gradients(moved, *data, VIT, kept=kept)[0].value

    expected = (8 * (loss(1e-4) - loss(-1e-4)) - loss(2e-4) + loss(-2e-4)) / 12e-4
    found = sum(np.sum(gradients[k] * d) for k, d in direction.items())
    assert abs(found - expected) <= 1e-7 * global_norm(gradients) * global_norm(direction)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_micro_batches_give_the_gradient_of_the_batch(micro_batch, dropout):
    rng = new_rng()
    data, kept = batch(rng), draw_patches(rng, BATCH, VIT.grid**2, dropout)
    whole, expected = loss_and_gradients(params(), *data, VIT, kept=kept)
    loss, gradients = loss_and_gradients(params(), *data, VIT, micro_batch, kept=kept)
    assert abs(loss.value - whole.value) <= 1e-12
    assert loss.image_accuracy == whole.image_accuracy
    assert set(gradients) == set(expected)
    errors = {name: relative(gradients[name], gradient) for name, gradient in expected.items()}
    worst = max(errors, key=errors.get)
    print(f"{errors[worst]:.1e}, {worst}")
    assert errors[worst] <= 1e-10, worst


def test_patches_are_drawn_anew_for_each_image():
    kept = draw_patches(new_rng(), 50, 36, 0.5)
    assert kept.shape == (50, 19)
    assert (kept[:, 0] == 0).all() and (np.diff(kept) > 0).all() and kept.max() <= 36
    assert len(np.unique(kept, axis=0)) == 50
    counts = np.bincount(kept.ravel(), minlength=37)[1:]
    assert counts.min() > 5  # each is kept 25 times of 50, on average
    assert draw_patches(new_rng(), 3, 4, 0.99).shape == (3, 2)
    for dropout in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="patch_dropout must be within 0"):
            draw_patches(new_rng(), 3, 4, dropout)


def test_without_dropout_nothing_is_drawn_and_all_patches_are_as_none_dropped():
    rng, data = new_rng(), batch(np.random.default_rng(0))
    before = rng.bit_generator.state
    assert draw_patches(rng, BATCH, VIT.grid**2, 0.0) is None
    assert rng.bit_generator.state == before
    every = np.tile(np.arange(VIT.grid**2 + 1), (BATCH, 1))
    loss, gradients = loss_and_gradients(params(), *data, VIT, kept=every)
    assert loss.value == loss_and_gradients(params(), *data, VIT)[0].value
    some = loss_and_gradients(params(), *data, VIT, kept=every[:, :-1])[1]
    assert not some["visual.positional_embedding"][-1].any()
    assert gradients["visual.positional_embedding"][-1].any()


FROZEN = {
    "image embeddings and a block": Freeze(image=1),
    "all image blocks": Freeze(image=2),
    "the image tower": Freeze(image="all"),
    "the text tower and the temperature": Freeze(text="all", logit_scale=True),
    "all but both projections": Freeze(image=2, text=2),
}
TRAINED = {
    "image embeddings and a block": r"(?!visual)|visual\.(transformer.resblocks.1|ln_post|proj)",
    "all image blocks": r"(?!visual)|visual\.(ln_post|proj)",
    "the image tower": r"(?!visual)",
    "the text tower and the temperature": "visual",
    "all but both projections": r"visual\.(ln_post|proj)|ln_final|text_projection|logit_scale",
}


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("case", FROZEN)
def test_what_is_frozen_keeps_its_bits_and_the_rest_its_gradient(case, micro_batch):
    data, freeze = batch(np.random.default_rng(5)), FROZEN[case]
    _, expected = loss_and_gradients(params(np.float32), *data, VIT, micro_batch)
    _, gradients = loss_and_gradients(params(np.float32), *data, VIT, micro_batch, freeze)
    trained = {name for name in tensor_shapes(VIT) if re.match(TRAINED[case], name)}
    assert_same_bits(gradients, {name: expected[name] for name in trained})
    state = State.start(params(np.float32))
    run(state, 2, freeze=freeze, micro_batch=micro_batch)
    for name, before in params(np.float32).items():
        assert (state.params[name].tobytes() == before.tobytes()) == (name not in trained), name


def test_nothing_is_computed_below_what_is_trained(monkeypatch):
    calls = []
    original = training.step.model.residual_block_backward
    monkeypatch.setattr(
        training.step.model, "residual_block_backward", lambda *a: calls.append(1) or original(*a)
    )
    data = batch(np.random.default_rng(0))
    for freeze, expected in ((Freeze(), 2), (Freeze(image=1), 1), (Freeze("all", "all"), 0)):
        calls.clear()
        loss_and_gradients(params(), *data, VIT, None, freeze)
        assert len(calls) == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 3}, {"patch_dropout": 0.5, "micro_batch": 3}, {"dtype": "bfloat16"}],
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, options):
    unbroken = State.start(params(np.float32), seed=3)
    losses = run(unbroken, 6, **options)
    broken = State.start(params(np.float32), seed=3)
    first = run(broken, 2, **options)
    training.save(broken, tmp_path / "step-2", VIT, Metadata())
    resumed, config, _ = training.restore(tmp_path / "step-2")
    assert (resumed.step, config) == (2, VIT)
    assert first + run(resumed, 4, **options) == losses
    for field in ("params", "m", "v"):
        assert_same_bits(getattr(resumed, field), getattr(unbroken, field))
    assert resumed.rng.bit_generator.state == unbroken.rng.bit_generator.state
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_load_reads_a_checkpoint(tmp_path):
    state, data = State.start(params(np.float32)), batch(np.random.default_rng(0))
    run(state, 1)
    training.save(state, tmp_path / "step-1", VIT, Metadata(mean=(0.1, 0.2, 0.3)))
    model = npclip.load(tmp_path / "step-1", device="cpu")
    assert model.config == VIT and model.metadata.mean == (0.1, 0.2, 0.3)
    nested = training.parameters.nested(state.params, VIT)
    for tower, x in zip(ENCODERS, data, strict=True):
        x = x.astype(np.float32) if tower == "image" else x
        expected = ENCODERS[tower][0](x, nested[tower], VIT)[0]
        found = (model.encode_image if tower == "image" else model.encode_text)(x)
        assert relative(found, expected) < 1e-5
    assert model.logit_scale == state.params["logit_scale"]


def test_training_starts_from_any_checkpoint(tmp_path):
    tensors = weights(VIT, "float16")
    save_file(tensors, tmp_path / "half.safetensors", Metadata("gelu").to_strings())
    flat, config, metadata = training.from_checkpoint(tmp_path / "half.safetensors")
    assert config.activation == metadata.activation == "gelu"
    assert_same_bits(flat, {k: x.astype(np.float32) for k, x in tensors.items()})
    save_file(weights(RESNET), tmp_path / "resnet.safetensors", Metadata("gelu").to_strings())
    with pytest.raises(InputError, match="ResNet"):
        training.from_checkpoint(tmp_path / "resnet.safetensors")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"dtype": "float16"}])
def test_a_nan_stops_before_anything_is_changed(options):
    state = State.start(params(np.float32))
    run(state, 1)
    before = [{k: x.copy() for k, x in part.items()} for part in (state.params, state.m, state.v)]
    images, ids = batch(np.random.default_rng(0))
    images[3, 1, 2, 5] = math.nan
    with pytest.raises(TrainingError, match="the loss is nan"):
        train_step(state, images, ids, VIT, AdamW(steps=9), **options)
    assert state.step == 1
    for part, expected in zip((state.params, state.m, state.v), before, strict=True):
        assert_same_bits(part, expected)


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    encode, backward = ENCODERS["text"]

    def broken(*arguments):
        gradients = backward(*arguments)
        gradients["resblocks"][1]["mlp"]["c_fc"]["bias"][3] = math.inf
        return gradients

    monkeypatch.setitem(ENCODERS, "text", (encode, broken))
    state = State.start(params(np.float32))
    with pytest.raises(TrainingError, match=r"ent of .*blocks\.1\.mlp\.c_fc\.bias is NaN or inf"):
        run(state, 1)
    assert_same_bits(state.params, params(np.float32))


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_storage_in_16_bits_gives_nearly_the_same_gradient(dtype, bound):
    data, start = batch(np.random.default_rng(0)), params(np.float32)
    _, expected = loss_and_gradients(start, *data, VIT)
    _, gradients = loss_and_gradients(start, *data, VIT, 3, Freeze(), dtype, 1024.0)
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float32
        assert 0 < relative(gradient / 1024, expected[name]) < bound, name


def test_the_loss_scale_of_float16_falls_until_gradients_are_finite_and_rises_again(monkeypatch):
    state = State.start(params(np.float32))
    state.loss_scale = 2.0**40
    (loss,) = run(state, 1, dtype="float16")
    assert math.isfinite(loss) and state.step == 1
    assert all(np.isfinite(x).all() for x in state.params.values())
    assert 1 < state.loss_scale < 2.0**40
    found, state.loss_scale = state.loss_scale, 2.0**10
    monkeypatch.setattr(training.step, "GROWTH_STEPS", 3)
    run(state, 2, dtype="float16")
    assert found > 2.0**10 and state.loss_scale == 2.0**11


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_float32_gives_the_gradient_on_any_number_of_threads(activation):
    config = dataclasses.replace(VIT, activation=activation)
    data, chosen = batch(np.random.default_rng(1)), npclip.get_num_threads()
    _, expected = loss_and_gradients(params(), *data, config)
    found = []
    try:
        for count in (1, 3):
            npclip.set_num_threads(count)
            found.append(loss_and_gradients(params(np.float32), *data, config)[1])
    finally:
        npclip.set_num_threads(chosen)
    assert_same_bits(*found)
    for name, gradient in expected.items():
        assert relative(found[0][name], gradient) <= 2e-5, name


def test_a_batch_can_be_learnt():
    state, data = State.start(training.initialize(VIT)), batch(np.random.default_rng(0))
    assert len(np.unique(data[1], axis=0)) == BATCH
    optimizer = AdamW(steps=40, learning_rate=3e-3, warmup=5)
    steps = [train_step(state, *data, VIT, optimizer) for _ in range(40)]
    assert steps[0].loss > 1
    assert steps[-1].loss < 0.1
    assert steps[-1].image_accuracy == steps[-1].text_accuracy == 1


def test_the_temperature_stops_at_100():
    state, data = State.start(params(np.float32)), batch(np.random.default_rng(1))
    state.params["logit_scale"][...] = math.log(100) + 0.5
    step = train_step(state, *data, VIT, AdamW(steps=2))
    assert step.logit_scale == pytest.approx(100, rel=1e-6)
    assert state.params["logit_scale"] == np.float32(math.log(100))
    state.params["logit_scale"][...] = 5
    train_step(state, *data, VIT, AdamW(steps=2), freeze=Freeze(logit_scale=True))
    assert state.params["logit_scale"] == 5


def test_adamw_is_its_formula():
    optimizer = AdamW(10, 0.1, 0, 0.3, (0.8, 0.9), 1e-3)
    state = State.start({"w": np.array([[2.0]]), "logit_scale": np.array(3.0)})
    p, m, v = 2.0, 0.0, 0.0
    for step, g in enumerate((0.5, -1.0, 4.0)):
        gradients = {"w": np.array([[2 * g]]), "logit_scale": np.array(0.0)}
        optimizer.update(state.params, gradients, state.m, state.v, step, factor=0.5)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 10))
        p -= rate * 0.3 * p
        p -= rate * m / (1 - 0.8 ** (step + 1)) / (math.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3)
    assert state.params["w"][0, 0] == pytest.approx(p, rel=1e-14)
    assert state.params["logit_scale"] == 3  # no gradient, no decay


def test_with_and_without_kernels_an_update_has_the_same_bits(monkeypatch):
    rng = new_rng()
    shapes = {"w": (5, 40_000), "t": (7, 3), "logit_scale": ()}  # w is updated in blocks
    start, gradients = (
        {k: np.asarray(rng.standard_normal(shape), np.float32) for k, shape in shapes.items()}
        for _ in range(2)
    )
    start["t"], gradients["t"] = np.asfortranarray(start["t"]), gradients["t"][:, ::-1]
    norms, states = [], [State.start(start), State.start(start)]
    for state in states:
        for step in range(3):
            state_of = state.params, gradients, state.m, state.v
            AdamW(10, 0.1, max_norm=1.0).update(*state_of, step, factor=0.3)
        norms.append(global_norm(gradients))
        monkeypatch.setattr(training.ops, "_kernels", lambda: None)  # for the second
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    for name in ("params", "m", "v"):
        assert_same_bits(*(getattr(state, name) for state in states))
    assert all((states[0].params[name] != start[name]).all() for name in shapes)


def test_the_schedule_rises_and_falls():
    optimizer = AdamW(steps=100, learning_rate=2.0, warmup=10)
    rates = [optimizer.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2
    assert rates[55] == pytest.approx(1) and rates[100] == 0
    assert (np.diff(rates[10:]) < 0).all()


def test_weight_decay_is_for_matrices_and_embeddings_of_tokens_and_positions():
    kept = {name for name, x in params().items() if not decays(name, x)}
    assert all(x.ndim < 2 for name, x in params().items() if name in kept)
    assert {name for name, x in params().items() if x.ndim < 2} == kept
    assert {"logit_scale", "visual.class_embedding", "ln_final.weight"} <= kept
    assert not {"positional_embedding", "token_embedding.weight", "visual.proj"} & kept


def test_clipping_is_by_the_norm_of_all_gradients():
    gradients = {"a": np.full((2, 2), 3.0), "b": np.array(8.0)}
    assert global_norm(gradients) == 10
    assert AdamW(1, max_norm=5).clip_factor(10) == pytest.approx(0.5)
    assert AdamW(1, max_norm=50).clip_factor(10) == AdamW(1).clip_factor(10) == 1
    assert math.isnan(global_norm(gradients | {"c": np.array([1, math.inf])}))


def test_initialize_draws_what_it_says():
    config = dataclasses.replace(VIT, vision_width=256, vision_mlp=1024, context_length=77)
    config = dataclasses.replace(config, transformer_width=256, transformer_mlp=1024, embed_dim=128)
    flat = training.initialize(config, 1)
    assert {name: x.shape for name, x in flat.items()} == tensor_shapes(config)
    assert {x.dtype for x in flat.values()} == {np.dtype(np.float32)}
    assert flat["logit_scale"] == np.float32(math.log(1 / 0.07))
    width, third = 256**-0.5, 3**-0.5
    deviations = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width,
        "visual.proj": width,
        "visual.positional_embedding": width,
        "visual.conv1.weight": third * (3 * 8 * 8) ** -0.5,
        "transformer.resblocks.0.attn.in_proj_weight": width,
        "transformer.resblocks.1.attn.out_proj.weight": width / 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 512**-0.5,
        "transformer.resblocks.1.mlp.c_proj.weight": width / 2,
        "transformer.resblocks.0.mlp.c_fc.bias": third * width,
        "visual.transformer.resblocks.0.attn.in_proj_weight": third * (6 / 1024) ** 0.5,
        "visual.transformer.resblocks.0.attn.out_proj.weight": third * width,
        "visual.transformer.resblocks.1.mlp.c_proj.weight": third / 32,
        "visual.transformer.resblocks.1.mlp.c_proj.bias": third / 32,
    }
    for name, deviation in deviations.items():
        assert flat[name].std() == pytest.approx(deviation, rel=5 / flat[name].size ** 0.5), name
    for name in ("ln_final", "visual.ln_pre", "transformer.resblocks.1.ln_1"):
        assert (flat[f"{name}.weight"] == 1).all() and (flat[f"{name}.bias"] == 0).all()
    assert_same_bits(training.initialize(config, 1), flat)
    assert (training.initialize(config, 2)["visual.proj"] != flat["visual.proj"]).any()


def call(**changes):
    images, ids = batch(np.random.default_rng(0))
    arguments = {"images": images, "ids": ids, "config": VIT, **changes}
    return loss_and_gradients(params(), **arguments)


BAD = {
    "ResNet": lambda: call(config=RESNET),
    "both towers": lambda: call(config=dataclasses.replace(VIT, transformer_width=0)),
    "images": lambda: call(images=np.zeros((7, 3, 8, 8))),
    r"ids .*\(6, 7\)": lambda: call(ids=np.zeros((6, 7), np.int64)),
    "ids float": lambda: call(ids=np.zeros((7, 7))),
    r"ids int64 \(0": lambda: call(images=np.zeros((0, 3, 16, 16)), ids=np.zeros((0, 7), int)),
    "embed_tokens: ids": lambda: call(ids=np.full((7, 7), 11)),
    "micro_batch": lambda: call(micro_batch=0),
    "Freeze: image=3": lambda: call(freeze=Freeze(image=3)),
    "Freeze: text='most'": lambda: call(freeze=Freeze(text="most")),
    "dtype 'int8'": lambda: call(dtype="int8"),
    "steps": lambda: AdamW(steps=0),
    "warmup": lambda: AdamW(steps=1, warmup=2),
    "learning_rate": lambda: AdamW(1, learning_rate=math.nan),
    "weight_decay": lambda: AdamW(1, weight_decay=-1),
    "betas": lambda: AdamW(1, betas=(0.9, 1.0)),
    "eps": lambda: AdamW(1, eps=0),
    "max_norm": lambda: AdamW(1, max_norm=0),
    "do not pair": lambda: training.contrastive(np.ones((2, 3)), np.ones((3, 3)), np.array(1.0)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_trained_is_an_error(message):
    with pytest.raises(InputError, match=message):
        BAD[message]()


def test_a_missing_gpu_is_an_error():
    with pytest.raises(BackendError):
        State.start(params()).to("cuda")


def test_to_the_host_changes_nothing():
    state = State.start(params())
    assert_same_bits(state.to("cpu").params, state.params)


def test_save_replaces_nothing_and_refuses_nan(tmp_path):
    state = State.start(params(np.float32))
    training.save(state, tmp_path / "a", VIT, Metadata())
    with pytest.raises(TrainingError, match="exists"):
        training.save(state, tmp_path / "a", VIT, Metadata())
    state.params["ln_final.bias"][0] = math.nan
    with pytest.raises(TrainingError, match=r"ln_final\.bias"):
        training.save(state, tmp_path / "b", VIT, Metadata())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    """As on a full disk: files may have 50,000 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            training.save(State.start(params(np.float32)), tmp_path / "a", VIT, Metadata())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_the_order_of_arrays_in_memory_changes_nothing(tmp_path):
    start = {k: np.array(x, order="F") for k, x in params(np.float32).items()}
    state = State.start(start)
    for arrays in (state.params, state.m, state.v):
        assert all(x.flags.c_contiguous for x in arrays.values())
    training.save(state, tmp_path / "a", VIT, Metadata())
    state.params = start
    training.save(state, tmp_path / "b", VIT, Metadata())
    for file in ("model.safetensors", "training.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert_same_bits(training.restore(tmp_path / "b")[0].params, params(np.float32))


def damage(folder, what):
    file = folder / "training.safetensors"
    tensors, state = load_file(file), json.dumps({"step": 1, "rng": "dice"})
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif what == "moment":
        del tensors["m/ln_final.bias"]
        save_file(tensors, file, {"state": state})
    elif what == "state":
        save_file(tensors, file, {"state": state})
    else:
        file.unlink()


@pytest.mark.parametrize("what", ["cut", "moment", "state", "missing"])
def test_a_broken_checkpoint_is_an_error_that_names_it(tmp_path, what):
    training.save(State.start(params(np.float32)), tmp_path / "a", VIT, Metadata())
    damage(tmp_path / "a", what)
    with pytest.raises((CheckpointError, TrainingError), match=r"a\b.*training\.safetensors"):
        training.restore(tmp_path / "a")
