"""Networks of the papers that timm lacks, entered in timm's registry when `timm_alignmix` is imported."""
from .preact_resnet import PreActBlock, PreActResNet
from .vgg_gap import VggGap

__all__ = ['PreActBlock', 'PreActResNet', 'VggGap']
