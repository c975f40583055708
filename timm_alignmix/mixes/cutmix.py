"""CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019, arXiv 1905.04899.

The box is that of timm.data.mixup.rand_bbox with margin 0, and lam is corrected to the area that is pasted. Unlike
timm's, both are drawn from the generators of the step, and pairs are a random permutation.
"""
import torch

from ..functional import box_around, box_sides, inside
from ..step_random import StepRandom, sample_beta
from .base import Draw, MaskPair
from .registry import register_mix


@register_mix('cutmix')
class CutMix(MaskPair):
    """CutMix: paste a box of another image.

    Args:
        alpha: lam ~ Beta(alpha, alpha), before it is corrected to the area of the box.
        per_example: One lam and box for each example instead of one for the batch.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'cutmix')
        >>> 0 <= task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'] <= 1
        tensor(True)
    """

    def __init__(self, alpha: float = 1.0, per_example: bool = False) -> None:
        super().__init__(alpha=alpha, per_example=per_example)

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        shape = (B, 1) if self.per_example else (1, 1)
        lam = sample_beta(self.alpha, shape, rng.host)
        centre = torch.cat([torch.randint(n, shape, generator=rng.host) for n in (H, W)], dim=1)
        box = box_around(centre, box_sides(lam, H, W), H, W).to(images.device, non_blocking=True)
        perm = torch.randperm(B, generator=rng.device, device=images.device)
        return dict(perm=perm, box=box, mask=~inside(box, H, W))
