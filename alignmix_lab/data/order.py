"""Sample order of an epoch: pure functions of (seed, epoch, rank), shared by all loaders.

Unlike torch's DistributedSampler, nothing is padded. In training, a sample is used at most once per epoch and all ranks
get the same number of batches; in evaluation, each sample is used exactly once, so ranks may differ by a batch.
"""
import numpy as np


def shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Random permutation of the samples. The pair is hashed: epoch 1 of seed 0 differs from epoch 0 of seed 1."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def quasi_shuffled(pages: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Random order that needs only about `window` pages of the file at any time.

    Pages come in random order, and each sample is delayed by up to `window` pages at random; `pages` (N,) holds the
    page number of each sample.
    """
    rng = np.random.default_rng([seed, epoch])
    _, page_of_sample = np.unique(pages, return_inverse=True)
    turn = rng.permutation(page_of_sample.max() + 1)[page_of_sample]
    return np.argsort(turn + window * rng.random(len(pages)), kind='stable')


def train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Number of full batches per rank and epoch.

    Raises:
        ValueError: There are too few samples for a single batch.
    """
    batches = num_samples // (batch_size * world_size)
    if not batches:
        ranks = f' on each of {world_size} processes' if world_size > 1 else ''
        raise ValueError(
            f'the training set has {num_samples} samples, not enough for one batch of {batch_size}{ranks}; '
            f'use --batch-size {max(1, num_samples // world_size)} or less')
    return batches


def train_shard(order: np.ndarray, batch_size: int, rank: int, world_size: int, contiguous: bool = False) -> np.ndarray:
    """Samples of a global order that one rank trains on.

    By default ranks take turns, so that step k of all ranks together uses samples [k * B, (k + 1) * B) of the order (B
    is the global batch size) for any number of ranks. With `contiguous`, each rank gets one stretch of the order and so
    reads only its own pages of the file.
    """
    samples = train_batches(len(order), batch_size, world_size) * batch_size
    if contiguous:
        return order[rank * samples:(rank + 1) * samples]
    return order[rank::world_size][:samples]


def eval_shard(num_samples: int, rank: int, world_size: int) -> np.ndarray:
    """Samples that one rank evaluates, in order. Shards differ in length by at most one sample."""
    return np.array_split(np.arange(num_samples), world_size)[rank]
