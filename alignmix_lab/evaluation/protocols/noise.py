"""Random numbers per image, independent of batch, process and device."""
from collections.abc import Callable, Iterable

import numpy as np
import torch


def image_noise(
        draw: Callable[..., torch.Tensor], shape: tuple[int, ...], indices: Iterable[int], *key: int) -> torch.Tensor:
    """Draw noise (B, C, H, W) float32 on the CPU, for each image seeded by its position in the dataset.

    `draw` is `torch.rand` or `torch.randn`, `shape` that of one image, and the key the seed of the run and anything
    else that distinguishes draws.
    """
    noise = []
    for index in indices:
        state = np.random.SeedSequence((*key, int(index))).generate_state(1, np.uint64)[0]
        noise.append(draw(shape, generator=torch.Generator().manual_seed(int(state) >> 1)))
    return torch.stack(noise)
