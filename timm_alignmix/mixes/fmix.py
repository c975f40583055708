"""FMix: Enhancing Mixed Sample Data Augmentation, arXiv 2002.12047.

A grey image of random frequencies, complex Gaussian noise over max(f, 1 / max(H, W))^decay, whose highest
pixels, a share lam of all, show the example and the others its partner. As in the published code, their number is
lam * H * W rounded down or up with equal chance, and the target has the lam that was drawn.

Departure from the published code, see docs/findings.md: that one takes two rows of the noise for the two parts of every
frequency, so its masks hardly vary along rows.
"""
from typing import Any

import torch

from ..step_random import StepRandom, sample_beta
from .base import Draw, MaskPair
from .registry import register_mix


@register_mix('fmix')
class FMix(MaskPair):
    """FMix: mix by a random mask of smooth shapes.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam and mask for each example instead of one for the batch.
        decay: Power by which frequencies decay; less is finer shapes.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'fmix')
        >>> 0 <= task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'] <= 1
        tensor(True)
    """

    def __init__(self, alpha: float = 1.0, per_example: bool = False, decay: float = 3.0) -> None:
        super().__init__(alpha=alpha, per_example=per_example)
        if decay < 0:
            raise ValueError(f'decay must be >= 0, got {decay}')
        self.decay = float(decay)

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        K, device = B if self.per_example else 1, images.device
        options: dict[str, Any] = dict(generator=rng.device, device=device)
        lam = sample_beta(self.alpha, (K,), rng.device)
        frequency = torch.hypot(torch.fft.fftfreq(H, device=device).unsqueeze(1), torch.fft.rfftfreq(W, device=device))
        spectrum = torch.randn(K, *frequency.shape, dtype=torch.complex64, **options)
        grey = torch.fft.irfft2(spectrum / frequency.clamp_min(1 / max(H, W)).pow(self.decay), s=(H, W))
        share = lam.unsqueeze(1).double() * H * W
        count = torch.where(torch.rand(K, 1, **options) > 0.5, share.ceil(), share.floor())
        highest = torch.arange(H * W, device=device) < count
        mask = torch.empty_like(highest).scatter_(1, grey.flatten(1).argsort(dim=1, descending=True), highest)
        perm = torch.randperm(B, **options)
        return dict(perm=perm, mask=mask.view(K, 1, H, W), lam=lam if self.per_example else lam[0])
