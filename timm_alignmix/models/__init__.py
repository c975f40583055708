"""Networks of the papers that timm lacks; `import timm_alignmix` adds them to timm."""
from .preact_resnet import PreActBlock, PreActResNet
from .vgg_gap import VggGap

__all__ = ['PreActBlock', 'PreActResNet', 'VggGap']
