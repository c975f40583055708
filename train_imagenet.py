#!/usr/bin/env python3
"""Train a timm model with a mixing method.

One process:          python train_imagenet.py --data-dir /data/imagenet --model resnet50 --mix densemultimix
Eight GPUs:           accelerate launch --multi_gpu --num_processes 8 train_imagenet.py ...
The built-in sample:  python train_imagenet.py --mix densemultimix
A recipe file:        python train_imagenet.py --config recipe.yaml --lr 0.2   (flags win over the file)
Continue a run:       python train_imagenet.py ... --experiment NAME --resume auto
"""
import argparse
import sys

from timm.utils import setup_default_logging

from timm_alignmix.training import TrainConfig, cli, dry_run, fit_and_export, prepare, resolve_config


def create_parser() -> argparse.ArgumentParser:
    """The command line: --config and every option of TrainConfig."""
    return cli.create_parser(
        TrainConfig, '%(prog)s [--mix NAME] [--data-dir DIR] [-c FILE.yaml] [options]', __doc__)


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Options from the command line; ends the program with a message where they are wrong."""
    return cli.parse_flags(create_parser(), TrainConfig, resolve_config, argv)


def main(argv: list[str] | None = None) -> None:
    setup_default_logging()
    config = parse_config(argv)
    try:
        if config.dry_run:
            return dry_run(config)
        run, saver = prepare(config)
    except (ValueError, ImportError, OSError) as e:  # wrong options, data or environment: the message has the remedy
        sys.exit(f'train_imagenet.py: error: {e}')
    fit_and_export(run, saver)
    run.accelerator.state.destroy_process_group()


if __name__ == '__main__':
    main()
