"""Composition of training batches: pure functions of (seed, epoch), the same for any number of processes."""
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from alignmix_lab.data.order import shuffled, train_batches

from .annotations import Record


def aspect_ratio_groups(records: Sequence[Record], factor: int) -> np.ndarray:
    """Group images by width / height, as torchvision's detection reference does.

    There are `factor` bins per octave of the ratio between 1/2 and 2, plus a bin on each side; a factor of 0 makes a
    single group. Returns the group number of each image.
    """
    if not factor:
        return np.zeros(len(records), dtype=int)
    ratios = np.array([record.width / record.height for record in records])
    return np.digitize(ratios, 2.0 ** np.linspace(-1, 1, 2 * factor + 1))


def grouped_order(order: np.ndarray, groups: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Reorder samples so that nearly every batch has a single group, and return those of all full batches in a row.

    The samples of a group fill batches in the given order. The remainders of all groups, less than a batch each, fill
    batches together, so that no more samples are dropped than without groups. Finally the batches are shuffled.

    Args:
        groups: Group of every sample number.
        batch_size: Samples per batch over all processes.
    """
    batches, rest = [], []
    for group in np.unique(groups):
        samples = order[groups[order] == group]
        full = len(samples) // batch_size * batch_size
        batches.extend(samples[:full].reshape(-1, batch_size))
        rest.append(samples[full:])
    rest = np.concatenate(rest)
    full = len(rest) // batch_size * batch_size
    # The end of the rest is dropped; the roll makes it another group's in each epoch.
    batches.extend(np.roll(rest, rng.integers(len(rest)) if len(rest) else 0)[:full].reshape(-1, batch_size))
    return np.stack([batches[i] for i in rng.permutation(len(batches))]).ravel()


class TrainBatches(Sampler[list[int]]):
    """Full batches of one process; over all processes each image is used at most once per epoch.

    `epoch` and `start`, the number of batches to skip, select what the next iteration yields.

    Args:
        groups: Group of every image; see aspect_ratio_groups().
        batch_size: Images per batch of one process, whose number among `world_size` is `rank`.

    Raises:
        ValueError: There are not enough images for a batch.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, seed: int, rank: int, world_size: int):
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self._length = train_batches(len(groups), batch_size, world_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        order = shuffled(len(self.groups), self.seed, self.epoch)
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        order = grouped_order(order, self.groups, self.batch_size * self.world_size, rng)
        for batch in order.reshape(self._length, self.batch_size, self.world_size)[self.start:, :, self.rank]:
            yield batch.tolist()
