"""mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.

Pairs are a random permutation of the batch, not timm's flipped batch, so odd batches work too.
"""
import torch

from ..step_random import StepRandom
from .base import Draw, PairMix
from .registry import register_mix


@register_mix('mixup')
class Mixup(PairMix):
    """Input mixup.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam for each example instead of one for the batch.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'mixup', dict(per_example=True))
        >>> task(torch.randn(5, 3, 64, 64), torch.arange(5))['lam'].shape
        torch.Size([5])
    """

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        return dict(mode='input', layer=None, **self.draw_pair(images, rng))
