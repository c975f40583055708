"""VGG-GAP, the VGG-16 of weakly supervised localization.

AlignMixup reports its CUB-200-2011 figures on it: VGG-16 with a 3x3 convolution of 1024 channels, global average
pooling and a linear classifier in place of the last pooling and the fully connected layers, so that class activation
maps have 14x14 positions at 224 px.

Papers:
    `Learning Deep Features for Discriminative Localization` (VGGnet-GAP) - https://arxiv.org/abs/1512.04150
    `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556

Pretrained weights are the thirteen convolutions of timm's vgg16.tv_in1k. The added convolution and the classifier start
at random, also with 1000 classes, so the network has no ImageNet accuracy before training.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .pooled_classifier import PooledClassifier

__all__ = ['VggGap']

VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VggGap(PooledClassifier):
    """VGG features without the last pooling, a 3x3 convolution, global average pooling and a linear classifier.

    Parameters are named as in timm's and torchvision's VGG (`features.*`) and public code of VGG-GAP (`conv6`, `fc`).

    Args:
        stages: Channels and number of convolutions of each stage; between stages the resolution is halved.
        gap_chs: Channels of the added convolution.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the input images.
        global_pool: Pooling before the classifier, '' for none.
        drop_rate: Dropout probability before the classifier.
    """

    def __init__(
            self, stages: tuple[tuple[int, int], ...] = VGG16_STAGES, gap_chs: int = 1024, num_classes: int = 1000,
            in_chans: int = 3, global_pool: str = 'avg', drop_rate: float = 0.,
            device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans

        layers: list[nn.Module] = []
        self.feature_info = []
        prev_chs, reduction = in_chans, 1
        for i, (chs, depth) in enumerate(stages):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
                reduction *= 2
            for _ in range(depth):
                layers += [nn.Conv2d(prev_chs, chs, 3, padding=1, **dd), nn.ReLU(inplace=True)]
                prev_chs = chs
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'features.{len(layers) - 1}'))
        self.features = nn.Sequential(*layers)
        self.conv6 = nn.Conv2d(prev_chs, gap_chs, 3, padding=1, **dd)
        self.act6 = nn.ReLU()
        self.feature_info.append(dict(num_chs=gap_chs, reduction=reduction, module='act6'))

        self.create_head(gap_chs, num_classes, global_pool, drop_rate, **dd)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r'^features\.0', blocks=[(r'^features\.(\d+)', None), (r'^conv6', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, 'gradient checkpointing not supported'

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.act6(self.conv6(self.features(x)))


def _fill_added_layers(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Complete the convolutions of a plain VGG with the model's own values: timm wants every key."""
    if 'conv6.weight' in state_dict:
        return state_dict
    own = model.state_dict()
    return {name: state_dict[name] if name.startswith('features.') else own[name] for name in own}


default_cfgs = generate_default_cfgs({
    'vgg16_gap.tv_in1k': {
        'hf_hub_id': 'timm/vgg16.tv_in1k',
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (14, 14),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'features.0', 'classifier': 'fc',
        'license': 'bsd-3-clause', 'paper_ids': 'arXiv:1512.04150',
    },
})


@register_model
def vgg16_gap(pretrained: bool = False, **kwargs: Any) -> VggGap:
    """VGG-16 with global average pooling for localization: 20.5 M parameters at 1000 classes.

    `pretrained=True` loads the thirteen convolutions of timm's vgg16.tv_in1k and nothing else.
    """
    return build_model_with_cfg(
        VggGap, 'vgg16_gap', pretrained, pretrained_filter_fn=_fill_added_layers,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5)), **kwargs)
