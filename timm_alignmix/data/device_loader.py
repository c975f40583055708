"""What both loaders share: transfer, normalisation and memory format, on the device."""
from collections.abc import Iterator
from typing import Protocol

import torch
from timm.data.loader import PrefetchLoader


class Batches(Protocol):
    """A source of CPU batches: (B, C, H, W) uint8 images and (B,) int64 labels, each batch in memory of its own."""
    num_samples: int

    def set_epoch(self, epoch: int) -> None: ...

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
    ):
        self.batches = batches
        self.num_samples = batches.num_samples
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._prefetcher = PrefetchLoader(
            batches, mean=mean, std=std, channels=channels, device=device,
            re_prob=reprob, re_mode=remode, re_count=recount)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs: order and augmentation follow from it."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self._prefetcher:
            yield images.contiguous(memory_format=self.memory_format), labels
