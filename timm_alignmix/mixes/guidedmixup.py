"""GuidedMixup: An Efficient Mixup Strategy Guided by Saliency Maps, AAAI 2023, arXiv 2306.16612.

z = s / (s + s') at each pixel, for the saliency s of the example and s' of its partner, both blurred and scaled to the
sum 1; lam is the mean of z. Partners are far apart: a greedy cycle through the batch, by the l2 distance of s. Saliency
is the spectral residual ("SR") or the gradient of the clean loss ("AP"). A constant keeps blank images from dividing 0
by 0.

Departure from the published code of CIFAR and TinyImageNet, see docs/findings.md: that one draws partners at random
(`pairing='random'`), whatever its flags say. Its gradients are those of the model in training mode.
"""
import torch

from ..functional import gaussian_blur, greedy_cycle, shares, spectral_residual
from ..step_random import StepRandom
from .base import Draw, MaskPair
from .registry import register_mix

_TINY = 1e-12  # far below the saliency of any picture


@register_mix('guidedmixup')
class GuidedMixup(MaskPair):
    """GuidedMixup: keep of each image of a pair what is more salient there.

    Args:
        saliency: 'sr', the spectral residual of the images, or 'ap', the gradient of the clean loss with respect to
            them, about two thirds of a step more.
        pairing: 'greedy', or 'random'.
        prob: Probability of mixing, 0.5 for 'sr' and 0.8 for 'ap' in the paper; the other steps are clean.
        saliency_mode: Mode of the model in the pass for 'ap', 'eval' or 'train'.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'guidedmixup', dict(prob=1.0))
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'].shape
        torch.Size([4])
    """

    def __init__(
            self,
            saliency: str = 'sr',
            pairing: str = 'greedy',
            prob: float = 0.5,
            saliency_mode: str = 'eval',
    ) -> None:
        super().__init__(prob, clean_pass=saliency_mode if saliency == 'ap' else None)
        if saliency not in ('sr', 'ap') or pairing not in ('greedy', 'random'):
            raise ValueError(
                f"saliency must be 'sr' or 'ap' and pairing 'greedy' or 'random', got saliency={saliency!r}, "
                f'pairing={pairing!r}')
        self.pairing = pairing

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        draw = {}
        if self.pairing == 'random':
            draw['perm'] = torch.randperm(len(images), generator=rng.device, device=images.device)
        if self.clean_pass:
            return draw
        with torch.autocast(images.device.type, enabled=False):
            return self.complete_mask(images, draw, spectral_residual(images))

    def complete_mask(
            self, images: torch.Tensor, draw: Draw, saliency_BHW: torch.Tensor,
            target: torch.Tensor | None = None) -> Draw:
        with torch.autocast(images.device.type, enabled=False):
            if self.clean_pass:  # gradients of a trained model may be smaller than any constant
                saliency_BHW = shares(saliency_BHW)
            s = gaussian_blur(saliency_BHW) + _TINY
            s = s / s.sum(dim=(1, 2), keepdim=True)
            perm = draw['perm'] if 'perm' in draw else greedy_cycle(torch.cdist(s.flatten(1), s.flatten(1)))
            return dict(perm=perm, mask=(s / (s + s.index_select(0, perm))).unsqueeze(1))
