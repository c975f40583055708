"""Options of a command: dataclass fields that know their flag, read from the command line and from YAML files."""
import argparse
import difflib
import re
from ast import literal_eval
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_alignmix.mixes import canonical

# Headings of --help, in order; others follow as they come.
GROUPS = (
    'Data', 'Mixing', 'Detector', 'Model', 'Optimizer', 'Learning rate schedule', 'Augmentation and regularization',
    'Batch norm and weight averaging', 'Speed and device', 'Run, logs and checkpoints',
)
# recipes/ of a clone, or the copy that is installed with the package.
_PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = next((path for path in (_PACKAGE.parent / 'recipes', _PACKAGE / 'recipes') if path.is_dir()), None)


def config_option(
        group: str,
        default: Any,
        text: str,
        type: type = str,
        *,
        choices: tuple | None = None,
        nargs: str | int | None = None,
        const: Any = None,
        low: float | None = None,
        below: float | None = None,
        flags: tuple[str, ...] = (),
        affects_result: bool = True,
) -> Any:
    """Make a dataclass field that knows its flag.

    Args:
        group: Heading in `--help`.
        default: Default value; None = decided later, as `text` says.
        text: What the option does.
        type: Type of the value, or of each of its values with `nargs`; dict = key=value pairs.
        choices: Allowed values.
        nargs: As in argparse: a number or '+' makes the value a list, '?' lets the flag stand alone for `const`.
        const: Value of a flag that stands alone.
        low: Smallest allowed number.
        below: Every allowed number is smaller than this.
        flags: Short forms.
        affects_result: Whether another value gives another result. What is False may change when a run resumes, stays
            out of exported recipes, and does not tell apart two runs or two evaluations.
    """
    metadata = dict(
        group=group, help=text, type=type, choices=choices, nargs=nargs, const=const, low=low, below=below, flags=flags,
        affects_result=affects_result)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """A configuration: the values of fields made by :func:`config_option` are checked and given their types."""

    def __post_init__(self):
        for option in _config_options(self):
            setattr(self, option.name, _convert(option, getattr(self, option.name)))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for files."""
        return asdict(self)


def _config_options(config: Any) -> list[Field]:
    return [option for option in fields(config) if 'group' in option.metadata]


def result_options(config_class: type[Options]) -> list[str]:
    """Names of the options that the result depends on."""
    return [option.name for option in fields(config_class) if option.metadata['affects_result']]


def changed_options(config: Options, earlier: dict[str, Any]) -> list[str]:
    """Say which options differ from those of an earlier run in a way that changes the result.

    Args:
        config: The options now. None is decided by the run, so it differs from nothing.
        earlier: The content of the earlier run's args.yaml; what it does not name is not compared.
    """
    now = yaml.safe_load(yaml.safe_dump(config.to_dict()))  # tuples become lists, as in the file
    return [
        f'{flag(name)} {earlier[name]!r} -> {now[name]!r}' for name in result_options(type(config))
        if name in earlier and now[name] is not None and earlier[name] != now[name]
    ]


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return '--' + name.replace('_', '-')


def option_words(name: str, value: Any) -> list[str]:
    """Spell an option as words of the command line.

    Raises:
        ValueError: None, which no flag says.
    """
    if value is None:
        raise ValueError(f'{flag(name)} cannot be unset by a flag; use a recipe without it')
    if isinstance(value, bool):
        return [flag(name if value else f'no_{name}')]
    if isinstance(value, dict):
        return [flag(name), *(f'{key}={_literal(entry)}' for key, entry in value.items())]
    return [flag(name), *map(str, value if isinstance(value, (list, tuple)) else [value])]


def _literal(value: Any) -> str:
    """A value as timm's key=value flags read it: a Python literal, or else text."""
    try:
        is_plain = isinstance(value, str) and literal_eval(value) == value
    except ValueError:
        is_plain = True  # read as text
    except SyntaxError:
        is_plain = False
    return value if is_plain else repr(value)


def near_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known names that look like `name`, '' where none does."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f'; did you mean {" or ".join(near)}?' if near else ''


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is in a flag."""


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?\d+(\.\d*)?[eE][-+]?\d+$'), list('-+0123456789'))


def load_yaml(text: str, said: str) -> Any:
    """Read a text as YAML.

    Raises:
        ValueError: It is none; the message begins with `said`.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        raise ValueError(f'{said} is not YAML: {e}') from e


def _convert(option: Field, value: Any) -> Any:
    """Check one value and give it its type; YAML reads 1e-3 as text and 1 as int, where a flag reads a float."""
    kind, nargs, default = option.metadata['type'], option.metadata['nargs'], option.default
    if value is None and default is None:
        return None
    if nargs not in (None, '?'):
        values = [_convert_one(option, v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if isinstance(nargs, int) and len(values) != nargs:
            raise ValueError(f'{flag(option.name)} takes {nargs} values, got {value!r}')
        return values
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f'{flag(option.name)} takes key=value pairs (a mapping in YAML), got {value!r}')
        return dict(value)
    return _convert_one(option, value)


def _convert_one(option: Field, value: Any) -> Any:
    kind, meta = option.metadata['type'], option.metadata
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (kind is float or number.is_integer()):
            value = kind(number)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'{flag(option.name)} takes {kind.__name__} values, got {value!r}')
    if meta['choices'] and value not in meta['choices']:
        raise ValueError(f'{flag(option.name)} must be one of {", ".join(map(repr, meta["choices"]))}, got {value!r}')
    if meta['low'] is not None and value < meta['low']:
        raise ValueError(f'{flag(option.name)} must be at least {meta["low"]}, got {value}')
    if meta['below'] is not None and value >= meta['below']:
        raise ValueError(f'{flag(option.name)} must be smaller than {meta["below"]}, got {value}')
    return value


