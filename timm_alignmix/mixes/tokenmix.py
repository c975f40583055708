"""TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers, ECCV 2022, arXiv 2207.08409.

Patches of the partner replace those of the example under a mask of several rectangles on the model's grid. The weights
of the two targets are what the patches that are left of an image have of its scores, which sum to 1 over the image. So
the weights of a pair need not sum to 1.

This is the teacher-free form: the published scores are maps of another, larger network for the own class. Here they are
the attention of the class token of the trained model itself, in evaluation mode, on the clean images, unless a callable
brings other maps. Other departures from the published code: grids of any shape and patch size, pairs are a random
permutation, and label smoothing is that of each target times its weight, where the code takes half of it from either.
"""
import math
from collections.abc import Callable

import torch

from ..anatomy import Anatomy
from ..functional._precision import at_least_fp32
from ..step_random import StepRandom
from .base import Draw, WeighedPair
from .registry import register_mix

_LOG_ASPECT = math.log(0.3)  # of rectangles: from 0.3 to 1 / 0.3
_TRIES = 10


@register_mix('tokenmix')
class TokenMix(WeighedPair):
    """TokenMix: mix patches, weigh the targets by the scores of those that are left. For models on a grid of patches.

    Args:
        prob: Probability of mixing patches; the other steps are input mixup.
        input_alpha: lam ~ Beta(input_alpha, input_alpha) of the input-mixup steps.
        scores: 'attention', that of the class token on the clean images, about a third of a step more; 'area', the same
            for all patches; or a callable of images (B, 3, H, W) and targets (B,) or (B, C) that returns scores >= 0 of
            the patches for the own class, (B, R), row by row.
        mask: 'block', rectangles, or 'random', any patches.
        normalize: Divide the two weights by their sum; the published loss is binary cross-entropy, which needs no sum.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_vit', num_classes=10), 'tokenmix', dict(prob=1.0), img_size=64)
        >>> task(torch.randn(3, 3, 64, 64), torch.arange(3))['lam'].shape
        torch.Size([3])
    """

    def __init__(
            self,
            prob: float = 0.5,
            input_alpha: float = 0.8,
            scores: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = 'attention',
            mask: str = 'block',
            normalize: bool = False,
    ) -> None:
        super().__init__(prob, input_alpha=input_alpha, mode='tokens')
        if scores not in ('attention', 'area') and not callable(scores) or mask not in ('block', 'random'):
            raise ValueError(
                "scores must be 'attention', 'area' or a callable and mask 'block' or 'random', got "
                f'scores={scores!r}, mask={mask!r}')
        self.scores, self.mask, self.normalize = scores, mask, normalize
        self.clean_pass = 'target' if callable(scores) else 'forward' if scores == 'attention' else None

    def bind(self, anatomy: Anatomy) -> None:
        if self.scores == 'attention':
            attention = anatomy.class_attention()
            self.watched, self.patch = {attention.name: attention}, attention.patch
        else:
            self.patch = anatomy.patch()

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        rows, columns = self.patch.grid(H, W)
        pasted = draw_patches(rows, columns, self.mask == 'random', rng.host)
        y, x = ((torch.arange(side) / patch).long() for side, patch in zip((H, W), self.patch, strict=True))
        kept = ~pasted.index_select(0, y).index_select(1, x)
        perm = torch.randperm(B, generator=rng.device, device=images.device)
        draw: Draw = dict(perm=perm, mask=kept.view(1, 1, H, W).to(images.device, non_blocking=True))
        if self.clean_pass:
            draw['pasted'] = pasted.flatten().to(images.device, non_blocking=True)
        if self.clean_pass == 'forward':
            draw['clean_layer'] = next(iter(self.watched))
        return draw

    def complete_mask(
            self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        score_BR = self.scores(images, target) if callable(self.scores) else seen
        R = len(draw['pasted'])
        if score_BR.shape != (len(images), R):
            raise ValueError(
                f'tokenmix needs scores of {R} patches of each image, ({len(images)}, {R}), got '
                f'{tuple(score_BR.shape)}')
        score_BR = at_least_fp32(score_BR)
        # Images without any score count by area.
        score_BR = torch.where(score_BR.sum(dim=1, keepdim=True) > 0, score_BR, 1)
        pasted_B = (score_BR * draw['pasted']).sum(dim=1) / score_BR.sum(dim=1)
        lam, partner_lam = 1 - pasted_B, pasted_B.index_select(0, draw['perm'])
        if not self.normalize:
            return dict(lam=lam, partner_lam=partner_lam)
        total = lam + partner_lam
        return dict(lam=torch.where(total > 0, lam / total, 0.5))


def draw_patches(rows: int, columns: int, scattered: bool, generator: torch.Generator) -> torch.Tensor:
    """Draw the patches of a grid that come from the partner: half of them and 14 more, or few less.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        scattered: Take any patches instead of rectangles.
        generator: CPU generator.

    Returns:
        (rows, columns) bool, on the host.

    Example:
        >>> int(draw_patches(14, 14, True, torch.Generator()).sum())
        112
    """
    R = rows * columns
    wanted = min(R, R // 2 + 14)
    if scattered:
        return (torch.randperm(R, generator=generator) < wanted).view(rows, columns)
    pasted = torch.zeros(rows, columns, dtype=torch.bool)
    count = 0
    while count < wanted:
        for _ in range(_TRIES):
            u, v, *place = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            area, aspect = 1 + u * (wanted - count - 1), math.exp(_LOG_ASPECT * (2 * v - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(place[0] * (rows - height + 1)), int(place[1] * (columns - width + 1))
            box = pasted[top:top + height, left:left + width]
            added = height * width - int(box.sum())
            if 0 < added <= wanted - count:
                box.fill_(True)
                count += added
                break
        else:
            break
    return pasted
