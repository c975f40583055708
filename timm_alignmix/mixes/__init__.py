"""Mixing methods, one file each, registered by name."""
from .. import kernels
from .alignmix import AlignMix
from .alignmix_ae import AlignMixAE
from .base import Mix
from .comixup import CoMixup
from .cutmix import CutMix
from .cutout import Cutout
from .densemultimix import DenseMultiMix
from .fmix import FMix
from .guidedmixup import GuidedMixup
from .manifold import ManifoldMixup
from .mixup import Mixup
from .multimix import MultiMix
from .none import NoMix
from .puzzlemix import PuzzleMix
from .registry import ParseMix, canonical, create_mix, list_mixes, register_mix, with_probability
from .regmixup import RegMixup
from .resizemix import ResizeMix
from .saliencymix import SaliencyMix
from .snapmix import SnapMix
from .tokenmix import TokenMix
from .transmix import TransMix
from .zeta import ZetaMixup

__all__ = [
    'AlignMix', 'AlignMixAE', 'CoMixup', 'CutMix', 'Cutout', 'DenseMultiMix', 'FMix', 'GuidedMixup', 'ManifoldMixup',
    'Mix', 'Mixup', 'MultiMix', 'NoMix', 'ParseMix', 'PuzzleMix', 'RegMixup', 'ResizeMix', 'SaliencyMix', 'SnapMix',
    'TokenMix', 'TransMix', 'ZetaMixup', 'canonical', 'create_mix', 'list_mixes', 'register_mix', 'with_probability']

kernels.register()
