"""timm networks as backbones of detectors: NCHW pyramids whose strides, channels and weights are verified.

A pyramid takes the last map of each stride:
  * networks with several strides (CNNs, Swin, LeViT, ...) get torchvision's feature pyramid network (arXiv:1612.03144);
  * networks with one stride (plain ViTs, mixers) get the simple feature pyramid of ViTDet (arXiv:2203.16527).
"""
import inspect
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from timm.models import FeatureListNet, get_model_input_config, get_model_traits
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from .pretrained import Source, adapt, read_source

_logger = logging.getLogger(__name__)

BackboneT = TypeVar('BackboneT', bound='Backbone')


@dataclass(frozen=True)
class BackboneReport:
    """Description of a backbone and the source of its weights."""
    arch: str  # timm's name
    weights: str | None  # their source, None for random ones
    kwargs: dict[str, Any]  # arguments of `timm.create_model` that rebuild the network without the file of weights
    image_mean: tuple[float, ...]  # pixel mean, 0-1 scale
    image_std: tuple[float, ...]  # pixel standard deviation, 0-1 scale
    image_size: tuple[int, int] | None  # the only (H, W) the network accepts, None for any
    strides: tuple[int, ...]  # strides of the network's own maps
    channels: tuple[int, ...]  # channels of these maps
    loaded: int  # number of keys that were loaded: all keys of the backbone, or none
    resized: tuple[str, ...]  # keys that were resized to the image size
    dropped: tuple[str, ...]  # keys the backbone does not need: the classifier and stages after the last map
    freeze_bn: bool
    frozen_stages: int

    def __str__(self) -> str:
        maps = ', '.join(f'{chs} channels at stride {s}' for chs, s in zip(self.channels, self.strides, strict=True))
        text = f'{self.arch}: {maps}; mean {self.image_mean}, std {self.image_std}; '
        if self.weights is None:
            return text + 'random weights'
        text += f'{self.loaded} of {self.loaded} keys from {self.weights}'
        if self.resized:
            text += f', {len(self.resized)} resized to {self.image_size}'
        dropped = dict.fromkeys(key.split('.')[0] for key in self.dropped)
        return text + f'; {len(self.dropped)} keys dropped ({", ".join(dropped) or "none"})'


