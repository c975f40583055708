"""Mixing methods, one file each, registered by name."""
from .. import kernels
from .alignmix import AlignMix
from .alignmix_ae import AlignMixAE
from .base import Mix
from .cutmix import CutMix
from .densemultimix import DenseMultiMix
from .manifold import ManifoldMixup
from .mixup import Mixup
from .multimix import MultiMix
from .none import NoMix
from .registry import ParseMix, canonical, create_mix, list_mixes, register_mix, with_probability

__all__ = [
    'AlignMix', 'AlignMixAE', 'CutMix', 'DenseMultiMix', 'ManifoldMixup', 'Mix', 'Mixup', 'MultiMix', 'NoMix',
    'ParseMix', 'canonical', 'create_mix', 'list_mixes', 'register_mix', 'with_probability']

kernels.register()
