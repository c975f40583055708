"""Training: configuration, loop, checkpoints and logs, without a command line."""
from . import cli
from .config import RunConfig, TrainConfig, flag
from .dry_run import dry_run
from .resolve import near_names, resolve_config
from .train import fit, fit_and_export, prepare, train

__all__ = [
    'RunConfig',
    'TrainConfig',
    'cli',
    'dry_run',
    'fit',
    'fit_and_export',
    'flag',
    'near_names',
    'prepare',
    'resolve_config',
    'train',
]