# YAML files

def find_recipe(name: str) -> Path:
    """The YAML file of a path, or of a recipe's name such as `imagenet/resnet50_300ep`.

    Raises:
        ValueError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    files = RECIPES.rglob('*.yaml') if RECIPES else ()
    known = {str(path.relative_to(RECIPES).with_suffix('')): path for path in files}
    if name.removesuffix('.yaml') not in known:
        raise ValueError(f'--config {name}: no such file, and no recipe of that name{near_names(name, known)}')
    return known[name.removesuffix('.yaml')]


def read_yaml(name: str, config_class: type[Options], mix: str | None = None) -> dict[str, Any]:
    """Options of a YAML file and of the files it is based on.

    Args:
        name: A file, or the name of a recipe. It maps option names ('-' and '_' are the same) to values; a value
            replaces that of a base as a whole, mappings such as `mix_kwargs` too. Two keys are no options: `base` names
            a file, or a list of files of which the later wins, relative to this one, that hold where this file is
            silent; `mixes` maps methods to options that hold where that method is chosen. An entry may name another
            `mix`, as a variant does: `alignmix_release: {mix: alignmix, mix_kwargs: {...}}`.
        config_class: The configuration that has the options.
        mix: Method chosen by a flag; None takes the file's.

    Raises:
        ValueError: A file is missing, no mapping, has a key that is no option, or is its own base.
    """
    options, mixes = _read_layers(find_recipe(name), config_class, ())
    if mix is not None and canonical(mix) != canonical(options.get('mix', '')):
        options.pop('mix_kwargs', None)  # they belong to the file's own method
        options['mix'] = mix
    return {**options, **mixes.get(canonical(options.get('mix', 'none')), {})}


def _read_layers(
        path: Path,
        config_class: type[Options],
        above: tuple[Path, ...],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options of a file over those of its bases, and those of single methods; `above` are the files that led here."""
    said = f'--config {path}' + (f' (base of {above[-1]})' if above else '')
    if path.resolve() in [file.resolve() for file in above]:
        raise ValueError(f'{said}: the file is its own base, through ' + ' -> '.join(map(str, (*above, path))))
    options = _read_mapping(path, said)
    bases = options.pop('base', [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f'{said}: base must be a file or a list of files, got {bases!r}')
    known = [option.name for option in fields(config_class)]
    own_mixes = (options.pop('mixes', None) or {}) if 'mix' in known else {}
    if not isinstance(own_mixes, dict) or not all(isinstance(o, dict) or o is None for o in own_mixes.values()):
        raise ValueError(f'{said}: mixes must map methods to mappings of options, got {own_mixes!r}')
    own_mixes = {name: _with_underscores(entry or {}) for name, entry in own_mixes.items()}
    for entry in (options, *own_mixes.values()):
        unknown = [f'{key!r}{near_names(key, [*known, "base", "mixes"])}' for key in entry if key not in known]
        if unknown:
            raise ValueError(f'{said} has unknown keys: ' + ', '.join(unknown))
    merged, mixes = {}, {}
    for base in bases:
        base_path = path.parent / base
        base_options, base_mixes = _read_layers(base_path, config_class, (*above, path))
        merged.update(base_options)
        _merge_mixes(mixes, base_mixes)
    _merge_mixes(mixes, {canonical(name): {'mix': name, **entry} for name, entry in own_mixes.items()})
    return {**merged, **options}, mixes


def _merge_mixes(into: dict[str, dict[str, Any]], mixes: dict[str, dict[str, Any]]) -> None:
    for name, entry in mixes.items():
        into[name] = {**into.get(name, {}), **entry}


def _read_mapping(path: Path, said: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f'{said}: no such file')
    try:
        options = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except yaml.YAMLError as e:
        raise ValueError(f'{said} is not YAML: {e}') from e
    if not isinstance(options, dict):
        raise ValueError(f'{said} must hold a mapping of options to values, got {type(options).__name__}')
    return _with_underscores(options)


def _with_underscores(options: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).replace('-', '_'): value for key, value in options.items()}


# Command line

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


def create_parser(
        config_class: type[Options],
        usage: str,
        description: str,
        prog: str | None = None,
) -> argparse.ArgumentParser:
    """A command line of --config and every option of a configuration; what is not given is not in the result."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=118),
        allow_abbrev=False,
    )
    parser.add_argument(
        '-c', '--config', metavar='RECIPE',
        help='read options from a YAML file, or from a recipe by its name, e.g. imagenet/resnet50_300ep; flags win')
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
