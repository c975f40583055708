"""AlignMixup, MultiMix and Dense MultiMix, and the mixups they are compared with, for timm models.

The import adds to timm the networks of :mod:`timm_alignmix.models` and the tags of weights installed on this machine.
It lists one folder for these and opens no file; with TIMM_ALIGNMIX_NO_LOCAL_WEIGHTS=1 it does not look.
"""
import os

from . import models, weights
from .anatomy import Anatomy, UnsupportedModel, dense_model_kwargs
from .attached import attach
from .mixes import Mix, create_mix, list_mixes, register_mix
from .mixup_fn import create_mixup
from .task import MixTask
from .version import __version__

__all__ = [
    'Anatomy', 'Mix', 'MixTask', 'UnsupportedModel', '__version__', 'attach', 'create_mix', 'create_mixup',
    'dense_model_kwargs', 'list_mixes', 'models', 'register_mix', 'weights']

if os.environ.get('TIMM_ALIGNMIX_NO_LOCAL_WEIGHTS', '0') in ('', '0'):
    weights.register_local()
