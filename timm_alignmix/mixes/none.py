"""No mixing: the baseline every method is compared with, through the same code."""
import torch

from ..step_random import StepRandom
from .base import Draw, Mix
from .registry import register_mix


@register_mix('none')
class NoMix(Mix):
    """Clean images and targets. No options."""

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        return dict(mode='clean', layer=None, lam=None)
