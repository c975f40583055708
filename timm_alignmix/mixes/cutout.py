"""Cutout: Improved Regularization of Convolutional Neural Networks with Cutout, arXiv 1708.04552.

Section 3.2: a square whose centre is any pixel, so that part of it may be outside of the image; labels stay. The square
is as in the published code: rows and columns [c - L // 2, c + L // 2), so an odd L is one pixel less. It is 0 after
normalisation, the mean colour. The paper has L = 16 for CIFAR-10 and 8 for CIFAR-100; half the shorter side of other
images is our choice.
"""
from typing import Any

import torch

from ..functional import box_around, inside
from ..step_random import StepRandom
from .base import Draw, Mix
from .registry import register_mix


@register_mix('cutout')
class Cutout(Mix):
    """Cutout: blank squares of each image.

    Args:
        length: Side of a square in pixels; None is half of the image's shorter side.
        n_holes: Squares in each image.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'cutout', dict(length=16))
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['loss'].isfinite()
        tensor(True)
    """

    pairs = True  # of an example with itself

    def __init__(self, length: int | None = None, n_holes: int = 1) -> None:
        super().__init__()
        if length is not None and length < 1 or n_holes < 1:
            raise ValueError(f'need length >= 1 or None and n_holes >= 1, got length={length}, n_holes={n_holes}')
        self.length, self.n_holes = length, n_holes

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        length = min(H, W) // 2 if self.length is None else self.length
        options: dict[str, Any] = dict(generator=rng.device, device=images.device)
        centre = torch.stack([torch.randint(n, (B * self.n_holes,), **options) for n in (H, W)], dim=1)
        holes = inside(box_around(centre, torch.full_like(centre[:1], length // 2 * 2), H, W), H, W)
        holes = holes.view(B, self.n_holes, H, W).any(dim=1, keepdim=True)
        return dict(mode='input', layer=None, lam=None, holes=holes)

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return images.masked_fill(draw['holes'], 0)
