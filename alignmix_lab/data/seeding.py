"""Global generators seeded for one sample and left as they were, which is what makes timm's augmentation repeat.

timm's transforms and its random erasing draw from Python's, numpy's and torch's global generators. Seeded by (seed,
epoch, sample), a sample is augmented alike in every run, process and worker, wherever the epoch was entered.
"""
import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing


@contextlib.contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore Python's, numpy's and torch's CPU generators afterwards, and that of `device`."""
    states = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type == 'cpu' else [device]
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else 'cuda'):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seed_generators(*key: int, device: torch.device | None = None) -> None:
    """Seed Python's, numpy's and torch's CPU generators, and that of `device`, by a tuple of integers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed() takes 100 times longer
    if device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(int(words[2]))


class SeededErasing:
    """timm's random erasing of batches, drawn for each sample from (seed, epoch, number of the sample).

    Args:
        erasing: timm's operation.
        seed: Seed of the run.
        device: Where the batches are.
    """

    def __init__(self, erasing: RandomErasing, seed: int, device: torch.device):
        self._erasing = erasing
        self._seed = seed
        self._device = device
        self._epoch = 0
        self._numbers: Iterator[int] = iter(())

    def begin(self, epoch: int, numbers: Iterator[int]) -> None:
        """Start an epoch: the batches that follow hold the samples of these numbers, in this order."""
        self._epoch = epoch
        self._numbers = numbers

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Erase in (B, C, H, W) images, in place."""
        with generators_kept(self._device):
            for image in images:
                # 1: not the draws that the sample's transform started with
                seed_generators(self._seed, self._epoch, next(self._numbers), 1, device=self._device)
                self._erasing(image)
        return images
