"""zeta-Mixup: Richer, More Realistic Synthetic Samples from a p-Series Interpolant, Journal of Big Data 2024, arXiv
2204.03323.

Each output mixes the whole batch with the weights w_j = j^-gamma / sum_k k^-gamma, j = 1 to B. Its own example has w_1,
the others w_2 to w_B in a random order of its own; images and targets are mixed alike. The batch of the step is mixed
as it is, so a smaller last batch has somewhat larger weights, as in the published code.
"""
import torch

from ..step_random import StepRandom
from .base import Draw, Mix, mix_examples
from .registry import register_mix


@register_mix('zeta')
class ZetaMixup(Mix):
    """zeta-Mixup: every example with all others of the batch, by weights that fall as a power of their rank.

    Args:
        gamma: Power. From 1.72865 on, the example itself has half of the weight or more in a batch of any size.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'zeta', dict(gamma=3.0))
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'input'
    """

    def __init__(self, gamma: float = 2.8) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f'gamma must be > 0, got {gamma}')
        self.gamma = float(gamma)

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, device = len(images), images.device
        # Sorting noise orders each row; the diagonal comes first.
        noise_BB = torch.rand(B, B, generator=rng.device, device=device).fill_diagonal_(-1)
        weight_B = torch.arange(1, B + 1, dtype=torch.float64, device=device).pow(-self.gamma)
        weight_BB = (weight_B / weight_B.sum()).float().expand(B, B)
        weights = torch.empty_like(noise_BB).scatter_(1, noise_BB.argsort(dim=1), weight_BB)
        return dict(mode='input', layer=None, lam=None, weights=weights)

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_examples(images, draw['weights'])

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_examples(target_BC, draw['weights'])
