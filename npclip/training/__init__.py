"""Contrastive language-image pre-training on NumPy and CuPy: gradients written by hand.

    params = initialize(config, seed=0)              # or, from_checkpoint("ViT-B/32")
    state, optimizer = State.start(params), AdamW(steps=1000, warmup=100)
    step = train_step(state, images, ids, config, optimizer, micro_batch=64)
    save(state, "run/step-1", config, Metadata())    # npclip.load("run/step-1") reads it

Start at model.py: it is npclip/model.py with its backward. kernels/reference_backward.py specifies
each op's.
"""

from ..config import Config, Metadata
from ..errors import TrainingError
from .initialize import initialize
from .loss import Loss, contrastive
from .optim import AdamW
from .parameters import Freeze, from_checkpoint
from .state import State, restore, save
from .step import Step, loss_and_gradients, train_step

__all__ = [
    "AdamW",
    "Config",
    "Freeze",
    "Loss",
    "Metadata",
    "State",
    "Step",
    "TrainingError",
    "contrastive",
    "from_checkpoint",
    "initialize",
    "loss_and_gradients",
    "restore",
    "save",
    "train_step",
]
