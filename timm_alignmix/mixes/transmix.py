"""TransMix: Attend to Mix for Vision Transformers, CVPR 2022, arXiv 2111.09833.

CutMix whose target follows the attention of the class token in the last block, on the mixed images, in the same
forward: lam is the mean of the box's complement in area and of its share in the attention to the patches. The half is
that of the authors' code (issue #7 there). The other steps are input mixup.

Departures from the published code: pairs are a random permutation, not the flipped batch, so odd batches work; grids
need not be square; attention that is all on other tokens leaves lam at the area instead of 0 / 0.
"""
import torch
import torch.nn.functional as F

from ..anatomy import Anatomy
from ..step_random import StepRandom
from .base import Draw, MaskPair, mean_of
from .cutmix import CutMix
from .registry import register_mix


@register_mix('transmix')
class TransMix(MaskPair):
    """TransMix: CutMix that weighs the targets by the model's attention. For models that classify a class token.

    Args:
        alpha: lam ~ Beta(alpha, alpha) of CutMix, before it is corrected to the area of the box.
        per_example: One lam and box for each example instead of one for the batch.
        prob: Probability of CutMix; the other steps are input mixup with targets as usual.
        input_alpha: lam ~ Beta(input_alpha, input_alpha) of the input-mixup steps.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_vit', num_classes=10), 'transmix', dict(prob=1.0), img_size=64)
        >>> task(torch.randn(3, 3, 64, 64), torch.arange(3))['lam'].shape
        torch.Size([3])
    """

    def __init__(
            self,
            alpha: float = 1.0,
            per_example: bool = False,
            prob: float = 0.8,
            input_alpha: float = 0.8,
    ) -> None:
        super().__init__(prob, alpha, per_example, input_alpha=input_alpha, mode='cutmix')
        self.cutmix = CutMix(alpha, per_example)

    def bind(self, anatomy: Anatomy) -> None:
        self.attention = anatomy.class_attention()
        self.watched = {self.attention.name: self.attention}

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        return dict(layer=self.attention.name, **self.cutmix.draw_mask(images, rng))

    def lam(self, record: torch.Tensor | None, draw: Draw) -> torch.Tensor | None:
        if 'mask' not in draw:
            return None
        attention_BR, mask = record.to(draw['lam'].dtype), draw['mask']
        grid = self.attention.patch.grid(*mask.shape[2:])
        if attention_BR.shape[1] != grid[0] * grid[1]:
            raise RuntimeError(
                f'the class token attends to {attention_BR.shape[1]} patches, but images have {grid[0]}x{grid[1]}: '
                'transmix needs them all; create the model with patch_drop_rate=0')
        kept_KR = F.interpolate(mask.to(attention_BR.dtype), grid, mode='nearest').flatten(1)
        total_B, area = attention_BR.sum(dim=1), mean_of(mask)
        share_B = (attention_BR * kept_KR).sum(dim=1) / total_B
        return (area + torch.where(total_B > 0, share_B, area)) / 2
