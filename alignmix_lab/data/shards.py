"""Epochs of webdataset shards that repeat, and that can be entered late without reading all that came before.

timm's reader shuffles with a generator that lives as long as a worker, so what an epoch draws depends on how many came
before it in the same process. Here every epoch has a generator of its own. Of what an epoch has yielded before it is
entered, nothing is decoded; where the dataset lists the lengths of its shards, as timm's `_info.json` does, those that
are used up are not opened: numbers go through the shuffle buffer first, to see whose samples are still to come.
"""
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .images.decode import UnusableData


def enter_epoch(reader: Any, worker: int, seed: int, start: int, batch_size: int) -> tuple[int, int]:
    """Prepare timm's ReaderWds, in its worker, for the rest of an epoch of training.

    Args:
        reader: Its epoch and number of workers are set.
        worker: Number of this worker.
        start: Batches of this rank's epoch that are left out. The loader takes the first of those that follow from
            worker 0, so the workers take over each other's parts.

    Returns:
        Which worker's part of the epoch this worker reads, and how many samples it leaves out.
    """
    reader._lazy_init()  # finds out the worker, and how many there are
    reader.worker_id = (worker + start) % reader.num_workers
    reader.global_worker_id = reader.dist_rank * reader.num_workers + reader.worker_id
    key = seed, reader.epoch_count.value, reader.dist_rank, reader.worker_id
    reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    reader._lazy_init()  # a pipeline with a new generator
    count = len(range(reader.worker_id, start, reader.num_workers)) * batch_size
    if count:
        late = _Late(reader.ds, count)
        *shards, read, shuffle, decode, rename = late.pipeline.pipeline
        lengths = _list_lengths(reader, shards)
        parts = itertools.chain.from_iterable(itertools.repeat(number, length) for number, length in enumerate(lengths))
        generator = random.Random(reader.worker_seed)
        coming = itertools.islice(shuffle.f(parts, **{**shuffle.kw, 'rng': generator}), count, None)
        late.pipeline.pipeline[:] = [
            *shards, _FromHere(read, lengths, {*coming}), shuffle, late.drop, decode, rename]
        reader.ds = late
    return reader.worker_id, count


def _list_lengths(reader: Any, shards: list[Callable]) -> list[int]:
    """Samples in each of the worker's shards, in the order of the epoch; [] if some are not listed."""
    names = (shard['url'] for shard in type(reader.ds)(*shards))
    listed = dict(zip(reader.split_info.filenames, reader.split_info.shard_lengths, strict=False))  # () of the latter
    lengths = [listed.get(name.removeprefix(reader.root).lstrip('/')) for name in names]
    return [] if None in lengths else lengths


class _FromHere:
    """Stage that reads shards; of those that are not needed it yields None, as often as they have samples."""

    def __init__(self, read: Callable, lengths: list[int], needed: set[int]):
        self.read, self.lengths, self.needed = read, lengths, needed

    def __call__(self, shards: Iterator[dict]) -> Iterator[dict | None]:
        if not self.needed:  # nothing is known of the shards, or all are used up: a second round
            yield from self.read(shards)
            return
        for number, shard in enumerate(shards):
            if number not in self.needed:
                yield from itertools.repeat(None, self.lengths[number])
                continue
            found = 0
            for sample in self.read(iter([shard])):
                found += 1
                yield sample
            if found != self.lengths[number]:
                raise UnusableData(
                    f'{shard["url"]} has {found} samples, {self.lengths[number]} are listed; correct '
                    'shard_lengths in _info.json, or start the epoch anew')
        self.needed = set()


class _Late:
    """A pipeline without its first samples, as timm's reader uses one."""

    def __init__(self, pipeline: Any, count: int):
        self.pipeline, self.count = pipeline, count

    def drop(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Stage before the decoding."""
        for sample in samples:
            if self.count:
                self.count -= 1
            else:
                yield sample

    def with_epoch(self, samples: int) -> Iterator[Any]:
        """Round after round; in the first ones there may be nothing to yield, which would end a DataPipeline."""
        def rounds() -> Iterator[Any]:
            left = None
            while left != self.count:
                left = self.count
                for sample in self.pipeline:
                    left = None
                    yield sample

        return itertools.islice(rounds(), samples)