class Backbone(nn.Module):
    """A timm network cut down to its feature maps.

    Args:
        body: Classification network with timm's `feature_info`. Its classifier and everything after the last map are
            removed; the rest keeps its keys.
        name: Name for error messages.
        image_size: (H, W) of the images, None for any.
        min_stride, max_stride: Finest and coarsest stride of the maps; ignored for a plain network.

    Attributes:
        strides, channels: Strides and channels of the maps, finest first.
        grids: (H, W) of the maps of an image of `image_size`.
        stages: Names of the modules that end a stage (the last of a stride); the blocks of a plain network.
        plain: Whether all blocks have the same stride, so that there is only one map.
        report: Description of what was built and loaded.

    Raises:
        ValueError: The network cannot give such maps.
    """

    report: BackboneReport

    def __init__(
            self, body: nn.Module, name: str, image_size: tuple[int, int] | None = None, min_stride: int = 4,
            max_stride: int | None = None):
        super().__init__()
        if not hasattr(body, 'feature_info'):
            raise ValueError(f'{name} cannot give a feature pyramid: it has no feature_info to list its maps')
        info = list(body.feature_info)
        last = {f['reduction']: i for i, f in enumerate(info)}  # the last feature of each stride
        self.plain = len(info) > 1 and len(last) == 1
        self.strides = tuple(s for s in sorted(last) if self.plain or min_stride <= s <= (max_stride or s))
        if not self.strides:
            raise ValueError(f'{name} cannot give a feature pyramid: its strides are {sorted(last)}')
        if any(stride & (stride - 1) for stride in self.strides):
            raise ValueError(
                f'{name} has strides {self.strides}; the detectors place boxes on strides that are powers of 2')
        self.indices = [last[s] for s in self.strides]
        self.channels = tuple(info[i]['num_chs'] for i in self.indices)
        ends = range(len(info)) if self.plain else [last[s] for s in sorted(last) if 4 <= s <= self.strides[-1]]
        self.stages = tuple(info[i]['module'] for i in ends)
        # Every timm network has forward_intermediates; other packages may only provide feature_info.
        self.body = body if hasattr(body, 'forward_intermediates') else FeatureListNet(body, self.indices)
        self._eval_norms: list[nn.Module] = []
        self.grids = self._check(name, image_size)
        if hasattr(body, 'prune_intermediate_layers'):
            self.indices = body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, C, H / stride, W / stride) of images (B, 3, H, W), finest first."""
        if isinstance(self.body, FeatureListNet):
            return self.body(x)
        return self.body.forward_intermediates(x, indices=self.indices, output_fmt='NCHW', intermediates_only=True)

    def train(self, mode: bool = True) -> 'Backbone':
        super().train(mode)
        for norm in self._eval_norms:
            norm.eval()
        return self

    def freeze_batch_norm(self) -> None:
        """Freeze the statistics and the affine parameters of every batch norm."""
        self._freeze_norms(self.body.named_modules())

    def freeze_stages(self, count: int) -> None:
        """Freeze the parameters and batch norms from the input up to the end of a stage.

        Args:
            count: Stages to freeze, finest first; the stem belongs to the first. Blocks, for a plain network.

        Raises:
            ValueError: The network has fewer stages.
        """
        if not 0 <= count <= len(self.stages):
            raise ValueError(f'{self.report.arch} has {len(self.stages)} stages to freeze, not {count}')
        modules = self._modules_through(self.stages[count - 1]) if count else []
        for _, module in modules:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._freeze_norms(modules)

    def _modules_through(self, stage: str) -> list[tuple[str, nn.Module]]:
        """Names and modules up to the end of a stage; timm registers modules in the order of the forward pass."""
        modules, reached = [], False
        for name, module in self.body.named_modules():
            inside = name == stage or name.startswith(f'{stage}.')
            if reached and not inside:
                break
            reached |= inside
            modules.append((name, module))
        return modules

    def _freeze_norms(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        for name, norm in [(name, module) for name, module in modules if isinstance(module, _BatchNorm)]:
            frozen = freeze_batch_norm_2d(norm)
            if frozen is norm:  # BatchNorm1d (LeViT) has no frozen form in timm
                self._eval_norms.append(norm.eval().requires_grad_(False))
            else:
                parent, _, child = name.rpartition('.')
                self.body.get_submodule(parent).add_module(child, frozen)

    @torch.no_grad()
    def _check(self, name: str, image_size: tuple[int, int] | None) -> list[tuple[int, int]]:
        """Compare the maps of an image with the network's own description of them.

        The image is not square unless it has to be, so that channels-last maps are not mistaken for channels-first.
        """
        coarsest = max(32, *self.strides)
        height, width = image_size or (2 * coarsest, 3 * coarsest)
        self.eval()
        try:
            maps = self.maps(torch.zeros(1, 3, height, width))
        except (RuntimeError, AssertionError, ValueError, TypeError) as e:
            text = f'{name} cannot give a feature pyramid of {height}x{width} images: {e}'
            config = get_model_input_config(self.body)
            if image_size is None and config['fixed_input_size']:
                text += f'; it accepts one size only: pass fixed_size=(height, width), e.g. {config["input_size"][1:]}'
            raise ValueError(text) from e
        self.train()
        for feat, stride, chs in zip(maps, self.strides, self.channels, strict=True):
            sides = zip(feat.shape[2:], (height, width), strict=True)
            if feat.shape[1] != chs or not all(n in (side // stride, -(-side // stride)) for n, side in sides):
                raise ValueError(
                    f'{name} cannot give a feature pyramid: {tuple(feat.shape)} for a {height}x{width} image is not '
                    f'{chs} channels at stride {stride}')
        return [tuple(feat.shape[2:]) for feat in maps]


class PyramidBackbone(Backbone):
    """A backbone with a feature pyramid of `out_channels` on top; the other arguments are those of Backbone.

    Attributes:
        levels: Strides of the levels, including the pooled last one.
    """

    def __init__(self, *args: Any, out_channels: int = 256, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.out_channels = out_channels
        if self.plain:
            strides = (4, 8, 16, 32)
            scales = [self.strides[0] / stride for stride in strides]
            self.fpn = SimpleFeaturePyramid(self.channels[0], out_channels, scales, LastLevelMaxPool())
        else:
            strides = self.strides
            self.fpn = FeaturePyramidNetwork(list(self.channels), out_channels, LastLevelMaxPool())
        self.levels = (*strides, 2 * strides[-1])

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Levels '0', '1', ..., 'pool', each (B, out_channels, H / stride, W / stride), finest first."""
        maps = self.maps(x)
        return self.fpn(OrderedDict((str(i), feat) for i, feat in enumerate(maps)))


class SimpleFeaturePyramid(nn.Module):
    """Maps of several strides computed from the last map of a plain network.

    Paper: `Exploring Plain Vision Transformer Backbones for Object Detection` - https://arxiv.org/abs/2203.16527,
    section 3: transposed convolutions give finer maps and pooling coarser ones, followed by 1x1 and 3x3 convolutions,
    each with a layer norm over the channels. `scales` are the sizes of the levels relative to the map, powers of 2, and
    `extra_blocks` is torchvision's block for additional levels.
    """

    def __init__(
            self, in_channels: int, out_channels: int, scales: Sequence[float],
            extra_blocks: ExtraFPNBlock | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(self._level(in_channels, out_channels, scale) for scale in scales)
        self.extra_blocks = extra_blocks

    @staticmethod
    def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
        layers, chs = [], in_channels
        doublings = round(math.log2(scale))
        for i in range(doublings):
            if i:
                layers += [LayerNorm2d(chs), nn.GELU()]
            layers.append(nn.ConvTranspose2d(chs, chs // 2, 2, stride=2))
            chs //= 2
        # Rounded up, as a padded convolution does: 19 positions become 10.
        layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)]
        return nn.Sequential(
            *layers, nn.Conv2d(chs, out_channels, 1, bias=False), LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels))

    def forward(self, maps: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
        """Levels '0', '1', ... of the single map in `maps`, in the form of torchvision's feature pyramid."""
        (x,) = maps.values()
        levels = [block(x) for block in self.blocks]
        names = [str(i) for i in range(len(levels))]
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, [x], names)
        return OrderedDict(zip(names, levels, strict=True))


