"""Batches from a .beton file through FFCV 1.0.2, without the pitfalls of that version.

In plain FFCV, an exception in its thread leaves the consumer waiting forever; leaving an epoch early leaks the thread
and its buffers; tensors are views of a ring buffer that later batches overwrite, on a slow GPU even before an
asynchronous copy has read them; seeds are added to epochs; distributed evaluation counts samples twice; the number of
torch threads changes during training; crops and flips cannot be seeded, and damaged JPEG data yields whatever was
decoded before (see decoder.py for both). Here an epoch is a function of (seed, epoch): it is bit-identical on any
number of threads and from any starting batch, and a sample is augmented alike for any number of ranks.
"""
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device_loader import IndexedBatches
from ..images.decode import UnusableData
from ..options import LoaderOptions
from ..order import REPEAT, quasi_shuffled
from .beton import IMAGE, LABEL, BetonInfo
from .decoder import SeededDecoder, centre_crop, epoch_key, random_resized_crop
from .importing import import_ffcv, torch_threads_kept

BATCHES_AHEAD = 3  # FFCV's default; its ring buffer has two more
QUASI_RANDOM_PAGES = 128  # shuffling window for files that do not fit in memory: 1 GiB of the default 8 MiB pages

_ffcv = import_ffcv()


class _Epoch(_ffcv.loader.epoch_iterator.EpochIterator):
    """One pass over an order. Failures in its threads are raised by next(); close() ends all threads."""

    def __init__(self, loader: Any, order: np.ndarray, keys: np.ndarray, pin_memory: bool):
        self._keys = keys  # of the samples of the order
        self._pin_memory = pin_memory
        super().__init__(loader, order)

    def run(self) -> None:
        import numba
        try:
            numba.set_num_threads(self.loader.num_workers)  # a setting of this thread
            slots = self.loader.batches_ahead + 2
            decoder, = (node.id for node in self.loader.graph.root_nodes if isinstance(node.decoder, SeededDecoder))
            _, keys, status = self.memory_allocations['operation'][decoder]
            for batch, indices in enumerate(self.iter_ixes):
                first = batch * self.loader.batch_size
                keys[batch % slots][:len(indices)] = self._keys[first:first + len(indices)]
                views = self.run_pipeline(batch, indices, batch % slots, None)
                damaged = indices[status[batch % slots][:len(indices)] != 0]
                if len(damaged):
                    raise UnusableData(
                        f'{self.loader.fname}: the JPEG data of sample {damaged[0]} is damaged; list all such samples '
                        f'with: python -m alignmix_lab verify {self.loader.fname}, and convert the images again')
                if not self._put(self._own(*views)):
                    return
            self._put(None)
        except BaseException as error:  # raised again in __next__()
            self._put(error)

    def _own(self, images_BHWC: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the ring buffer's tensors. torch's allocator keeps pinned copies until their transfer is over."""
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
        """FFCV's threads that read pages, if the page cache is not used."""
        return getattr(getattr(self.memory_context, 'executor', None), 'threads', [])

    def _starved(self) -> bool:
        """Whether this thread may wait for a page that no other thread will read."""
        return not all(thread.is_alive() for thread in self._page_readers())

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        while True:
            try:
                item = self.output_queue.get(timeout=1.0)
                break
            except queue.Empty:
                if self._starved():
                    raise RuntimeError(
                        f'a thread that reads {self.loader.fname} has died; does the file still exist?') from None
        if item is None:
            raise StopIteration
        if isinstance(item, UnusableData):
            raise item
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


class FFCVBatches(IndexedBatches):
    """CPU batches of one rank: uint8 images and int64 labels.

    Training uses random resized crops and flips (with no_aug: centre crops of the full shorter side, not flipped),
    evaluation centre crops. The number of workers is clipped to the visible CPUs.

    Raises:
        ValueError: Too few samples, images too small for the crop, or an input size that FFCV does not support.
    """

    def __init__(self, info: BetonInfo, options: LoaderOptions, train: bool):
        self.info = info
        super().__init__(info.num_samples, options, train)
        self.os_cache = options.os_cache
        if self.os_cache is None:
            self.os_cache = info.path.stat().st_size < 0.8 * memory_bytes()
        if not self.os_cache and self._labels is not None:
            raise ValueError(
                f'{info.path} is larger than memory and read page by page, in an order of its own; --balanced-sampling '
                'needs --loader timm and the original images')
        self._pin_memory = options.on_cuda
        crop_pct = 1.0 if train else options.crop_pct
        _check_images(info, options.input_size, crop_pct)

        side = options.input_size[1]
        if train and not options.no_aug:
            self._decoder = SeededDecoder(side, random_resized_crop(options.scale, options.ratio), options.hflip)
        else:
            self._decoder = SeededDecoder(side, centre_crop(crop_pct), hflip=0.0)
        with torch_threads_kept():
            self._loader = _ffcv.loader.Loader(
                str(info.path),
                batch_size=self._batch_size,
                num_workers=visible_workers(options.workers),
                os_cache=self.os_cache,
                drop_last=False,
                seed=options.seed,
                batches_ahead=BATCHES_AHEAD,
                pipelines={
                    IMAGE: [self._decoder, _ffcv.transforms.ToTensor()],
                    LABEL: [_ffcv.fields.basics.IntDecoder(), _ffcv.transforms.ToTensor()],
                },
            )

    def labels(self) -> np.ndarray:
        return self.info.labels

    def set_size(self, side: int) -> None:
        self._decoder.side = side

    def _numbers(self) -> np.ndarray:
        if not self._train or self.os_cache:
            return super()._numbers()
        order = quasi_shuffled(self.info.pages, self._seed, self._epoch, QUASI_RANDOM_PAGES)
        return self._shard(order, contiguous=True)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        copies, order = np.divmod(self.remaining(), REPEAT)
        if not len(order):
            return
        keys = np.array([epoch_key(self._seed, self._epoch, copy) for copy in range(copies.max() + 1)])
        epoch = _Epoch(self._loader, order.astype(np.uint64), keys[copies], self._pin_memory)
        try:
            yield from epoch
        finally:
            epoch.close()


def _check_images(info: BetonInfo, input_size: tuple[int, int, int], crop_pct: float) -> None:
    if input_size[0] != 3 or input_size[1] != input_size[2]:
        raise ValueError(f'FFCV makes square RGB images, not {tuple(input_size)}; use --loader timm')
    smallest = min(info.heights.min(), info.widths.min())
    if int(crop_pct * smallest) < 1:
        raise ValueError(
            f'{info.path}: an image of {smallest} pixels is too small for a crop of {crop_pct:.3f}; raise --crop-pct')


def visible_workers(workers: int) -> int:
    """Clip a number of threads to what this process may run at once, but at least one."""
    import numba
    return max(1, min(workers, len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS))


def memory_bytes() -> int:
    """Memory available to this process: that of the machine, or the limit of its control group."""
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limit = Path('/sys/fs/cgroup/memory.max')
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
