"""SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization, ICLR 2021, arXiv 2006.01791.

A box around the most salient pixel of the partner is pasted at the same place of the example. The saliency is OpenCV's
fine-grained one; in an image of one colour, which has none, the centre is uniform. As in the published code
the box has CutMix's sides, rounded down to even ones, and lam is corrected to the area.

Departures from the published code, see docs/findings.md: it takes the box of one image for the whole batch
(`box='batch'`), and computes the saliency of the bytes of floats, which makes the centre all but random. So
`box='batch', centre='random'` is what the published figures amount to.
"""
from collections.abc import Sequence
from typing import Any

import torch

from ..functional import box_around, box_sides, fine_grained_saliency, inside
from ..step_random import StepRandom, sample_beta
from .base import Draw, MaskPair
from .registry import register_mix


@register_mix('saliencymix')
class SaliencyMix(MaskPair):
    """SaliencyMix: paste the box around the most salient pixel of another image.

    Args:
        alpha: lam ~ Beta(alpha, alpha), before it is corrected to the area of the box.
        per_example: One lam for each example instead of one for the batch.
        prob: Probability of mixing, 0.5 for CIFAR and 1.0 for ImageNet in the paper; the other steps are clean.
        box: 'example', a place for each pair, or 'batch', that of the first pair for all.
        centre: 'saliency', or 'random', any pixel.
        mean: Mean that was subtracted from pixels in [0, 1], per channel; None is that of `Mix.normalization`.
        std: Deviation by which they were divided, likewise.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'saliencymix', dict(prob=1.0))
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'].shape
        torch.Size([4])
    """

    def __init__(
            self,
            alpha: float = 1.0,
            per_example: bool = False,
            prob: float = 0.5,
            box: str = 'example',
            centre: str = 'saliency',
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(prob, alpha, per_example)
        if box not in ('example', 'batch') or centre not in ('saliency', 'random'):
            raise ValueError(
                f"box must be 'example' or 'batch' and centre 'saliency' or 'random', got box={box!r}, "
                f'centre={centre!r}')
        if per_example and box == 'batch':
            raise ValueError("per_example=True draws a box for each example; it needs box='example'")
        self.box, self.centre, self.mean, self.std = box, centre, mean, std

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        options: dict[str, Any] = dict(generator=rng.device, device=images.device)
        perm = torch.randperm(B, **options)
        partner = perm if self.box == 'example' else perm[:1]
        lam = sample_beta(self.alpha, (B if self.per_example else 1, 1), rng.device)
        centre = torch.stack([torch.randint(n, partner.shape, **options) for n in (H, W)], dim=1)
        if self.centre == 'saliency':
            saliency = fine_grained_saliency(self.pixels(images.index_select(0, partner))).flatten(1)
            largest, place = saliency.max(dim=1, keepdim=True)
            centre = torch.where(largest > 0, torch.cat([place // W, place % W], dim=1), centre)
        box = box_around(centre, box_sides(lam, H, W) // 2 * 2, H, W)
        return dict(perm=perm, box=box, mask=~inside(box, H, W))

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """8-bit pixels of normalised images, int32."""
        mean, std = self.mean or self.normalization[0], self.std or self.normalization[1]
        if not len(mean) == len(std) == images.shape[1]:
            raise ValueError(
                f'saliencymix needs the mean and deviation of each of {images.shape[1]} channels, got mean={mean} and '
                f'std={std}: set its options mean and std')
        # Numbers of Python go to the device without a wait; a tensor of them would not.
        channels = [channel * (255 * s) + 255 * m for channel, m, s in zip(images.unbind(1), mean, std, strict=True)]
        return torch.stack(channels, dim=1).round().clamp(0, 255).int()
