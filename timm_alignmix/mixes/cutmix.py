"""CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019, arXiv 1905.04899.

The box is that of timm.data.mixup.rand_bbox with margin 0, and lam is corrected to the area that is pasted. Unlike
timm's, both are drawn from the generators of the step, and pairs are a random permutation.
"""
import torch

from ..step_random import StepRandom, sample_beta
from .base import Draw, PairMix, partners_of
from .registry import register_mix


@register_mix('cutmix')
class CutMix(PairMix):
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

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        shape = (B, 1) if self.per_example else (1, 1)
        lam = sample_beta(self.alpha, shape, rng.host)
        centre = torch.cat([torch.randint(n, shape, generator=rng.host) for n in (H, W)], dim=1)
        box = box_around(centre, lam, H, W)
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        lam = 1 - area / (H * W)
        device = images.device
        return dict(
            mode='input',
            layer=None,
            lam=(lam if self.per_example else lam[0]).to(device, non_blocking=True),
            box=box.to(device, non_blocking=True),
            perm=torch.randperm(B, generator=rng.device, device=device),
        )

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        H, W = images.shape[2:]
        top, left, bottom, right = draw['box'].view(-1, 4, 1, 1, 1).unbind(dim=1)
        y = torch.arange(H, device=images.device).view(1, 1, H, 1)
        x = torch.arange(W, device=images.device).view(1, 1, 1, W)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        return torch.where(inside, partners_of(images, draw['perm']), images)


def box_around(centre: torch.Tensor, lam: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Boxes of a share 1 - lam of the image around centres, clipped to it.

    Args:
        centre: (K, 2) rows and columns.
        lam: (K, 1).
        H: Height of the image.
        W: Width of the image.

    Returns:
        (K, 4) top, left, bottom, right; the last two exclusive.
    """
    side = torch.tensor([H, W])
    cut = (side * (1 - lam.double()).sqrt()).int()
    return torch.cat([(centre - cut // 2).clamp_min(0), torch.minimum(centre + (cut + 1) // 2, side)], dim=1)
