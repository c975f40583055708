"""Progressive resizing: train on small images first, as ffcv-imagenet does; evaluation keeps its size."""
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .config import TrainConfig

STEP = 32  # sides between the two ends are multiples of this


def train_resolution(config: 'TrainConfig', epoch: int) -> int | None:
    """Side of the training images of an epoch, None where the size never changes.

    The rule is that of ffcv-imagenet's `get_resolution`: `min_res` up to and with `start_ramp`, `max_res` from
    `end_ramp` on, and between them a straight line, rounded to the nearest multiple of 32.
    """
    if config.min_res is None:
        return None
    if epoch <= config.start_ramp:
        return config.min_res
    if epoch >= config.end_ramp:
        return config.max_res
    side = np.interp(epoch, [config.start_ramp, config.end_ramp], [config.min_res, config.max_res])
    return int(np.round(side / STEP)) * STEP


def train_resolutions(config: 'TrainConfig') -> list[int]:
    """Every side of training images that a run goes through, in the order of first use; none where it never changes."""
    sides = [train_resolution(config, epoch) for epoch in range(max(config.epochs, config.end_ramp + 1))]
    return [side for side in dict.fromkeys(sides) if side is not None]
