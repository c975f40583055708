"""No mixing: the baseline, through the same code as the methods."""
import torch

from ..step_random import StepRandom
from .base import Draw, Mix
from .registry import register_mix


@register_mix('none')
class NoMix(Mix):
    """Clean images and targets, without options.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'none')
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'clean'
    """
    pairs = True

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        return dict(mode='clean', layer=None, lam=None)
