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
from dataclasses import MISSING, Field, fields
from functools import partial

from timm.utils import ParseKwargs, setup_default_logging

from timm_alignmix.training import TrainConfig, fit, flag, near_names, prepare, resolve_config


class KeyValues(ParseKwargs):
    """timm's key=value flag, which says what it expects."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value pairs, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def _add_option(group: argparse._ArgumentGroup, option: Field) -> None:
    meta = option.metadata
    default = option.default if option.default is not MISSING else option.default_factory()
    shown = '' if default in (None, '', {}, False) else f' (default: {default})'
    settings = {'default': argparse.SUPPRESS, 'help': (meta['help'] + shown).replace('%', '%%')}
    if meta['type'] is bool:
        negatable = not option.name.startswith('no_')
        settings['action'] = argparse.BooleanOptionalAction if negatable else 'store_true'
    elif meta['type'] is dict:
        settings.update(action=KeyValues, nargs='*', metavar='KEY=VALUE')
    else:
        settings.update(type=meta['type'], nargs=meta['nargs'], const=meta['const'], choices=meta['choices'])
        if not meta['choices']:
            settings['metavar'] = option.name.split('_')[-1].upper()
    group.add_argument(flag(option.name), *meta['flags'], **settings)


def create_parser() -> argparse.ArgumentParser:
    """The command line: --config and every option of TrainConfig; what is not given is not in the result."""
    parser = argparse.ArgumentParser(
        usage='%(prog)s [--mix NAME] [--data-dir DIR] [-c FILE.yaml] [options]',
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=118),
        allow_abbrev=False,
    )
    parser.add_argument('-c', '--config', metavar='FILE.yaml', help='read options from a file; flags win over it')
    groups = {}
    for option in fields(TrainConfig):
        title = option.metadata['group']
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        _add_option(groups[title], option)
    return parser


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Options from the command line; ends the program with a message where they are wrong."""
    parser = create_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = ['--config', *(flag(option.name) for option in fields(TrainConfig))]
        parser.error('unknown: ' + ', '.join(f'{word}{near_names(word.split("=")[0], known)}' for word in unknown))
    flags = vars(args)
    try:
        return resolve_config(flags, flags.pop('config'))
    except ValueError as e:
        parser.error(str(e))


def main(argv: list[str] | None = None) -> None:
    setup_default_logging()
    config = parse_config(argv)
    try:
        run, saver = prepare(config)
    except (ValueError, ImportError, OSError) as e:  # wrong options, data or environment: the message has the remedy
        sys.exit(f'train_imagenet.py: error: {e}')
    fit(run, saver)


if __name__ == '__main__':
    main()
