"""Sample order of an epoch: pure functions of (seed, epoch, rank), shared by all loaders.

Unlike torch's DistributedSampler, nothing is padded. In training, a sample is used at most once per epoch, unless
:func:`balanced` or :func:`repeated` repeat some, and all ranks get the same number of batches; in evaluation, each
sample is used exactly once, so ranks may differ by a batch.
"""
import numpy as np

REPEAT = 2**40  # between the numbers of a sample that comes several times in an epoch; see numbered()


def shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Random permutation of the samples. The pair is hashed: epoch 1 of seed 0 differs from epoch 0 of seed 1."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def balanced(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Random order, as long as `labels` (N,), in which every class comes equally often.

    It goes through all classes, in a new random order each round, so that in any part of it from the start the counts
    of two classes differ by at most 1. A class deals out its samples, shuffled, then again: the counts of two samples
    of a class differ by at most 1 too.

    Example:
        >>> order = balanced(np.array([0, 0, 0, 0, 0, 1]), seed=0, epoch=0)
        >>> (order == 5).sum()
        np.int64(3)
    """
    rng = np.random.default_rng([seed, epoch])
    _, counts = np.unique(labels, return_counts=True)
    rounds = -(-len(labels) // len(counts))
    draws = []
    for members in np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1]):
        passes = np.tile(members, (-(-rounds // len(members)), 1))
        draws.append(rng.permuted(passes, axis=1).ravel()[:rounds])
    return rng.permuted(np.stack(draws, axis=1), axis=1).ravel()[:len(labels)]


def repeated(order: np.ndarray, repeats: float) -> np.ndarray:
    """Order for repeated augmentation (1901.09335): each sample `repeats` times in a row, cut to the same length.

    As in timm's RepeatAugSampler: ranks take turns, so the copies of a sample go to different ranks, or into the same
    batch. An epoch has as many steps as ever, and uses one in `repeats` of the samples. The sampler's rounding of the
    number of samples to a multiple of 256 is left out, since only full batches are used.

    Example:
        >>> repeated(np.array([4, 2, 0, 3, 1]), 1.5)
        array([4, 4, 2, 0, 0])
    """
    return order[(np.arange(len(order)) // repeats).astype(int)]


def numbered(order: np.ndarray) -> np.ndarray:
    """Numbers that tell apart the copies of a sample in an order: its index, plus REPEAT for every copy before.

    Example:
        >>> numbered(np.array([7, 5, 7, 7])) // REPEAT
        array([0, 0, 1, 2])
    """
    places = np.argsort(order, kind='stable')
    together = order[places]
    copies = np.empty_like(order)
    copies[places] = np.arange(len(order)) - np.searchsorted(together, together)
    return order + REPEAT * copies


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
