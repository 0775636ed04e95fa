"""Batches of training, the same in every run: what a sample becomes depends on the seed, the epoch
and its number alone, not on threads, nor on where a run began.

The order of an epoch is a pseudo-random permutation that is computed, not stored, so that any step
is reached at once, and no number of pairs takes memory. The pairs that do not fill a last batch are
left out of an epoch; other ones in each. A pair whose image cannot be read or decoded is left out
of its batch, which is then smaller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import threads
from ..config import Config, Metadata
from ..errors import InputError, NpclipError, TrainingError
from ..preprocess import load_image, normalized
from ..tokenizer import tokenize
from .augment import Augmentation
from .index import Index, Record

Sample: TypeAlias = "tuple[NDArray[np.uint8], NDArray[np.int32]]"  # [R, R, 3], [L]
ROUNDS = 6  # of a Feistel network; 4 are enough for one that cannot be told from chance
BATCHES_AHEAD = 2  # that are decoded before they are asked for


@dataclass(frozen=True)
class Batch:
    """What one step is made on."""

    images: NDArray[np.float32]  # [B, 3, R, R]
    ids: NDArray[np.int32]  # [B, L]
    failed: list[tuple[Record, str]]  # what was left out, and why


class Loader:
    """The batches of all steps."""

    def __init__(
        self,
        index: Index,
        config: Config,
        metadata: Metadata,
        augmentation: Augmentation,
        batch: int,
        seed: int = 0,
        workers: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """augmentation: from a decoded image and its text to pixels, see augment.augment; what it
        draws is to come from the generator that it is given. workers: threads; by default as many
        as the CPU's kernels use.

        Raises InputError where the pairs do not fill a batch.
        """
        if len(index) < batch:
            raise InputError(f"{len(index)} pairs do not fill a batch of {batch}")
        self.index, self.config, self.metadata = index, config, metadata
        self.augmentation, self.batch, self.seed = augmentation, batch, seed
        self.workers = workers or threads.get_num_threads()
        self.max_pixels = max_pixels

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of all pairs."""
        return len(self.index) // self.batch

    def numbers(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step, and which pairs it is made on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        positions = np.arange(place * self.batch, (place + 1) * self.batch)
        return epoch, shuffled(positions, len(self.index), [self.seed, epoch])

    def sample(self, epoch: int, number: int) -> Sample | tuple[Record, str]:
        """A pair as it is in an epoch, or why it is none."""
        record = self.index[number]
        rng = np.random.default_rng([self.seed, epoch, number])
        text = record.texts[rng.integers(len(record.texts))]
        try:
            image = load_image(self.index.read(record), self.max_pixels)
            levels = self.augmentation(image, text, self.config.image_resolution, rng)
        except NpclipError as error:
            return record, str(error)
        length, vocab = self.config.context_length, self.config.vocab_size
        return levels, tokenize([text], length, truncate=True, vocab_size=vocab)[0]

    def batches(self, first: int) -> Generator[Batch, None, None]:
        """Of the steps first, first + 1, ..., without end; threads are BATCHES_AHEAD.

        Raises TrainingError where no pair of a batch can be read.
        """
        with closing(self._samples(first)) as samples:
            while True:
                found: list[Sample] = []
                failed: list[tuple[Record, str]] = []
                for sample in islice(samples, self.batch):
                    if isinstance(sample[0], Record):
                        failed.append(sample)
                    else:
                        found.append(sample)
                if not found:
                    record, reason = failed[0]
                    raise TrainingError(
                        f"none of {self.batch} images can be read, the first of them "
                        f"{record.id}: {reason}"
                    )
                levels, ids = zip(*found, strict=True)
                metadata = self.metadata
                images = normalized(np.stack(levels), metadata.mean, metadata.std)
                yield Batch(images, np.stack(ids), failed)

    def _samples(self, first: int) -> Generator[Sample | tuple[Record, str], None, None]:
        def numbers() -> Iterator[tuple[int, int]]:
            step = first
            while True:
                epoch, chosen = self.numbers(step)
                yield from ((epoch, number) for number in chosen.tolist())
                step += 1

        pool = ThreadPoolExecutor(self.workers)
        try:
            running: deque[Future[Sample | tuple[Record, str]]] = deque()
            for epoch, number in numbers():
                running.append(pool.submit(self.sample, epoch, number))
                if len(running) > BATCHES_AHEAD * self.batch:
                    yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def shuffled(positions: NDArray[np.int64], count: int, seed: list[int]) -> NDArray[np.int64]:
    """Which of `count` things stand at these positions of their order: a permutation of
    range(count), another one for each seed.

    A Feistel network permutes the numbers of an even number of bits; one that leaves the range is
    permuted again, until it is back (Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    x = positions.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        x[outside] = left << half | right
        outside = x >= np.uint64(count)
    return x.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
