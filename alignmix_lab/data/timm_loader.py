"""Batches through timm's datasets and transforms, for images that are not in .beton files.

timm's create_loader() pads evaluation to the number of ranks, draws its order and augmentation from global generators,
and replaces an image it cannot read by the next one. So its parts are put together here: the order comes from (seed,
epoch), each sample is augmented from a seed of (seed, epoch, index) whatever the number of workers, evaluation counts
each sample once, and an unreadable image ends the run with its name. Datasets that are read in sequence (webdataset
and the like) keep timm's own loader.
"""
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.readers.shared_count import SharedCount

from .images.decode import decode_image, read_bytes
from .images.sources import ImageSource
from .order import eval_shard, shuffled, train_batches, train_shard
from .seeding import generators_kept, seed_generators
from .transforms import Size
from .worker_signals import end_with_parent, iterate

MakeTransform = Callable[[Size], Callable]  # as SizedTransform does


def _check_label(label: int, num_classes: int, where: str) -> None:
    if not 0 <= label < num_classes:
        raise RuntimeError(f'{where} has the label {label}; --num-classes {num_classes} allows 0 to {num_classes - 1}')


class _TransformedImages(torch.utils.data.Dataset):
    """Indexed by (epoch, size, index), so that workers that live through all epochs know which one they are in."""

    def __init__(self, source: ImageSource, make_transform: MakeTransform, mode: str, num_classes: int, seed: int):
        self.source = source
        self.make_transform = make_transform
        self.mode = mode
        self.num_classes = num_classes
        self.seed = seed

    def __getitem__(self, key: tuple[int, Size, int]) -> tuple[Any, int]:
        epoch, size, index = key
        try:
            image, label = self.source.read(index)
            image = decode_image(image if isinstance(image, Image.Image) else read_bytes(image), self.mode)
        except Exception as error:
            raise RuntimeError(
                f'{self.source.describe(index)} cannot be read ({type(error).__name__}: {error}); repair or remove it, '
                'or convert the data with python -m alignmix_lab convert, which leaves such images out') from error
        _check_label(label, self.num_classes, self.source.describe(index))
        with generators_kept():
            seed_generators(self.seed, epoch, index)
            return self.make_transform(size)(image), label

    def __len__(self) -> int:
        return self.source.num_samples


