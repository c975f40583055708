"""What both loaders share: transfer, normalisation and memory format, on the device."""
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from timm.data.loader import PrefetchLoader

from .seeding import SeededErasing


class Batches(Protocol):
    """A source of CPU batches: (B, C, H, W) uint8 images and (B,) int64 labels, each batch in memory of its own."""
    num_samples: int

    def set_epoch(self, epoch: int, start: int = 0) -> None: ...

    def set_size(self, side: int) -> None: ...

    def order(self) -> np.ndarray: ...

    def numbers(self) -> Iterator[int]:
        """A number for each sample of the next iteration, in order, that tells it from the others of the epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


class DeviceLoader:
    """Yields (images, labels) on a device: (B, C, H, W) float32, normalised there from uint8, and (B,) int64.

    timm's PrefetchLoader does the work: the transfer of the next batch overlaps the step on this one. Every batch has
    its own memory, so tensors stay valid when the loop moves on.

    Attributes:
        num_samples: Samples of the whole set, over all ranks.

    Args:
        batches: The batches of this rank.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        device: Where batches go.
        channels_last: Memory format of the images.
        channels: Image channels.
        reprob: Probability of random erasing.
        remode: 'const', 'rand' or 'pixel' (timm's modes of random erasing).
        recount: Most regions erased in an image.
        seed: Seed of random erasing.
    """

    def __init__(
            self,
            batches: Batches,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            device: torch.device,
            channels_last: bool = False,
            channels: int = 3,
            reprob: float = 0.0,
            remode: str = 'pixel',
            recount: int = 1,
            seed: int = 42,
    ):
        self.batches = batches
        self.num_samples = batches.num_samples
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._epoch = 0
        self._prefetcher = PrefetchLoader(
            batches, mean=mean, std=std, channels=channels, device=device,
            re_prob=reprob, re_mode=remode, re_count=recount)
        if self._prefetcher.random_erasing is not None:
            self._prefetcher.random_erasing = SeededErasing(self._prefetcher.random_erasing, seed, device)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what iterations from now on run.

        Order and augmentation follow from the seed and the epoch, so an epoch entered late goes on exactly as one that
        was run from its beginning.

        Args:
            epoch: Index of the epoch.
            start: Batch of the epoch to begin with; those before are not read. len() stays that of the whole epoch.

        Raises:
            ValueError: The epoch has fewer batches.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f'an epoch cannot start at batch {start}: it has {len(self)} of them')
        self._epoch = epoch
        self.batches.set_epoch(epoch, start)

    def set_size(self, side: int) -> None:
        """Choose the height and width of the images that iterations from now on yield, in pixels.

        For progressive resizing: nothing is compiled anew and no worker is restarted.
        """
        if side < 1:
            raise ValueError(f'images cannot have {side} pixels a side')
        self.batches.set_size(side)

    def order(self) -> np.ndarray:
        """Indices of all samples of this rank in the chosen epoch, int64, from its first batch on.

        Raises:
            RuntimeError: The dataset is read in sequence, where samples have no indices.
        """
        return self.batches.order()

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._prefetcher.random_erasing is not None:
            self._prefetcher.random_erasing.begin(self._epoch, self.batches.numbers())
        for images, labels in self._prefetcher:
            yield images.contiguous(memory_format=self.memory_format), labels
