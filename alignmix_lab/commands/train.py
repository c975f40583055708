"""Train a timm model with a mixing method.

One process:          python train_imagenet.py --data-dir /data/imagenet --model resnet50 --mix densemultimix
Eight GPUs:           accelerate launch --multi_gpu --num_processes 8 train_imagenet.py ...
The built-in sample:  python train_imagenet.py --mix densemultimix
A recipe:             python train_imagenet.py -c imagenet/resnet50_300ep --mix densemultimix   (flags take precedence)
Continue a run:       python train_imagenet.py ... --experiment NAME --resume auto

`alignmix train` is the same program.
"""
import sys

from timm.utils import setup_default_logging

from alignmix_lab.classification import TrainConfig, dry_run, fit_and_export, prepare, resolve_config
from alignmix_lab.data.images.decode import UnusableData
from alignmix_lab.runs.options import create_parser, exit_with_message, parse_flags


def parse_config(argv: list[str] | None = None, prog: str | None = None) -> TrainConfig:
    """Read options from the command line; exits with a message if they are invalid."""
    parser = create_parser(TrainConfig, '%(prog)s [--mix NAME] [--data-dir DIR] [-c RECIPE] [options]', __doc__, prog)
    return parse_flags(parser, TrainConfig, resolve_config, argv)


def main(argv: list[str] | None = None, prog: str = 'train_imagenet.py') -> None:
    """Train, or preview the run with --dry-run."""
    setup_default_logging()
    config = parse_config(argv, prog)
    with exit_with_message(prog):
        if config.dry_run:
            return dry_run(config)
        run, saver = prepare(config)
    try:
        fit_and_export(run, saver)
    except UnusableData as e:
        sys.exit(f'{prog}: error: {e}')
    run.accelerator.state.destroy_process_group()
