"""The command line of a training script, made from its configuration."""
import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any

from timm.utils import ParseKwargs

from .config import GROUPS, Options, flag
from .resolve import near_names


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


def create_parser(config_class: type[Options], usage: str, description: str) -> argparse.ArgumentParser:
    """A command line of --config and every option of a configuration; what is not given is not in the result."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=118),
        allow_abbrev=False,
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE.yaml', help='read options from a file, such as those of recipes/; flags win')
    options = fields(config_class)
    used = dict.fromkeys(option.metadata['group'] for option in options)
    titles = [title for title in GROUPS if title in used] + [title for title in used if title not in GROUPS]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for option in options:
        _add_option(groups[option.metadata['group']], option)
    return parser


def parse_flags(
        parser: argparse.ArgumentParser,
        config_class: type[Options],
        resolve: Callable[[dict[str, Any], str | None], Options],
        argv: list[str] | None = None,
) -> Options:
    """Options from the command line; ends the program with a message where they are wrong.

    Args:
        parser: Made by :func:`create_parser`.
        config_class: The same configuration.
        resolve: Makes the configuration from the flags given and the name of a YAML file or None.
        argv: Words of the command line; None takes the program's own.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = ['--config', *(flag(option.name) for option in fields(config_class))]
        parser.error('unknown: ' + ', '.join(f'{word}{near_names(word.split("=")[0], known)}' for word in unknown))
    flags = vars(args)
    try:
        return resolve(flags, flags.pop('config'))
    except ValueError as e:
        parser.error(str(e))
