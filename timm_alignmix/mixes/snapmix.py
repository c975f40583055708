"""SnapMix: Semantically Proportional Mixing for Augmenting Fine-grained Data, AAAI 2021, arXiv 2012.04846.

A box of the partner is resized into another box of the example. The weights of the two targets are what is left of the
class activation map of the example, and what the box has of that of the partner, each for the own class, enlarged to
the image, minus its minimum and divided by its sum. They need not sum to 1. As in the published code, a pair of one
class gives both targets the sum of both weights, and boxes of no area leave the batch clean.

Departures from the published code: boxes keep odd sides, as CutMix's in this package; the maps come from the model in
evaluation mode, where the code moves running statistics twice a step; they are those of the vector that the classifier
sees, so any head that is a chain of modules will do; a map of one value counts as area.
"""
import torch
import torch.nn.functional as F

from ..anatomy import Anatomy
from ..functional import box_around, box_sides, class_activation
from ..step_random import StepRandom, sample_beta
from .base import Draw, WeighedPair, partners_of
from .registry import register_mix


@register_mix('snapmix')
class SnapMix(WeighedPair):
    """SnapMix: paste a box of another image, of any size, and weigh the targets by class activation maps.

    Each step that mixes first runs the model on the clean images, about a third of a step more.

    Args:
        alpha: 1 - lam ~ Beta(alpha, alpha) is the area of each of the two boxes, before they are clipped.
        prob: Probability of mixing; the other steps are clean.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), 'snapmix', img_size=64)
        >>> task(torch.randn(3, 3, 64, 64), torch.arange(3))['lam'].shape
        torch.Size([3])
    """

    def __init__(self, alpha: float = 5.0, prob: float = 1.0) -> None:
        super().__init__(prob, alpha)
        self.clean_pass = 'forward'

    def bind(self, anatomy: Anatomy) -> None:
        self.head = anatomy.dense_head()

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        B, _, H, W = images.shape
        # On the host, because shapes depend on it.
        sides = box_sides(sample_beta(self.alpha, (2, 1), rng.host), H, W)
        centre = torch.cat([torch.randint(n, (2, 1), generator=rng.host) for n in (H, W)], dim=1)
        box, source = box_around(centre, sides, H, W).tolist()
        if not (_area(box) and _area(source)):
            box = source = [0, 0, 0, 0]
        perm = torch.randperm(B, generator=rng.device, device=images.device)
        mask = torch.ones(1, 1, H, W, dtype=torch.bool, device=images.device)
        _cut(mask, box).fill_(False)
        return dict(perm=perm, mask=mask, box=box, source=source, clean_layer=self.head.name)

    def complete_mask(
            self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        perm, map_BHW = draw['perm'], self.activation(images, seen, target)
        pasted = _cut(map_BHW, draw['box']).sum(dim=(1, 2))
        source = _cut(map_BHW, draw['source']).sum(dim=(1, 2)).index_select(0, perm)
        lam, partner_lam = 1 - pasted, source
        same = target == target.index_select(0, perm)
        same = same if same.ndim == 1 else same.all(dim=1)
        both = lam + partner_lam
        return dict(lam=torch.where(same, both, lam), partner_lam=torch.where(same, both, partner_lam))

    def activation(self, images: torch.Tensor, feature_map: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Class activation maps of the own classes at the size of the images, each of sum 1."""
        H, W = images.shape[2:]
        score_BR = class_activation(self.head.embeddings(feature_map), self.head.weight(), target)
        grid_BHW = score_BR.unflatten(1, self.head.layout.grid(feature_map, H, W))
        map_BHW = F.interpolate(grid_BHW.unsqueeze(1), (H, W), mode='bilinear').squeeze(1)
        map_BHW = map_BHW - map_BHW.amin(dim=(1, 2), keepdim=True)
        total = map_BHW.sum(dim=(1, 2), keepdim=True)
        return torch.where(total > 0, map_BHW / total, 1 / (H * W))

    def mix_images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        box, mixed = draw['box'], images.clone()
        if _area(box):
            patch = _cut(partners_of(images, draw['perm']), draw['source'])
            sides = (box[2] - box[0], box[3] - box[1])
            _cut(mixed, box).copy_(F.interpolate(patch, sides, mode='bilinear', align_corners=True))
        return mixed


def _area(box: list[int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _cut(x: torch.Tensor, box: list[int]) -> torch.Tensor:
    """View of the pixels in a box."""
    return x[..., box[0]:box[2], box[1]:box[3]]
