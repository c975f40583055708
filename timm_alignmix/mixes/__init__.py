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
from .registry import canonical, create_mix, list_mixes, register_mix

__all__ = [
    'AlignMix', 'AlignMixAE', 'CutMix', 'DenseMultiMix', 'ManifoldMixup', 'Mix', 'Mixup', 'MultiMix', 'NoMix',
    'canonical', 'create_mix', 'list_mixes', 'register_mix']

kernels.register()
