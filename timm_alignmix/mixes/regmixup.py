"""RegMixup: Mixup as a Regularizer Can Surprisingly Improve Accuracy and Out Distribution Robustness, NeurIPS 2022,
arXiv 2206.14502.

The loss is the cross-entropy of the clean batch plus eta times that of its input mixup, with lam ~ Beta(alpha, alpha)
near 1/2. Both halves run as one batch of 2B, as in the published code, so they share statistics of batch norm.
Departure: that code averages over all 2B rows, which is half of the paper's sum at eta = 1; here it is the sum, so
learning rates are on the paper's scale. Its commands have alpha = 20 for CIFAR-10 and 10 for CIFAR-100.
"""
import torch

from ..functional import target_mass
from ..step_random import StepRandom
from .base import Draw, PairMix
from .registry import register_mix


@register_mix('regmixup')
class RegMixup(PairMix):
    """RegMixup: train on the clean batch, and on its mixup beside it.

    The model gets 2B images. Targets of a mixup function sum to 2 in the clean half and to 2 eta in the mixed one, so
    that their mean softmax cross-entropy over rows is the paper's sum of two means.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam for each example instead of one for the batch.
        eta: Weight of the mixed half.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'regmixup')
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['output'].shape
        torch.Size([8, 10])
    """
    pairs = False

    def __init__(self, alpha: float = 10.0, per_example: bool = False, eta: float = 1.0) -> None:
        super().__init__(alpha, per_example)
        if eta < 0:
            raise ValueError(f'eta must be >= 0, got {eta}')
        self.eta = float(eta)

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        return dict(mode='input', layer=None, **self.draw_pair(images, rng))

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return torch.cat([images, super().images(images, draw)])

    def loss(self, output, feature_map, target, draw, criterion):
        clean, mixed = output.chunk(2)
        target_BC = criterion.soft_target(target, output)
        return criterion(clean, target_BC) + self.eta * criterion(mixed, super().target(target_BC, draw))

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return torch.cat([2 * target_BC, 2 * self.eta * super().target(target_BC, draw)])

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        clean, mixed = output.chunk(2)
        return torch.cat([target_mass(clean, target), super().mass(mixed, target, draw)])

    def num_rows(self, batch: int, draw: Draw) -> int:
        return 2 * batch
