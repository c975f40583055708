"""Batches through timm's datasets and transforms, for images that are not in .beton files.

timm's create_loader() pads evaluation to the number of ranks, draws its order and augmentation from global generators,
and replaces an image it cannot read by the next one. So its parts are put together here: the order comes from (seed,
epoch), each sample is augmented from a seed of (seed, epoch, index) whatever the number of workers, evaluation counts
each sample once, and an unreadable image ends the run with its name. Datasets that are read in sequence (webdataset
and the like) keep timm's own loader.
"""
import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data.loader import fast_collate

from .images import decode_image, read_bytes
from .order import eval_shard, shuffled, train_batches, train_shard
from .sources import ImageSource


@contextlib.contextmanager
def _generators_seeded(*seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators, all of which timm's transforms use, and restore them after."""
    words = np.random.SeedSequence(seed).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _check_label(label: int, num_classes: int, where: str) -> None:
    if not 0 <= label < num_classes:
        raise RuntimeError(f'{where} has the label {label}; --num-classes {num_classes} allows 0 to {num_classes - 1}')


class _TransformedImages(torch.utils.data.Dataset):
    """Indexed by (epoch, index), so that workers that live through all epochs know which one they are in."""

    def __init__(self, source: ImageSource, transform: Callable, mode: str, num_classes: int, seed: int):
        self.source = source
        self.transform = transform
        self.mode = mode
        self.num_classes = num_classes
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        try:
            image, label = self.source.read(index)
            image = decode_image(image if isinstance(image, Image.Image) else read_bytes(image), self.mode)
        except Exception as error:
            raise RuntimeError(
                f'{self.source.describe(index)} cannot be read ({type(error).__name__}: {error}); repair or remove it, '
                'or convert the data with python -m timm_alignmix.data.write, which leaves such images out') from error
        _check_label(label, self.num_classes, self.source.describe(index))
        with _generators_seeded(self.seed, epoch, index):
            return self.transform(image), label

    def __len__(self) -> int:
        return self.source.num_samples


class TimmBatches:
    """CPU batches of one rank from a dataset with random access: uint8 images and int64 labels.

    Args:
        source: Images and labels.
        transform: From timm's create_transform(use_prefetcher=True).
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
            transform: Callable,
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
        self._epoch = 0
        if train:
            train_batches(self.num_samples, batch_size, world_size)
        mode = {1: 'L', 3: 'RGB'}.get(channels)
        if mode is None:
            raise ValueError(f'images have 1 or 3 channels, not {channels}')
        self._loader = torch.utils.data.DataLoader(
            _TransformedImages(source, transform, mode, num_classes, seed),
            batch_size=batch_size,
            sampler=_Keys(self),
            collate_fn=fast_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def keys(self) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of this rank in the current epoch."""
        rank, world_size = self._rank_of
        if self._train:
            order = shuffled(self.num_samples, self._seed, self._epoch)
            indices = train_shard(order, self._batch_size, rank, world_size)
        else:
            indices = eval_shard(self.num_samples, rank, world_size)
        return [(self._epoch, index) for index in indices.tolist()]

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._loader)


class _Keys(torch.utils.data.Sampler):
    def __init__(self, batches: TimmBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.batches.keys())

    def __len__(self) -> int:
        return len(self.batches.keys())


class _EveryNth(torch.utils.data.IterableDataset):
    """Every n-th sample of a stream, from the first-th on."""

    def __init__(self, source: ImageSource, first: int, n: int, num_classes: int):
        self.source = source
        self.first = first
        self.n = n
        self.num_classes = num_classes

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, label in itertools.islice(self.source.dataset, self.first, None, self.n):
            _check_label(label, self.num_classes, self.source.title)
            yield image, label

    def __len__(self) -> int:
        return len(self.source.dataset) // self.n


class StreamBatches:
    """CPU batches of one rank from a dataset that is read in sequence.

    Training follows timm's reader: it shuffles within buffers and splits shards between ranks and workers, so a sample
    may be repeated or left out at the end of an epoch. For evaluation every rank reads the whole stream and keeps
    every n-th sample: exact, but slow on many ranks (convert to .beton where that matters).

    Args:
        source: Images and labels.
        transform: From timm's create_transform(use_prefetcher=True).
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
            transform: Callable,
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
        dataset = source.dataset
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1  # every rank reads all shards
        dataset.transform = transform
        dataset.set_loader_cfg(num_workers=workers)  # timm's readers count samples per worker
        self._loader = torch.utils.data.DataLoader(
            _EveryNth(source, *((0, 1) if train else (rank, world_size)), num_classes),
            batch_size=batch_size,
            collate_fn=fast_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            drop_last=train,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed + rank),
        )
        self._length = len(self._loader) if train else -(-self.num_samples // (batch_size * world_size))

    def set_epoch(self, epoch: int) -> None:
        self._source.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._loader)
