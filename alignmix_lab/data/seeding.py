"""Reproducible augmentation through timm: the global random generators are seeded per sample and then restored.

timm's transforms and random erasing draw from the global generators of Python, numpy and torch. With a seed from (seed,
epoch, sample), a sample is augmented alike in every run, process and worker, from whichever batch the epoch starts.
"""
import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing


@contextlib.contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the generators of Python, numpy, torch's CPU and `device` on exit."""
    states = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type == 'cpu' else [device]
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else 'cuda'):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seed_generators(*key: int, device: torch.device | None = None) -> None:
    """Seed the generators of Python, numpy, torch's CPU and `device` with a tuple of integers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed() is 100 times slower
    if device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(int(words[2]))


class SeededErasing:
    """timm's random erasing, seeded for each sample with (seed, epoch, number of the sample)."""

    def __init__(self, erasing: RandomErasing, seed: int, device: torch.device):
        self._erasing = erasing
        self._seed = seed
        self._device = device
        self._epoch = 0
        self._numbers: Iterator[int] = iter(())

    def begin(self, epoch: int, numbers: Iterator[int]) -> None:
        """Start an epoch whose samples have these numbers, in this order."""
        self._epoch, self._numbers = epoch, numbers

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Erase in (B, C, H, W) images, in place."""
        with generators_kept(self._device):
            for image in images:
                # 1: draws other than those of the sample's transform
                seed_generators(self._seed, self._epoch, next(self._numbers), 1, device=self._device)
                self._erasing(image)
        return images
