"""Which sample goes where in an epoch: pure functions of (seed, epoch, rank), the same for every loader.

Unlike torch's DistributedSampler nothing is padded: in training every sample is used at most once an epoch and all
ranks get the same number of batches; in evaluation every sample is used exactly once, so ranks may differ by a batch.
"""
import numpy as np


def shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples. (seed, epoch) is hashed as a pair: epoch 1 of seed 0 is not epoch 0 of seed 1."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def quasi_shuffled(pages: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """A random order that reads a file page by page: only about `window` pages are in use at any time.

    Pages come in random order, and each sample is delayed by a random time of up to `window` pages.

    Args:
        pages: (N,) page number of each sample.
        seed: Seed of the run.
        epoch: Epoch to shuffle for.
        window: Pages mixed with each other at any time.
    """
    rng = np.random.default_rng([seed, epoch])
    _, page_of_sample = np.unique(pages, return_inverse=True)
    turn = rng.permutation(page_of_sample.max() + 1)[page_of_sample]
    return np.argsort(turn + window * rng.random(len(pages)), kind='stable')


def train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Full batches that every rank gets in an epoch.

    Raises:
        ValueError: There is not one.
    """
    batches = num_samples // (batch_size * world_size)
    if not batches:
        ranks = f' on each of {world_size} processes' if world_size > 1 else ''
        raise ValueError(
            f'the training set has {num_samples} samples, not enough for one batch of {batch_size}{ranks}; '
            f'use --batch-size {max(1, num_samples // world_size)} or less')
    return batches


def train_shard(
        order: np.ndarray,
        batch_size: int,
        rank: int,
        world_size: int,
        contiguous: bool = False,
) -> np.ndarray:
    """The part of a global order that one rank trains on.

    By default ranks take turns, so that step k of all ranks together is always samples [k * B, (k + 1) * B) of the
    order (B the global batch size), for any number of ranks. `contiguous` gives each rank a stretch instead, for
    orders that follow the pages of a file: then each rank reads its own pages only.
    """
    samples = train_batches(len(order), batch_size, world_size) * batch_size
    if contiguous:
        return order[rank * samples:(rank + 1) * samples]
    return order[rank::world_size][:samples]


def eval_shard(num_samples: int, rank: int, world_size: int) -> np.ndarray:
    """The samples that one rank evaluates, in order: the ranks' parts differ by at most one sample."""
    return np.array_split(np.arange(num_samples), world_size)[rank]
