"""Training of a classifier with a mixing method: options, building, evaluation and export, without command lines."""
from .config import TrainConfig, resolve_config
from .dry_run import dry_run
from .train import fit_and_export, prepare, train

__all__ = ['TrainConfig', 'dry_run', 'fit_and_export', 'prepare', 'resolve_config', 'train']
