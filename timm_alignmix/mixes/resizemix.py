"""ResizeMix: Mixing Data with Preserved Object Information and True Labels, arXiv 2012.11101.

The whole partner, resized by a factor tau ~ U(low, high), is pasted at a uniform place; lam = 1 minus its
share of the area. There is no official code. Open in the paper, and our choice: the patch is inside of the image, and
resized bilinearly with antialiasing.
"""
import torch
import torch.nn.functional as F

from ..step_random import StepRandom
from .base import Draw, MaskPair, partners_of
from .registry import register_mix


@register_mix('resizemix')
class ResizeMix(MaskPair):
    """ResizeMix: paste another image, made smaller. One size and place for the batch.

    Args:
        low: Smallest factor of the sides.
        high: Largest factor of the sides, at most 1.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'resizemix')
        >>> 0.36 <= task(torch.randn(4, 3, 64, 64), torch.arange(4))['lam'] < 1
        tensor(True)
    """

    def __init__(self, low: float = 0.1, high: float = 0.8) -> None:
        super().__init__()
        if not 0 < low <= high <= 1:
            raise ValueError(f'need 0 < low <= high <= 1, got low={low}, high={high}')
        self.low, self.high = low, high

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        tau, *place = torch.rand(3, generator=rng.host, dtype=torch.float64).tolist()
        tau = self.low + (self.high - self.low) * tau
        box = [slice(start := int(u * (n - size + 1)), start + size)
               for u, n, size in zip(place, (H, W), (max(int(tau * H), 1), max(int(tau * W), 1)), strict=True)]
        mask = torch.ones(1, 1, H, W, dtype=torch.bool, device=images.device)
        mask[..., box[0], box[1]] = False
        return dict(perm=torch.randperm(B, generator=rng.device, device=images.device), mask=mask, box=box)

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        rows, columns = draw['box']
        sides = (rows.stop - rows.start, columns.stop - columns.start)
        mixed = images.clone()
        mixed[..., rows, columns] = F.interpolate(
            partners_of(images, draw['perm']), sides, mode='bilinear', antialias=True)
        return mixed
