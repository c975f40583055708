"""Batches through timm's datasets and transforms, for images that are not in .beton files.

timm's create_loader() pads evaluation to a multiple of the ranks, uses the global random generators, and replaces an
unreadable image by the next one. So its parts are assembled differently here: the order follows from (seed, epoch),
each sample is augmented with a seed from (seed, epoch, index) whatever the number of workers, evaluation counts each
sample once, and an unreadable image stops the run with its name. Sequential datasets such as webdataset keep timm's
reader.
"""
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data import MultiLabelTarget
from timm.data.loader import fast_collate
from timm.data.readers.shared_count import SharedCount

from .device_loader import IndexedBatches
from .images.decode import UnusableData, decode_image, read_bytes
from .images.sources import ImageSource, MultiLabelSource
from .options import LoaderOptions
from .order import REPEAT
from .seeding import generators_kept, seed_generators
from .shards import enter_epoch
from .transforms import Size
from .worker_signals import end_with_parent, iterate

MakeTransform = Callable[[Size], Callable]  # as SizedTransform


def _check_label(label: int, num_classes: int | None, where: str) -> None:
    if label < 0 or (num_classes is not None and label >= num_classes):
        allowed = 'labels start at 0' if num_classes is None else \
            f'--num-classes {num_classes} allows 0 to {num_classes - 1}'
        raise UnusableData(f'{where} has the label {label}; {allowed}')


def _data_loader(
        dataset: torch.utils.data.Dataset,
        options: LoaderOptions,
        train: bool,
        **arguments: Any,
) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=options.split_batch_size(train),
        collate_fn=fast_collate,
        num_workers=options.workers,
        pin_memory=options.pin_mem and options.on_cuda,
        persistent_workers=options.workers > 0,
        generator=torch.Generator(),  # torch's global one would advance with every epoch
        worker_init_fn=end_with_parent,
        **arguments,
    )


class _TransformedImages(torch.utils.data.Dataset):
    """Indexed by (epoch, size, number of the sample), because workers live through all epochs."""

    def __init__(self, source: ImageSource, make_transform: MakeTransform, options: LoaderOptions):
        self.source = source
        self.make_transform = make_transform
        self.options = options
        self.mode = {1: 'L', 3: 'RGB'}.get(options.input_size[0])
        if self.mode is None:
            raise ValueError(f'images have 1 or 3 channels, not {options.input_size[0]}')

    def __getitem__(self, key: tuple[int, Size, int]) -> tuple[Any, int]:
        epoch, size, number = key
        index = number % REPEAT
        try:
            image, label = self.source.read(index)
            image = decode_image(image if isinstance(image, Image.Image) else read_bytes(image), self.mode)
        except Exception as error:
            raise UnusableData(
                f'{self.source.describe(index)} cannot be read ({type(error).__name__}: {error}); repair or remove it, '
                'or convert the data with python -m alignmix_lab convert, which skips such images') from error
        if isinstance(self.source, MultiLabelSource):
            label = MultiLabelTarget(self.options.num_classes)(label)
        else:
            _check_label(label, self.options.num_classes, self.source.describe(index))
        with generators_kept():
            seed_generators(self.options.seed, epoch, number)
            return self.make_transform(size)(image), label


class TimmBatches(IndexedBatches):
    """CPU batches of one rank from a dataset with random access: uint8 images and int64 labels, or float32 rows.

    `make_transform` returns timm's create_transform(use_prefetcher=True) for a (height, width).
    """

    def __init__(self, source: ImageSource, make_transform: MakeTransform, options: LoaderOptions, train: bool):
        self._source = source
        super().__init__(source.num_samples, options, train)
        self._size = tuple(options.input_size[1:])
        self._loader = _data_loader(
            _TransformedImages(source, make_transform, options), options, train, sampler=_Keys(self))

    def labels(self) -> np.ndarray:
        return np.array(self._source.read_labels())

    def set_size(self, side: int) -> None:
        self._size = side, side

    def keys(self) -> Iterator[tuple[int, Size, int]]:
        """(epoch, size, number) of the samples that the next iteration yields."""
        return zip(itertools.repeat(self._epoch), itertools.repeat(self._size), self.numbers())

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iterate(self._loader)


class _Keys(torch.utils.data.Sampler):
    def __init__(self, batches: TimmBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, Size, int]]:
        return self.batches.keys()


