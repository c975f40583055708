"""AlignMixup, MultiMix and Dense MultiMix, and the mixups they are compared with, for timm models."""
from . import models, weights
from .anatomy import Anatomy, UnsupportedModel, dense_model_kwargs
from .mixes import Mix, create_mix, list_mixes, register_mix
from .mixup_fn import create_mixup
from .task import MixTask
from .version import __version__

__all__ = [
    'Anatomy',
    'Mix',
    'MixTask',
    'UnsupportedModel',
    '__version__',
    'create_mix',
    'create_mixup',
    'dense_model_kwargs',
    'list_mixes',
    'models',
    'register_mix',
    'weights',
]

weights.register_local()
