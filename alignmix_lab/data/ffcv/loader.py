"""Batches from a .beton file through FFCV 1.0.2, with the traps of that version handled.

What FFCV does otherwise: an exception in its thread leaves the consumer waiting forever; leaving an epoch early leaks
the thread and its buffers; tensors are views of a ring that later batches overwrite (with a slow GPU also before an
asynchronous copy has read them); seeds are added to epochs; distributed evaluation counts samples twice; the number of
torch threads changes under the training loop; crops and flips cannot be seeded, and damaged JPEG data is served as
whatever was decoded before (for both, see ffcv_decoder.py). Here an epoch is a function of (seed, epoch): it repeats to
the last bit on any number of threads, from any batch on, and a sample is augmented alike for any number of ranks.
"""
import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..order import eval_shard, quasi_shuffled, shuffled, train_batches, train_shard
from .beton import IMAGE, LABEL, BetonInfo
from .decoder import SeededDecoder, centre_crop, epoch_key, random_resized_crop
from .importing import import_ffcv, torch_threads_kept

_logger = logging.getLogger(__name__)

BATCHES_AHEAD = 3  # FFCV's default; its ring has two more
QUASI_RANDOM_PAGES = 128  # pages mixed at a time when the file does not fit in memory: 1 GiB of the default 8 MiB pages

_ffcv = import_ffcv()


