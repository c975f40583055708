"""SSD and Faster R-CNN of torchvision on any timm backbone.

Both take a list of RGB images, float (3, H, W) with values in [0, 1], and normalise them inside with the mean and std
that belong to the backbone's weights, so data transforms must not. In training they also take a list of targets (dicts
of `boxes` (N, 4) xyxy in pixels and `labels` (N,) int64 from 1; 0 is the background) and return a dict of losses; in
evaluation they return a list of dicts of `boxes`, `scores` and `labels`.
"""
import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign

from .backbones import Backbone, PyramidBackbone, SimpleFeaturePyramid, create_backbone

# Keyword arguments of the backbone; every other one goes to torchvision's detector.
_BACKBONE_OPTIONS = [
    name for name, p in inspect.signature(create_backbone).parameters.items() if p.kind is p.KEYWORD_ONLY]


def build_faster_rcnn(
        backbone: str,
        num_classes: int,
        weights: str | Path | None = None,
        *,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        fixed_size: tuple[int, int] | None = None,
        fpn_channels: int = 256,
        **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid.

    Papers: `Faster R-CNN` - https://arxiv.org/abs/1506.01497, `Feature Pyramid Networks` -
    https://arxiv.org/abs/1612.03144. On 'resnet50' it is torchvision's fasterrcnn_resnet50_fpn, with the same keys.

    Args:
        backbone: timm name with or without a tag, folder of exported weights, 'local-dir:FOLDER' or 'hf-hub:NAME'.
        num_classes: Number of classes, including the background.
        weights: Folder, tag or name as above, or a training checkpoint; None for random weights.
        min_size: Shorter image side in pixels. With several, training draws one per image and evaluation uses the last.
        max_size: Upper limit of the longer side.
        fixed_size: (H, W) to resize all images to instead; networks built for one image size (LeViT) need it.
        fpn_channels: Channels of the pyramid.
        kwargs: Options of `create_backbone`, and arguments of torchvision's FasterRCNN, e.g. box_score_thresh. By
            default pretrained backbones have their batch norms and first stage frozen, as in torchvision; random batch
            norms train, because activations explode when they are frozen.

    Returns:
        The detector; its `backbone_report` lists what was loaded.

    Raises:
        ValueError: See `create_backbone`.
    """
    options = dict(
        freeze_bn=weights is not None, frozen_stages=None, image_size=fixed_size) | _backbone_options(kwargs)
    net = create_backbone(partial(PyramidBackbone, out_channels=fpn_channels), backbone, weights, **options)
    coarsest = net.levels[-2]  # the pooled level rounds up, as in torchvision
    if fixed_size is not None and any(side % coarsest for side in fixed_size):
        near = tuple(-(-side // coarsest) * coarsest for side in fixed_size)
        raise ValueError(
            f'fixed_size {tuple(fixed_size)} is no multiple of {coarsest}, the coarsest stride of {net.report.arch}; '
            f'pass fixed_size={near}')
    detector = FasterRCNN(
        net,
        num_classes,
        min_size=min_size,
        max_size=max_size,
        fixed_size=None if fixed_size is None else tuple(reversed(fixed_size)),  # torchvision wants (W, H)
        size_divisible=max(32, coarsest),
        image_mean=list(net.report.image_mean),
        image_std=list(net.report.image_std),
        # One anchor size per level, 8 times its stride: 32 to 512 on strides 4 to 64, as in the paper.
        rpn_anchor_generator=AnchorGenerator(
            tuple((8 * stride,) for stride in net.levels), ((0.5, 1.0, 2.0),) * len(net.levels)),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(net.levels) - 1)], 7, 2),
        **kwargs,
    )
    _predict_in_float32(detector.rpn.head, detector.roi_heads.box_predictor)
    detector.backbone_report = net.report
    return detector


def build_ssd(
        backbone: str, num_classes: int, size: int = 300, weights: str | Path | None = None, *,
        conv4_stride1: bool = False, **kwargs: Any) -> SSD:
    """SSD on the backbone's maps of strides 8, 16 and 32 and on extra layers down to a single position.

    Paper: `SSD: Single Shot MultiBox Detector` - https://arxiv.org/abs/1512.02325. At 300 pixels the maps are 38, 19,
    10, 5, 3 and 1 positions wide, with 8,732 default boxes; at 512 pixels 64 to 1, with 24,564, as in the paper.

    Args:
        backbone, num_classes, weights: See `build_faster_rcnn`.
        size: Side of the square input in pixels.
        conv4_stride1: For ResNets: end with layer3 at stride 8 and drop layer4, as NVIDIA's SSD does.
        kwargs: Options of `create_backbone`, and arguments of torchvision's SSD, e.g. score_thresh.

    Returns:
        The detector; its `backbone_report` lists what was loaded.

    Raises:
        ValueError: See `create_backbone`; `conv4_stride1` on a network that is not a ResNet; a size with fewer than
            three maps.
    """
    options = {'image_size': (size, size), **_backbone_options(kwargs)}
    net = create_backbone(partial(SSDBackbone, conv4_stride1=conv4_stride1), backbone, weights, **options)
    levels = len(net.steps)
    if levels < 3:
        raise ValueError(f'SSD at size {size} has {levels} maps on {net.report.arch}; pass a larger size')
    boxes = DefaultBoxGenerator(
        aspect_ratios=[[2], *[[2, 3]] * (levels - 3), [2], [2]],
        # From 15 % of the image on the first map; before it, the paper's small box for that map.
        scales=[0.07, *(0.15 + 0.9 * i / (levels - 1) for i in range(levels))],
        steps=net.steps,
    )
    detector = SSD(
        net, boxes, (size, size), num_classes, list(net.report.image_mean), list(net.report.image_std), **kwargs)
    _predict_in_float32(detector.head)
    detector.backbone_report = net.report
    return detector


def _backbone_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of the backbone from a detector's arguments and return them."""
    return {name: kwargs.pop(name) for name in _BACKBONE_OPTIONS if name in kwargs}


def _predict_in_float32(*heads: nn.Module) -> None:
    """Decode boxes in float32 under autocast: torchvision decodes them in the dtype of the heads' outputs, and bfloat16
    has no coordinate between 256 and 258."""
    for head in heads:
        head.register_forward_hook(_float32_outputs)


def _float32_outputs(module: nn.Module, args: Any, outputs: Any) -> Any:
    if isinstance(outputs, dict):
        return {key: value.float() for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_float32_outputs(module, args, value) for value in outputs)
    return outputs.float()


class SSDBackbone(Backbone):
    """A backbone's maps from stride 8 on, followed by extra layers down to a single position.

    Args:
        body, name, image_size: See Backbone; the image is square.
        conv4_stride1: Use the third stage of a ResNet at stride 8 and nothing after it.

    Attributes:
        out_channels: Channels of the maps.
        steps: Pixels between the boxes of each map: its stride, or the image side divided by the positions on maps of
            3 positions or fewer (at 300 pixels 8, 16, 32, 64, 100, 300, as in the paper).
    """

    def __init__(self, body: nn.Module, name: str, image_size: tuple[int, int], conv4_stride1: bool = False):
        if conv4_stride1:
            _keep_stride_8(body, name)
        super().__init__(body, name, image_size, min_stride=8, max_stride=8 if conv4_stride1 else None)
        strides, channels, sides = list(self.strides), list(self.channels), [grid[0] for grid in self.grids]
        self.fpn = None
        if self.plain:
            strides, scales = [8, 16, 32], [self.strides[0] / stride for stride in (8, 16, 32)]
            self.fpn = SimpleFeaturePyramid(self.channels[0], 256, scales)
            channels, sides = [256] * 3, [math.ceil(sides[0] * scale) for scale in scales]
        self.extra = ExtraLayers(channels[-1], sides[-1], norm=conv4_stride1)
        channels += self.extra.channels
        sides += self.extra.sides
        strides += [strides[-1] * 2 ** (i + 1) for i in range(len(self.extra.sides))]
        self.out_channels = channels
        self.steps = [
            stride if side > 3 else image_size[0] / side for stride, side in zip(strides, sides, strict=True)]

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Maps '0', '1', ... of images (B, 3, size, size), finest first."""
        maps = self.maps(x)
        if self.fpn is not None:
            maps = list(self.fpn({'0': maps[0]}).values())
        return OrderedDict((str(i), feat) for i, feat in enumerate([*maps, *self.extra(maps[-1])]))


class ExtraLayers(nn.Module):
    """SSD's layers after the backbone: blocks of a 1x1 and a 3x3 convolution until one position is left.

    With `norm`, each convolution has a batch norm (NVIDIA's SSD; the paper has none).

    Attributes:
        channels: Channels of each block's map.
        sides: Width and height of each block's map.
    """

    def __init__(self, in_channels: int, side: int, norm: bool = False):
        super().__init__()
        before, self.sides = [], []
        while side > 1:
            before.append(side)
            side = 1 if side == 3 else -(-side // 2)
            self.sides.append(side)
        wide = max(1, len(self.sides) - 3)
        self.channels = [512 if i < wide else 256 for i in range(len(self.sides))]
        self.blocks = nn.ModuleList()
        for side, out_channels in zip(before, self.channels, strict=True):
            # From 3 positions to 1 without padding, as in the paper; otherwise halved and rounded up.
            step = dict(stride=1, padding=0) if side == 3 else dict(stride=2, padding=1)
            self.blocks.append(nn.Sequential(
                *_conv(in_channels, out_channels // 2, 1, norm),
                *_conv(out_channels // 2, out_channels, 3, norm, **step),
            ))
            in_channels = out_channels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the map of every block, largest first."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: bool, **kwargs: int) -> list[nn.Module]:
    layers = Conv2dNormActivation(
        in_channels, out_channels, kernel_size, norm_layer=nn.BatchNorm2d if norm else None, **kwargs)
    nn.init.xavier_uniform_(layers[0].weight)
    if not norm:
        nn.init.zeros_(layers[0].bias)
    return list(layers)


def _keep_stride_8(body: nn.Module, name: str) -> None:
    """Make the third stage of a ResNet keep the resolution of the second."""
    if not isinstance(body, ResNet):
        raise ValueError(f'conv4_stride1 is for ResNets, not {name}')
    for module in body.layer3[0].modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
    for feature in body.feature_info:
        if feature['reduction'] > 8:
            feature['reduction'] //= 2
