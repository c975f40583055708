"""Pre-activation ResNets for small images: PreActResNet-18 and WRN-16-8.

Manifold mixup, AlignMixup and MultiMix report their CIFAR and TinyImageNet figures on these networks.

Papers:
    `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027
    `Wide Residual Networks` - https://arxiv.org/abs/1605.07146

Published code differs in details; the variants here:
  * PreActResNet-18 has no norm and activation between its last block and the pooling, as in the public code of manifold
    mixup and AlignMixup (`final_norm=True` is the first paper's form). WRN-16-8 has both, as in its paper.
  * A block that keeps its shape adds x itself to its residual branch. The public code of AlignMixup adds relu(bn1(x)),
    and has a norm and an activation after the stem: `preactresnet18_alignmixup`. The two forms differ in accuracy and
    in the scale of the features that alignment compares.
  * `stem_stride` is 1 as in AlignMixup's code, also at TinyImageNet's 64 px (8x8 features). Manifold mixup and
    PuzzleMix use 2 there (4x4 features, a quarter of the work). Figures of the two kinds are not comparable.
  * WRN-16-8 is its paper's. In AlignMixup's code the convolutions have a bias, a block strides in its second
    convolution instead of its first, and the shortcut convolves x itself, not relu(bn1(x)).
"""
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, LayerType, get_norm_act_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

from .pooled_classifier import PooledClassifier

__all__ = ['PreActBlock', 'PreActResNet']

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class PreActBlock(nn.Module):
    """Residual block of two 3x3 convolutions, each after its norm and activation.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        stride: Stride of the first convolution and of the skip.
        skip_preact: Let the skip carry act(norm(x)) instead of x if the block keeps its shape.
        norm_layer: Class of a norm followed by its activation.
    """

    def __init__(
            self, in_chs: int, out_chs: int, stride: int = 1, skip_preact: bool = False,
            norm_layer: type[nn.Module] = BatchNormAct2d, device: torch.device | None = None,
            dtype: torch.dtype | None = None):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.skip_preact = skip_preact
        self.norm1 = norm_layer(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.norm2 = norm_layer(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.downsample = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.norm1(x)
        if self.downsample is not None:
            skip = self.downsample(pre)
        else:
            skip = pre if self.skip_preact else x
        return self.conv2(self.norm2(self.conv1(pre))) + skip


class PreActResNet(PooledClassifier):
    """Pre-activation ResNet: a 3x3 stem, stages of blocks, pooling and a linear classifier.

    Args:
        layers: Blocks of each stage.
        channels: Channels of each stage. Every stage but the first halves the resolution (see last_stride).
        stem_chs: Channels of the stem.
        stem_stride: Stride of the stem.
        last_stride: Stride of the last stage; 1 doubles its resolution (8x8 at 32 px, AlignMixup's Table 6).
        stem_norm: Put a norm and an activation after the stem's convolution.
        skip_preact: See PreActBlock.
        final_norm: Put a norm and an activation after the last stage.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the input images.
        global_pool: Pooling before the classifier, '' for none.
        drop_rate: Dropout probability before the classifier.
        act_layer: Activation.
        norm_layer: Norm.
    """

    def __init__(
            self,
            layers: tuple[int, ...] = (2, 2, 2, 2),
            channels: tuple[int, ...] = (64, 128, 256, 512),
            stem_chs: int = 64,
            stem_stride: int = 1,
            last_stride: int = 2,
            stem_norm: bool = False,
            skip_preact: bool = False,
            final_norm: bool = False,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        self.in_chans = in_chans
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, stem_chs, 3, stride=stem_stride, padding=1, bias=False, **dd)
        self.bn1 = norm_act_layer(stem_chs, **dd) if stem_norm else nn.Identity()

        self.feature_info = []
        self.stage_names = []
        prev_chs, reduction = stem_chs, stem_stride
        for i, (depth, chs) in enumerate(zip(layers, channels, strict=True)):
            stride = 1 if i == 0 else last_stride if i == len(layers) - 1 else 2
            reduction *= stride
            blocks = []
            for j in range(depth):
                blocks.append(PreActBlock(prev_chs, chs, stride if j == 0 else 1, skip_preact, norm_act_layer, **dd))
                prev_chs = chs
            name = f'layer{i + 1}'
            self.add_module(name, nn.Sequential(*blocks))
            self.stage_names.append(name)
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=name))

        self.norm = norm_act_layer(prev_chs, **dd) if final_norm else nn.Identity()
        if final_norm:
            self.feature_info[-1]['module'] = 'norm'  # the last features are those that the head sees

        self.create_head(prev_chs, num_classes, global_pool, drop_rate, **dd)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^conv1|bn1',
            blocks=[(r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        stages = [getattr(self, name) for name in self.stage_names]
        if self.grad_checkpointing:
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            for stage in stages:
                x = stage(x)
        return self.norm(x)


def _create_preact_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    depth = len(kwargs.get('layers', (2, 2, 2, 2)))
    return build_model_with_cfg(
        PreActResNet, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(depth))), **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (4, 4),
        'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'preactresnet18.untrained': _cfg(paper_ids='arXiv:1603.05027'),
    'preactresnet18_alignmixup.untrained': _cfg(paper_ids='arXiv:2103.15375'),
    'wrn16_8.untrained': _cfg(paper_ids='arXiv:1605.07146', pool_size=(8, 8)),
})


@register_model
def preactresnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18 with identity skips: 11.17 M parameters at 10 classes."""
    return _create_preact_resnet('preactresnet18', pretrained, **kwargs)


@register_model
def preactresnet18_alignmixup(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18 as in AlignMixup's public code: norm after the stem, skips that carry relu(bn1(x))."""
    model_args = dict(stem_norm=True, skip_preact=True)
    return _create_preact_resnet('preactresnet18_alignmixup', pretrained, **dict(model_args, **kwargs))


@register_model
def wrn16_8(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-16-8, a wide ResNet of 16 layers and widening factor 8: 10.96 M parameters at 10 classes."""
    model_args = dict(layers=(2, 2, 2), channels=(128, 256, 512), stem_chs=16, final_norm=True)
    return _create_preact_resnet('wrn16_8', pretrained, **dict(model_args, **kwargs))