class _Epoch(_ffcv.loader.epoch_iterator.EpochIterator):
    """One pass over an order. Failures of its threads surface in next(); close() ends all of them."""

    def __init__(self, loader: Any, order: np.ndarray, key: np.uint64, pin_memory: bool):
        self._key = key
        self._pin_memory = pin_memory
        super().__init__(loader, order)

    def run(self) -> None:
        import numba
        try:
            numba.set_num_threads(self.loader.num_workers)  # a setting of this thread
            slots = self.loader.batches_ahead + 2
            decoder, = (node.id for node in self.loader.graph.root_nodes if isinstance(node.decoder, SeededDecoder))
            _, keys, status = self.memory_allocations['operation'][decoder]
            keys[:] = self._key
            for batch, indices in enumerate(self.iter_ixes):
                views = self.run_pipeline(batch, indices, batch % slots, None)
                damaged = indices[status[batch % slots][:len(indices)] != 0]
                if len(damaged):
                    raise ValueError(
                        f'the JPEG data of sample {damaged[0]} is damaged; '
                        f'list all such samples with: python -m alignmix_lab verify {self.loader.fname}')
                if not self._put(self._own(*views)):
                    return
            self._put(None)
        except BaseException as error:  # to be raised where someone listens
            self._put(error)

    def _own(self, images_BHWC: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the ring's tensors. Pinned ones are guarded by torch's allocator until their transfer is over."""
        copies = [torch.empty_like(view, pin_memory=self._pin_memory).copy_(view) for view in (images_BHWC, labels)]
        return copies[0].permute(0, 3, 1, 2), copies[1].flatten()

    def _put(self, item: Any) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _page_readers(self) -> list[threading.Thread]:
        """FFCV's threads that read pages, where the page cache is not used."""
        return getattr(getattr(self.memory_context, 'executor', None), 'threads', [])

    def _starved(self) -> bool:
        """Whether this thread waits for a page that no other thread will read."""
        return not all(thread.is_alive() for thread in self._page_readers())

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        while True:
            try:
                item = self.output_queue.get(timeout=1.0)
                break
            except queue.Empty:
                if self._starved():
                    raise RuntimeError(
                        f'a thread that reads {self.loader.fname} has died; is the file still there?') from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise RuntimeError(f'reading {self.loader.fname} failed: {type(item).__name__}: {item}') from item
        return item

    def close(self) -> None:
        if self.closed:
            return
        self.terminate_event.set()
        if not self._starved():
            self.join()
        self.memory_context.__exit__(None, None, None)
        for thread in self._page_readers():
            thread.join()
        self.closed = True


class FFCVBatches:
    """CPU batches of one rank: uint8 images and int64 labels.

    Training: random resized crop and flip, samples in an order drawn from (seed, epoch), full batches only, each sample
    at most once an epoch over all ranks. Evaluation: centre crop, each sample exactly once over all ranks, in order.

    Args:
        info: The file, from inspect_beton().
        input_size: (3, H, W).
        batch_size: Samples per batch and rank.
        train: Which of the two.
        scale: Range of the crop's area, relative to the image's.
        ratio: Range of the crop's aspect ratio.
        hflip: Probability of a horizontal flip.
        no_aug: Train on centre crops of the whole shorter side, not flipped.
        crop_pct: Side of evaluation's centre crop, relative to the shorter side.
        workers: Threads; clipped to the CPUs visible.
        device: Where batches will go; decides on pinned memory.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Processes.
        os_cache: Read through the page cache, which all processes of a machine share. False: each process reads pages
            of the file into memory of its own, and mixes only QUASI_RANDOM_PAGES at a time. None: True where the file
            fits in this machine's memory.

    Raises:
        ValueError: Too few samples, images too small for the crop, or an input size that FFCV cannot make.
    """

    def __init__(
            self,
            info: BetonInfo,
            input_size: tuple[int, int, int],
            batch_size: int,
            train: bool,
            scale: tuple[float, float] = (0.08, 1.0),
            ratio: tuple[float, float] = (3 / 4, 4 / 3),
            hflip: float = 0.5,
            no_aug: bool = False,
            crop_pct: float = 0.875,
            workers: int = 4,
            device: torch.device | str = 'cpu',
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
            os_cache: bool | None = None,
    ):
        self.info = info
        self.num_samples = info.num_samples
        self.os_cache = info.path.stat().st_size < 0.8 * memory_bytes() if os_cache is None else os_cache
        self._train = train
        self._batch_size = batch_size
        self._rank_of = rank, world_size
        self._seed = seed
        self._epoch, self._start = 0, 0
        self._pin_memory = torch.device(device).type == 'cuda'
        if train:
            self._length = train_batches(info.num_samples, batch_size, world_size)
        else:
            self._length = -(-len(eval_shard(info.num_samples, rank, world_size)) // batch_size)
        crop_ratio = 1.0 if train else crop_pct
        _check_images(info, input_size, crop_ratio)

        if train and not no_aug:
            self._decoder = SeededDecoder(input_size[1], random_resized_crop(scale, ratio), hflip)
        else:
            self._decoder = SeededDecoder(input_size[1], centre_crop(crop_ratio), hflip=0.0)
        with torch_threads_kept():
            self._loader = _ffcv.loader.Loader(
                str(info.path),
                batch_size=batch_size,
                num_workers=visible_workers(workers),
                os_cache=self.os_cache,
                drop_last=False,
                seed=seed,
                batches_ahead=BATCHES_AHEAD,
                pipelines={
                    IMAGE: [self._decoder, _ffcv.transforms.ToTensor()],
                    LABEL: [_ffcv.fields.basics.IntDecoder(), _ffcv.transforms.ToTensor()],
                },
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._epoch, self._start = epoch, start

    def set_size(self, side: int) -> None:
        self._decoder.side = side

    def order(self) -> np.ndarray:
        """Indices of the samples of this rank in the current epoch."""
        rank, world_size = self._rank_of
        if not self._train:
            return eval_shard(self.num_samples, rank, world_size)
        if self.os_cache:
            order = shuffled(self.num_samples, self._seed, self._epoch)
        else:
            order = quasi_shuffled(self.info.pages, self._seed, self._epoch, QUASI_RANDOM_PAGES)
        return train_shard(order, self._batch_size, rank, world_size, contiguous=not self.os_cache)

    def numbers(self) -> Iterator[int]:
        """Indices of the samples that the next iteration yields."""
        return iter(self._remaining().tolist())

    def _remaining(self) -> np.ndarray:
        return self.order()[self._start * self._batch_size:]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.ascontiguousarray(self._remaining(), dtype=np.uint64)
        if not len(order):
            return
        epoch = _Epoch(self._loader, order, epoch_key(self._seed, self._epoch), self._pin_memory)
        try:
            yield from epoch
        finally:
            epoch.close()


def _check_images(info: BetonInfo, input_size: tuple[int, int, int], crop_ratio: float) -> None:
    if input_size[0] != 3 or input_size[1] != input_size[2]:
        raise ValueError(f'FFCV makes square RGB images, not {tuple(input_size)}; use --loader timm')
    smallest = min(info.heights.min(), info.widths.min())
    if int(crop_ratio * smallest) < 1:
        raise ValueError(f'{info.path}: an image of {smallest} pixels is too small for a crop of {crop_ratio:.3f}')


def visible_workers(workers: int) -> int:
    """Threads to use: at least one, and no more than this process may run at once."""
    import numba
    return max(1, min(workers, len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS))


def memory_bytes() -> int:
    """Memory that this process can use: the machine's, or its control group's limit."""
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limit = Path('/sys/fs/cgroup/memory.max')
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