class TimmBatches:
    """CPU batches of one rank from a dataset with random access: uint8 images and int64 labels.

    Args:
        source: Images and labels.
        make_transform: Gives timm's create_transform(use_prefetcher=True) for a (height, width).
        size: (height, width) of the images.
        batch_size: Samples per batch and rank.
        train: Shuffled full batches, or every sample once in order.
        channels: 3 for RGB, 1 for grey.
        num_classes: Labels must be below.
        workers: Processes; 0 reads in this one.
        pin_memory: Whether to pin batches.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Processes.
    """

    def __init__(
            self,
            source: ImageSource,
            make_transform: MakeTransform,
            size: Size,
            batch_size: int,
            train: bool,
            channels: int,
            num_classes: int,
            workers: int = 4,
            pin_memory: bool = False,
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.num_samples = source.num_samples
        self._train = train
        self._seed = seed
        self._batch_size = batch_size
        self._rank_of = rank, world_size
        self._epoch, self._start = 0, 0
        self._size = size
        if train:
            self.num_own = train_batches(self.num_samples, batch_size, world_size) * batch_size
        else:
            self.num_own = len(eval_shard(self.num_samples, rank, world_size))
        mode = {1: 'L', 3: 'RGB'}.get(channels)
        if mode is None:
            raise ValueError(f'images have 1 or 3 channels, not {channels}')
        self._loader = torch.utils.data.DataLoader(
            _TransformedImages(source, make_transform, mode, num_classes, seed),
            batch_size=batch_size,
            sampler=_Keys(self),
            collate_fn=fast_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # not torch's global one, which would lose a number to every epoch
            worker_init_fn=end_with_parent,
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._epoch, self._start = epoch, start

    def set_size(self, side: int) -> None:
        self._size = side, side

    def order(self) -> np.ndarray:
        """Indices of the samples of this rank in the current epoch."""
        rank, world_size = self._rank_of
        if not self._train:
            return eval_shard(self.num_samples, rank, world_size)
        return train_shard(shuffled(self.num_samples, self._seed, self._epoch), self._batch_size, rank, world_size)

    def numbers(self) -> Iterator[int]:
        """Indices of the samples that the next iteration yields."""
        return iter(self.order()[self._start * self._batch_size:].tolist())

    def keys(self) -> Iterator[tuple[int, Size, int]]:
        """(epoch, size, index) of these samples."""
        return zip(itertools.repeat(self._epoch), itertools.repeat(self._size), self.numbers())

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iterate(self._loader)


class _Keys(torch.utils.data.Sampler):
    def __init__(self, batches: TimmBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, Size, int]]:
        return self.batches.keys()

    def __len__(self) -> int:
        return self.batches.num_own


class _SeededTransform:
    """A transform whose draws follow from (seed, epoch, rank, worker, place in the worker's part of the stream)."""

    def __init__(self, make_transform: MakeTransform, size: Size, seed: int, rank: int):
        self.epoch, self.height, self.width = SharedCount(), SharedCount(size[0]), SharedCount(size[1])  # with workers
        self._make_transform = make_transform
        self._seed = seed
        self._rank = rank
        self._keys: Iterator[tuple[int, ...]] = iter(())

    def begin(self) -> None:
        """Start an epoch in this worker."""
        worker = torch.utils.data.get_worker_info()
        prefix = self._seed, self.epoch.value, self._rank, 0 if worker is None else worker.id
        self._keys = ((*prefix, place) for place in itertools.count())
        self._transform = self._make_transform((self.height.value, self.width.value))

    def __call__(self, image: Image.Image) -> Any:
        with generators_kept():
            seed_generators(*next(self._keys))
            return self._transform(image)


class _EveryNth(torch.utils.data.IterableDataset):
    """Every n-th sample of a stream, from the first-th on."""

    def __init__(self, source: ImageSource, first: int, n: int, num_classes: int):
        self.source = source
        self.first = first
        self.n = n
        self.num_classes = num_classes

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.source.dataset.transform.begin()
        for image, label in itertools.islice(self.source.dataset, self.first, None, self.n):
            _check_label(label, self.num_classes, self.source.title)
            yield image, label

    def __len__(self) -> int:
        return len(self.source.dataset) // self.n


class StreamBatches:
    """CPU batches of one rank from a dataset that is read in sequence.

    Training follows timm's reader: it shuffles within buffers and splits shards between ranks and workers, so a sample
    may be repeated or left out at the end of an epoch, and an epoch repeats exactly for the same number of ranks and
    workers only. An epoch entered late reads and discards what came before. For evaluation every rank reads the whole
    stream and keeps every n-th sample: exact, but slow on many ranks (convert to .beton where that matters).

    Args:
        source: Images and labels.
        make_transform: Gives timm's create_transform(use_prefetcher=True) for a (height, width).
        size: (height, width) of the images.
        batch_size: Samples per batch and rank.
        train: Which of the two.
        num_classes: Labels must be below.
        workers: Processes; 0 reads in this one.
        pin_memory: Whether to pin batches.
        seed: Seed of augmentation.
        rank: This process.
        world_size: Processes.
    """

    def __init__(
            self,
            source: ImageSource,
            make_transform: MakeTransform,
            size: Size,
            batch_size: int,
            train: bool,
            num_classes: int,
            workers: int = 4,
            pin_memory: bool = False,
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.num_samples = source.num_samples
        self._source = source
        self._rank = rank
        self._batch_size = batch_size
        self._start = 0
        dataset = source.dataset
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1  # every rank reads all shards
        dataset.transform = self._transform = _SeededTransform(make_transform, size, seed, rank)
        dataset.set_loader_cfg(num_workers=workers)  # timm's readers count samples per worker
        self._loader = torch.utils.data.DataLoader(
            _EveryNth(source, *((0, 1) if train else (rank, world_size)), num_classes),
            batch_size=batch_size,
            collate_fn=fast_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            drop_last=train,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
            worker_init_fn=end_with_parent,
        )
        self._length = len(self._loader) if train else -(-self.num_samples // (batch_size * world_size))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._source.dataset.set_epoch(epoch)
        self._transform.epoch.value = epoch
        self._start = start

    def set_size(self, side: int) -> None:
        self._transform.height.value = self._transform.width.value = side

    def order(self) -> np.ndarray:
        raise RuntimeError(
            f'{self._source.title} is read in sequence: its samples have no indices, and their order is not known; '
            'convert it with python -m alignmix_lab convert')

    def numbers(self) -> Iterator[int]:
        """Places in this rank's stream, marked by the rank, of the samples that the next iteration yields."""
        return itertools.count((self._rank << 40) + self._start * self._batch_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.islice(self._loader, self._start, None)
