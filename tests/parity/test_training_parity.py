"""npclip.training against torch autograd and torch.optim on openai/CLIP's own model.py."""

import dataclasses
import math

import numpy as np
import pytest
from kernel_rule import new_rng

from npclip.config import Config
from npclip.training import AdamW, State, initialize, loss_and_gradients, train_step

CONFIG = Config(
    embed_dim=48,
    image_resolution=24,
    vision_layers=3,
    vision_width=128,
    vision_patch_size=8,
    vision_heads=2,
    vision_mlp=512,
    context_length=16,
    vocab_size=50,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=3,
    transformer_mlp=256,
)
BATCH, STEPS, BATCHES = 12, 100, 20
TRAJECTORIES = [(np.float32, None, 1e-4), (np.float64, 5, 1e-9)]
BOUNDS = {np.float64: 1e-10, np.float32: 1e-3}  # of a gradient's relative error


def batch(rng, size=BATCH):
    images = rng.standard_normal((size, 3, 24, 24))
    ids = np.zeros((size, 16), np.int64)
    for row, words in zip(ids, rng.integers(0, 15, size), strict=True):
        row[0], row[1 : words + 1], row[words + 1] = 48, rng.integers(0, 48, words), 49
    return images, ids


def perturbed(dtype):
    """Initialised, and moved so that no bias is 0 and no gain 1."""
    rng, params = np.random.default_rng(0), initialize(CONFIG, 0)
    return {
        k: np.asarray(x + 0.02 * rng.standard_normal(x.shape), dtype) for k, x in params.items()
    }


@pytest.fixture(autouse=True)
def one_thread(one_blas_thread):
    """Threads of torch that wait for work would take the cores from NumPy's."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_model(openai_clip, monkeypatch):
    """Makes openai/CLIP's model with these parameters, in their dtype."""
    import torch

    model = openai_clip.model
    # its own casts to float32
    monkeypatch.setattr(model.LayerNorm, "forward", torch.nn.LayerNorm.forward)
    c = CONFIG
    vision = c.embed_dim, c.image_resolution, c.vision_layers, c.vision_width, c.vision_patch_size
    text = c.context_length, c.vocab_size, c.transformer_width
    sizes = (*vision, *text, c.transformer_heads, c.transformer_layers)

    def make(params):
        clip = model.CLIP(*sizes)
        if params is not None:
            dtype = torch.from_numpy(params["ln_final.bias"]).dtype
            clip = clip.to(dtype)
            clip.load_state_dict({k: torch.from_numpy(x.copy()) for k, x in params.items()})
        return clip

    return make


def torch_loss(model, images, ids):
    import torch
    from torch.nn.functional import cross_entropy

    pixels = torch.from_numpy(images).to(model.logit_scale.dtype)
    by_image, by_text = model(pixels, torch.from_numpy(ids))
    own = torch.arange(len(images))
    return (cross_entropy(by_image, own) + cross_entropy(by_text, own)) / 2


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_every_gradient_is_autograds(torch_model, dtype, micro_batch, activation):
    import torch

    data, params = batch(new_rng()), perturbed(dtype)
    model = torch_model(params)
    if activation == "gelu":
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            block.mlp.gelu = torch.nn.GELU()
    expected = torch_loss(model, *data)
    expected.backward()
    config = dataclasses.replace(CONFIG, activation=activation)
    loss, gradients = loss_and_gradients(params, *data, config, micro_batch)
    assert loss.value == pytest.approx(expected.item(), rel=BOUNDS[dtype] / 100)
    wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert set(gradients) == set(wanted)
    errors = {
        name: float(np.linalg.norm(gradients[name] - g) / np.linalg.norm(g))
        for name, g in wanted.items()
    }
    worst = max(errors, key=errors.get)
    print(f"{np.dtype(dtype)}: {errors[worst]:.1e}, {worst}")
    assert errors[worst] <= BOUNDS[dtype], (worst, errors[worst])


def torch_losses(model, batches, optimizer):
    """Training as in open_clip, with the schedule, clipping and decay that `optimizer` says."""
    import torch

    named = list(model.named_parameters())
    no_decay = ("bn", "ln", "bias", "logit_scale")
    plain = [p for n, p in named if p.ndim < 2 or any(part in n for part in no_decay)]
    decayed = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in no_decay)]
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": optimizer.weight_decay},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=optimizer.betas, eps=optimizer.eps)
    losses = []
    for step, data in enumerate(batches):
        for group in adam.param_groups:
            if step < optimizer.warmup:
                group["lr"] = optimizer.learning_rate * (step + 1) / optimizer.warmup
            else:
                done = (step - optimizer.warmup) / (optimizer.steps - optimizer.warmup)
                group["lr"] = optimizer.learning_rate * (1 + math.cos(math.pi * done)) / 2
        adam.zero_grad()
        loss = torch_loss(model, *data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_norm)
        adam.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize(("dtype", "micro_batch", "bound"), TRAJECTORIES)
def test_the_first_100_steps_follow_torch(torch_model, dtype, micro_batch, bound):
    """Batches come again, so that the loss falls."""
    rng = np.random.default_rng(0)
    params = {k: x.astype(dtype) for k, x in initialize(CONFIG, 0).items()}
    batches = [batch(rng) for _ in range(BATCHES)] * (STEPS // BATCHES)
    optimizer = AdamW(steps=STEPS, learning_rate=3e-4, warmup=10, max_norm=1.0)
    expected = torch_losses(torch_model(params), batches, optimizer)
    state = State.start(params)
    steps = [
        train_step(state, *data, CONFIG, optimizer, micro_batch=micro_batch) for data in batches
    ]
    losses = np.array([step.loss for step in steps])
    errors = np.abs(losses / expected - 1)
    print(f"loss {expected[0]:.3f} .. {expected[-1]:.3f}, relative error {errors.max():.1e}")
    assert 0.01 < expected[-1] < expected[0] / 2
    assert errors.max() <= bound


def test_initialize_draws_as_openai_clip(torch_model):
    """Means and deviations of every parameter, over all that has its name in any block."""
    import torch

    torch.manual_seed(0)
    theirs = {k: p.detach().numpy() for k, p in torch_model(None).named_parameters()}
    ours = initialize(CONFIG, 0)
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    for name, expected in theirs.items():
        found, size = ours[name], expected.size
        if expected.std() < 1e-6:
            np.testing.assert_array_equal(found, expected)
            continue
        spread = expected.std() * 6 / size**0.5
        assert abs(found.mean() - expected.mean()) < 1.5 * spread, name
        assert abs(found.std() - expected.std()) < 1.5 * spread, name