class _SeededTransform:
    """Transform whose draws follow from (seed, epoch, rank, worker, position in the worker's part of the stream)."""

    def __init__(self, make_transform: MakeTransform, options: LoaderOptions):
        height, width = options.input_size[1:]
        self.epoch, self.height, self.width = SharedCount(), SharedCount(height), SharedCount(width)  # with workers
        self._make_transform = make_transform
        self._options = options

    def begin(self, worker: int, place: int) -> None:
        """Start an epoch in the part of a worker, `place` samples late."""
        prefix = self._options.seed, self.epoch.value, self._options.rank, worker
        self._keys = ((*prefix, place) for place in itertools.count(place))
        self._transform = self._make_transform((self.height.value, self.width.value))

    def __call__(self, image: Image.Image) -> Any:
        with generators_kept():
            seed_generators(*next(self._keys))
            return self._transform(image)


class _EveryNth(torch.utils.data.IterableDataset):
    """Every n-th sample of a stream, beginning with `first`; `start` batches of training are left out."""

    def __init__(self, source: ImageSource, first: int, n: int, options: LoaderOptions, train: bool):
        self.source = source
        self.first = first
        self.n = n
        self.start = SharedCount()
        self.num_classes = options.num_classes
        self.seed = options.seed
        self.batch_size = options.split_batch_size(train)
        self.is_sharded = train and hasattr(source.dataset.reader, 'split_info')  # webdataset's

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = torch.utils.data.get_worker_info()
        part, left_out, last = 0 if worker is None else worker.id, 0, None
        if self.is_sharded:
            reader = self.source.dataset.reader
            part, left_out = enter_epoch(reader, part, self.seed, self.start.value, self.batch_size)
            last = reader._num_samples_per_worker() - left_out
        self.source.dataset.transform.begin(part, left_out)
        for image, label in itertools.islice(self.source.dataset, self.first, last, self.n):
            _check_label(label, self.num_classes, self.source.title)
            yield image, label

    def __len__(self) -> int:
        return len(self.source.dataset) // self.n


class StreamBatches:
    """CPU batches of one rank from a dataset that is read sequentially.

    Training follows timm's reader: it shuffles within buffers and splits shards between ranks and workers. A sample may
    therefore be repeated or left out at the end of an epoch, and an epoch repeats exactly only with the same number of
    ranks and workers. An epoch of webdataset shards that is entered late skips the shards that are used up, see
    shards.py; other streams read and discard what came before. In evaluation, every rank reads the whole stream and
    keeps every n-th sample, which is exact but slow on many ranks; convert to .beton then.

    The arguments are those of :class:`TimmBatches`.
    """

    def __init__(self, source: ImageSource, make_transform: MakeTransform, options: LoaderOptions, train: bool):
        self.num_samples = source.num_samples
        self._source = source
        self._train = train
        if train and (options.balanced_sampling or options.aug_repeats):
            raise ValueError(
                f'{source.title} is read in sequence, and --balanced-sampling and --aug-repeats choose samples; leave '
                'them out, or convert the data with python -m alignmix_lab convert')
        self._rank, self._world_size = options.rank, options.world_size
        self._batch_size = options.split_batch_size(train)
        self._start = 0
        dataset = source.dataset
        if not train:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1  # every rank reads all shards
        dataset.transform = self._transform = _SeededTransform(make_transform, options)
        dataset.set_loader_cfg(num_workers=options.workers)  # timm's readers count samples per worker
        first, n = (0, 1) if train else (self._rank, self._world_size)
        self._samples = _EveryNth(source, first, n, options, train)
        self._loader = _data_loader(self._samples, options, train, drop_last=train)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._source.dataset.set_epoch(epoch)
        self._transform.epoch.value = epoch
        self._start = self._samples.start.value = start

    def set_size(self, side: int) -> None:
        self._transform.height.value = self._transform.width.value = side

    def order(self) -> np.ndarray:
        if not self._train:
            return np.arange(self._rank, self.num_samples, self._world_size)
        raise RuntimeError(
            f'{self._source.title} is read in sequence: its samples have no indices, and their order is not known; '
            'convert it with python -m alignmix_lab convert')

    def labels(self) -> np.ndarray:
        return np.array(self._source.read_labels())

    def numbers(self) -> Iterator[int]:
        """Positions in this rank's stream, marked with the rank."""
        return itertools.count((self._rank << 40) + self._start * self._batch_size)

    def __len__(self) -> int:
        return len(self._loader) if self._train else -(-self.num_samples // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.islice(iterate(self._loader), 0 if self._samples.is_sharded else self._start, None)