def create_backbone(
        cls: Callable[..., BackboneT],
        backbone: str,
        weights: str | Path | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        freeze_bn: bool = False,
        frozen_stages: int | None = 0,
        use_ema: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        grad_checkpointing: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
) -> BackboneT:
    """Build a backbone, load its weights and freeze the parts that should not train.

    Args:
        cls: Backbone class, called with (body, name, image_size).
        backbone, weights, use_ema: See `read_source`.
        image_size: (H, W) of all images, None if they differ.
        frozen_stages: See Backbone.freeze_stages; None means 1 for pretrained weights, and 0 for random weights and
            plain networks.
        image_mean, image_std: Of pixels, 0-1 scale; default: those of the weights.
        grad_checkpointing: Recompute activations of the network in the backward pass to save memory.
        backbone_kwargs: Further arguments of `timm.create_model`, e.g. drop_path_rate.

    Raises:
        ValueError: There is no such network or weights, the weights lack keys of the backbone, or the network cannot
            give a pyramid or accepts one image size only while images differ.
    """
    source = read_source(backbone, weights, use_ema)
    arguments = {**_size_arguments(source, image_size), **(backbone_kwargs or {})}
    body, resized = adapt(source, **arguments)
    given = set(source.model.state_dict()) if weights is not None else set()
    net = cls(body, source.arch, image_size)
    keys = set(net.body.state_dict())
    if frozen_stages is None:
        frozen_stages = int(weights is not None and not net.plain)
    net.report = BackboneReport(
        arch=source.arch, weights=source.weights, kwargs={**source.kwargs, **arguments},
        image_mean=tuple(image_mean or source.mean), image_std=tuple(image_std or source.std),
        image_size=arguments.get('img_size'), strides=net.strides, channels=net.channels, loaded=len(keys & given),
        resized=tuple(key for key in resized if key in keys), dropped=tuple(sorted(given - keys)), freeze_bn=freeze_bn,
        frozen_stages=frozen_stages)
    if weights is None and source.model.pretrained_cfg.get('file'):
        _logger.warning(f'{backbone} has weights, but weights=None starts from random ones; pass weights={backbone!r}')
    _logger.info(f'Backbone {net.report}')
    if grad_checkpointing:
        net.body.set_grad_checkpointing(True)
    net.freeze_stages(frozen_stages)
    if freeze_bn:
        net.freeze_batch_norm()
    return net


def _size_arguments(source: Source, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of `timm.create_model` that make a network accept images of `image_size`, or of any size."""
    options = {name for cls in type(source.model).__mro__ for name in inspect.signature(cls.__init__).parameters}
    if 'dynamic_img_size' in options:
        return {name: True for name in ('dynamic_img_size', 'dynamic_img_pad') if name in options}
    if not get_model_traits(source.model)['fixed_input_size']:
        return {}
    if 'strict_img_size' in options:
        return {'strict_img_size': False}
    # Some only need a multiple of their patch size (XCiT): the backbone tries an image of another size to find out.
    return {'img_size': tuple(image_size)} if image_size and 'img_size' in options else {}


def layer_decay_groups(detector: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with timm's layer-wise learning rate decay over the backbone's body.

    Args:
        layer_decay: Factor of the learning rate from one layer to the one before; it is 1 for the last layer of the
            body, the pyramid and the heads.
        weight_decay: Biases, norms and parameters excluded by the network have none.

    Returns:
        Groups with `lr_scale`, by which timm's schedulers multiply the learning rate.

    Raises:
        ValueError: The network does not name its layers.
    """
    body = detector.backbone.body
    if not hasattr(body, 'group_matcher'):
        raise ValueError(
            f'{detector.backbone_report.arch} has no group_matcher to name its layers; train without --layer-decay')
    inside = {id(parameter) for parameter in body.parameters()}
    rest = [parameter for parameter in detector.parameters() if id(parameter) not in inside and parameter.requires_grad]
    excluded = body.no_weight_decay() if hasattr(body, 'no_weight_decay') else ()
    return [
        *param_groups_layer_decay(body, weight_decay, excluded, layer_decay=layer_decay),
        {'params': [p for p in rest if p.ndim > 1], 'weight_decay': weight_decay, 'lr_scale': 1.0},
        {'params': [p for p in rest if p.ndim <= 1], 'weight_decay': 0.0, 'lr_scale': 1.0}]
