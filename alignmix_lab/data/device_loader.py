"""Transfer, normalisation and memory format on the device, shared by all loaders."""
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from timm.data.loader import PrefetchLoader

from .options import LoaderOptions
from .order import REPEAT, balanced, eval_shard, numbered, repeated, shuffled, train_batches, train_shard
from .seeding import SeededErasing


class Batches(Protocol):
    """Source of CPU batches: (B, C, H, W) uint8 images, and (B,) int64 labels or (B, classes) float32 rows of several.

    Batches do not share memory.
    """
    num_samples: int

    def set_epoch(self, epoch: int, start: int = 0) -> None: ...

    def set_size(self, side: int) -> None: ...

    def order(self) -> np.ndarray: ...

    def numbers(self) -> Iterator[int]:
        """A number for each sample of the next iteration, in order and unique within the epoch."""

    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


class IndexedBatches:
    """Order and number of the batches of one rank, for data with random access.

    Training: shuffled by (seed, epoch), full batches only, each sample at most once per epoch over all ranks, unless
    --balanced-sampling or --aug-repeats repeat some. Evaluation: each sample exactly once over all ranks, in order.

    Raises:
        ValueError: There are too few training samples for a batch.
    """

    def __init__(self, num_samples: int, options: LoaderOptions, train: bool):
        self.num_samples = num_samples
        self._train = train
        self._seed = options.seed
        self._batch_size = options.split_batch_size(train)
        self._rank_of = options.rank, options.world_size
        self._epoch, self._start = 0, 0
        self._repeats = options.aug_repeats
        self._labels = self.labels() if train and options.balanced_sampling else None
        len(self)  # raises if there are too few samples

    def labels(self) -> np.ndarray:
        """Labels (N,) int64 of all samples."""
        raise NotImplementedError

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._epoch, self._start = epoch, start

    def order(self) -> np.ndarray:
        """Indices of this rank's samples in the current epoch."""
        return self._numbers() % REPEAT

    def _numbers(self) -> np.ndarray:
        """Numbers of this rank's samples in the current epoch; see :func:`numbered`."""
        if not self._train:
            return eval_shard(self.num_samples, *self._rank_of)
        if self._labels is not None:
            return self._shard(balanced(self._labels, self._seed, self._epoch))
        return self._shard(shuffled(self.num_samples, self._seed, self._epoch))

    def _shard(self, order: np.ndarray, contiguous: bool = False) -> np.ndarray:
        """This rank's part of a training order, numbered."""
        if self._repeats:
            order = repeated(order, self._repeats)
        if self._repeats or self._labels is not None:
            order = numbered(order)
        return train_shard(order, self._batch_size, *self._rank_of, contiguous)

    def remaining(self) -> np.ndarray:
        """Numbers of the samples that the next iteration yields."""
        return self._numbers()[self._start * self._batch_size:]

    def numbers(self) -> Iterator[int]:
        return iter(self.remaining().tolist())

    def __len__(self) -> int:
        rank, world_size = self._rank_of
        if self._train:
            return train_batches(self.num_samples, self._batch_size, world_size)
        return -(-len(eval_shard(self.num_samples, rank, world_size)) // self._batch_size)


class DeviceLoader:
    """Loader of (images, labels) on a device: (B, C, H, W) float32, normalised there from uint8, and (B,) int64 or
    (B, classes) float32.

    It wraps timm's PrefetchLoader: the next batch is transferred while the current one is used. Every batch has its own
    memory, so tensors stay valid after the loop moves on. `num_samples` counts the whole split, over all ranks.
    """

    def __init__(self, batches: Batches, options: LoaderOptions, train: bool):
        self.batches = batches
        self.num_samples = batches.num_samples
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._epoch = 0
        device = torch.device(options.device)
        erase = train and not options.no_aug
        self._prefetcher = PrefetchLoader(
            batches, mean=options.mean, std=options.std, channels=options.input_size[0], device=device,
            re_prob=options.reprob if erase else 0.0, re_mode=options.remode, re_count=options.recount)
        if self._prefetcher.random_erasing is not None:
            self._prefetcher.random_erasing = SeededErasing(self._prefetcher.random_erasing, options.seed, device)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch of the following iterations, and the first batch to yield; earlier ones are not read.

        Order and augmentation depend only on the seed and the epoch, so an epoch that is entered late continues exactly
        like one that was read from the beginning. len() is still that of the whole epoch.

        Raises:
            ValueError: The epoch has fewer batches.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f'an epoch cannot start at batch {start}: it has {len(self)} batches')
        self._epoch = epoch
        self.batches.set_epoch(epoch, start)

    def set_size(self, side: int) -> None:
        """Set the image height and width, in pixels, of the following iterations (for progressive resizing).

        Nothing is recompiled and no worker is restarted.
        """
        if side < 1:
            raise ValueError(f'images cannot have {side} pixels a side')
        self.batches.set_size(side)

    def order(self) -> np.ndarray:
        """Indices, int64, of all samples of this rank in the selected epoch, starting with its first batch.

        Raises:
            RuntimeError: The dataset is read sequentially, so that its samples have no indices.
        """
        return self.batches.order()

    def labels(self) -> np.ndarray:
        """Labels (N,) int64 of all samples of the split.

        Raises:
            ValueError: The dataset is read sequentially.
        """
        return self.batches.labels()

    def __len__(self) -> int:
        """Number of batches of this rank in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self._prefetcher.random_erasing is not None:
            self._prefetcher.random_erasing.begin(self._epoch, self.batches.numbers())
        for images, labels in self._prefetcher:
            yield images.contiguous(memory_format=self.memory_format), labels
