"""Training: configuration, loop, checkpoints and logs, without a command line."""
from .config import TrainConfig, flag
from .resolve import near_names, resolve_config
from .train import fit, prepare, train

__all__ = ['TrainConfig', 'fit', 'flag', 'near_names', 'prepare', 'resolve_config', 'train']
