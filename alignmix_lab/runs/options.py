"""Options of a command: dataclass fields that carry their flag, read from the command line and from YAML files."""
import argparse
import difflib
import math
import re
import sys
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from timm_alignmix.mixes import ParseMix, canonical, list_mixes

# Headings of --help, in order; any others follow.
GROUPS = (
    'Data', 'Mixing', 'Detector', 'Model', 'Optimizer', 'Learning rate schedule', 'Augmentation and regularization',
    'Batch norm and weight averaging', 'Speed and device', 'Run, logs and checkpoints')
# The copy that is installed with the package, or recipes/ of a clone.
_PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = next((path for path in (_PACKAGE / 'recipes', _PACKAGE.parent / 'recipes') if path.is_dir()), None)


# One name, or several with their weights.
Weights = str | dict[str, float]


def config_option(
        group: str, default: Any, text: str, type: Any = str, *, choices: tuple | None = None,
        nargs: str | int | None = None, const: Any = None, low: float | None = None, above: float | None = None,
        below: float | None = None, flags: tuple[str, ...] = (), affects_result: bool = True) -> Any:
    """Make a dataclass field that is also a command-line flag.

    Args:
        default: Default value; None if it is decided later, as `text` explains.
        type: Type of the value, or of each value with `nargs`; dict for key=value pairs; Weights for one name, or
            several as name=weight.
        nargs: As in argparse: a number or '+' makes the value a list, '?' allows the flag alone, meaning `const`.
        low, above, below: Smallest allowed number, exclusive lower and exclusive upper limit.
        flags: Short forms.
        affects_result: Whether the result depends on the value. Options that do not affect it may change when a run
            resumes, are left out of exported recipes and do not distinguish runs or evaluations.
    """
    return _field(default, dict(
        group=group, help=text, type=type, choices=choices, nargs=nargs, const=const, low=low, above=above, below=below,
        flags=flags, affects_result=affects_result))


def with_default(config_class: type, name: str, default: Any) -> Any:
    """Copy an option of a base class, with another default."""
    return _field(default, config_class.__dataclass_fields__[name].metadata)


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def _default(option: Field) -> Any:
    return option.default if option.default is not MISSING else option.default_factory()


@dataclass
class Options:
    """A configuration whose fields, made by :func:`config_option`, are checked and converted to their types."""

    def __post_init__(self):
        for option in fields(self):
            if option.metadata:  # other fields are plain
                setattr(self, option.name, _convert(option, getattr(self, option.name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, for files."""
        return asdict(self)


def result_options(config_class: type[Options]) -> list[str]:
    """Return the names of the options that affect the result."""
    return [option.name for option in fields(config_class) if option.metadata['affects_result']]


def changed_options(config: Options, earlier: dict[str, Any]) -> list[str]:
    """List the options that differ from those of an earlier run's args.yaml and affect the result.

    An option that is None now is decided by the run, so it never counts as different; nor does one missing there.
    """
    now = yaml.safe_load(yaml.safe_dump(config.to_dict()))  # tuples become lists, as in the file
    return [
        f'{flag(name)} {earlier[name]!r} -> {now[name]!r}' for name in result_options(type(config))
        if name in earlier and now[name] is not None and earlier[name] != now[name]]


def flag(name: str) -> str:
    """Spell an option's name as a flag."""
    return '--' + name.replace('_', '-')


def option_words(name: str, value: Any) -> list[str]:
    """Spell an option as command-line words; a ValueError for None, which no flag can express."""
    if value is None:
        raise ValueError(f'{flag(name)} cannot be unset by a flag; use a recipe without it')
    if isinstance(value, bool):
        return [flag(name if value else f'no_{name}')]
    if isinstance(value, dict):
        return [flag(name), *(f'{key}={_literal(entry)}' for key, entry in value.items())]
    return [flag(name), *map(str, value if isinstance(value, (list, tuple)) else [value])]


def _literal(value: Any) -> str:
    """Write a value so that timm's key=value flags read it back: as text if possible, else as a Python literal."""
    try:
        is_plain = isinstance(value, str) and literal_eval(value) == value
    except ValueError:
        is_plain = True  # read as text
    except SyntaxError:
        is_plain = False
    return value if is_plain else repr(value)


def near_names(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests names similar to `name`, or ''."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f'; did you mean {" or ".join(near)}?' if near else ''


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is in a flag."""


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?\d+(\.\d*)?[eE][-+]?\d+$'), list('-+0123456789'))


def load_yaml(text: str, said: str) -> Any:
    """Read a text as YAML; if it is none, the message of the ValueError begins with `said`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        raise ValueError(f'{said} is not YAML: {e}') from e


def _convert(option: Field, value: Any) -> Any:
    """Check and convert a value: YAML reads 1e-3 as text and 1 as an int where a flag reads floats."""
    kind, nargs, default = option.metadata['type'], option.metadata['nargs'], option.default
    if value is None and default is None:
        return None
    if nargs not in (None, '?'):
        values = [_convert_one(option, v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if isinstance(nargs, int) and len(values) != nargs:
            raise ValueError(f'{flag(option.name)} takes {nargs} values, got {value!r}')
        return values
    if kind == Weights:
        if not isinstance(value, (str, dict)):
            raise ValueError(f'{flag(option.name)} takes a name, or name=weight pairs, got {value!r}')
        _check_finite(flag(option.name), value)
        return value
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f'{flag(option.name)} takes key=value pairs (a mapping in YAML), got {value!r}')
        for key, entry in value.items():
            _check_finite(f'{flag(option.name)} {key}', entry)
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
    _check_finite(flag(option.name), value)
    if meta['choices'] and value not in meta['choices']:
        raise ValueError(f'{flag(option.name)} must be one of {", ".join(map(repr, meta["choices"]))}, got {value!r}')
    if meta['low'] is not None and value < meta['low']:
        raise ValueError(f'{flag(option.name)} must be at least {meta["low"]}, got {value}')
    if meta['above'] is not None and value <= meta['above']:
        raise ValueError(f'{flag(option.name)} must be larger than {meta["above"]}, got {value}')
    if meta['below'] is not None and value >= meta['below']:
        raise ValueError(f'{flag(option.name)} must be smaller than {meta["below"]}, got {value}')
    return value


def _check_finite(said: str, value: Any) -> None:
    for number in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f'{said} takes finite numbers, got {value!r}')


# YAML files

# Options of one file, and those that hold where a method is chosen.
_Layer = tuple[dict[str, Any], dict[str, dict[str, Any]]]


def find_recipe(name: str, above: Path | None = None) -> Path:
    """Find the YAML file of a path, or of a recipe's name such as `imagenet/resnet50_300ep`.

    A path is relative to `above`, the file whose base is looked for. A ValueError says that there is neither.
    """
    path = above.parent / name if above else Path(name)
    if path.is_file():
        return path
    files = [file.relative_to(RECIPES) for file in sorted(RECIPES.rglob('*.yaml'))] if RECIPES else []
    known = [
        file.with_suffix('').as_posix() for file in files if file.name[0] != '_' and file.parts[0] != 'accelerate']
    recipe = name.removeprefix('recipes/').removesuffix('.yaml')
    if recipe not in known:
        said = f'--config {path} (base of {above})' if above else f'--config {name}'
        near = near_names(recipe, known) or f'; recipes: {", ".join(known) or "not installed"}'
        raise ValueError(f'{said}: no such file, and no recipe of that name{near}')
    return RECIPES / f'{recipe}.yaml'


def read_yaml(name: str, config_class: type[Options], mix: Weights | None = None) -> dict[str, Any]:
    """Read the options of a YAML file and of the files it is based on.

    Args:
        name: A file, or the name of a recipe. It maps option names ('-' and '_' are the same) to values; a value
            replaces that of a base as a whole, mappings such as `mix_kwargs` too. Two keys are no options: `base` names
            a recipe, a file relative to this one, or a list of these of which the later wins, that hold where this file
            is silent; `mixes` maps methods to options that hold where that method is chosen. An entry may name another
            `mix`, as a variant does: `alignmix_release: {mix: alignmix, mix_kwargs: {...}}`.
        config_class: The configuration that has the options.
        mix: Method or variant chosen by a flag, or several methods with their weights, for which no entry of `mixes`
            holds; None takes the file's. `mix_kwargs` of another method, or of others, are left out.

    Raises:
        ValueError: A file is missing, no mapping, has a key that is no option, or is its own base; or there is no such
            method.
    """
    layers = _read_layers(find_recipe(name), config_class, ())
    if any(option.name == 'mix' for option in fields(config_class)):
        return _choose_mix(layers, mix, name)
    return {key: value for options, _ in layers for key, value in options.items()}


def recipe_mixes(name: str, config_class: type[Options]) -> list[str]:
    """Names of the entries under `mixes` of a recipe and its bases."""
    return list(dict.fromkeys(key for _, mixes in _read_layers(find_recipe(name), config_class, ()) for key in mixes))


def _read_layers(path: Path, config_class: type[Options], above: tuple[Path, ...]) -> list[_Layer]:
    """What the bases of a file say, then the file, so that the later wins; `above` are the files that led here."""
    said = f'--config {path}' + (f' (base of {above[-1]})' if above else '')
    if path.resolve() in [file.resolve() for file in above]:
        raise ValueError(f'{said}: the file is its own base, through ' + ' -> '.join(map(str, (*above, path))))
    options = _read_mapping(path, said)
    bases = options.pop('base', [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f'{said}: base must be a file or a list of files, got {bases!r}')
    known = [option.name for option in fields(config_class)]
    mixes = (options.pop('mixes', None) or {}) if 'mix' in known else {}
    if not isinstance(mixes, dict) or not all(isinstance(entry, dict) or entry is None for entry in mixes.values()):
        raise ValueError(f'{said}: mixes must map methods to mappings of options, got {mixes!r}')
    mixes = {str(name): _with_underscores(entry or {}) for name, entry in mixes.items()}
    for entry in (options, *mixes.values()):
        unknown = [f'{key!r}{near_names(key, [*known, "base", "mixes"])}' for key in entry if key not in known]
        if unknown:
            raise ValueError(f'{said} has unknown keys: ' + ', '.join(unknown))
    below = [layer for base in bases for layer in _read_layers(find_recipe(base, path), config_class, (*above, path))]
    return [*below, (options, mixes)]


def _choose_mix(layers: list[_Layer], mix: Weights | None, name: str) -> dict[str, Any]:
    """Options of all layers under one choice: a layer's entry for it wins over that layer, a later layer over both."""
    chosen = mix or next((options['mix'] for options, _ in reversed(layers) if 'mix' in options), 'none')
    entries = [next((entry for key, entry in mixes.items() if _methods(key) == _methods(chosen)), {})
               for _, mixes in layers]
    method = next((entry['mix'] for entry in reversed(entries) if 'mix' in entry), chosen)
    for unknown in (each for each in (method if isinstance(method, dict) else [str(method)])
                    if canonical(each) not in map(canonical, list_mixes())):
        variants = sorted({key for _, mixes in layers for key, entry in mixes.items() if 'mix' in entry})
        raise ValueError(
            f'unknown mix {unknown!r}{near_names(unknown, [*list_mixes(), *variants])}; available: '
            f'{", ".join(list_mixes())}; in the recipe {name}, each alone: {", ".join(variants) or "no others"}')
    merged: dict[str, Any] = {}
    owner = chosen
    for (options, _), entry in zip(layers, entries, strict=True):
        owner = options.get('mix', owner)
        if _methods(owner) != _methods(chosen):
            options = {key: value for key, value in options.items() if key != 'mix_kwargs'}
        merged.update({**options, **entry})
    return {**merged, 'mix': method}


def _methods(mix: Any) -> Any:
    """What a choice is recognised by: the name of a method or variant, or the set of several."""
    return {canonical(name) for name in mix} if isinstance(mix, dict) else canonical(str(mix))


def _read_mapping(path: Path, said: str) -> dict[str, Any]:
    options = load_yaml(path.read_text(encoding='utf-8'), said) or {}
    if not isinstance(options, dict):
        raise ValueError(f'{said} must hold a mapping of options to values, got {type(options).__name__}')
    return _with_underscores(options)


def _with_underscores(options: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).replace('-', '_'): value for key, value in options.items()}


# Command line

class KeyValues(ParseKwargs):
    """timm's key=value flag with an error message for words without '='."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes key=value pairs, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def _add_option(group: argparse._ArgumentGroup, option: Field) -> None:
    meta = option.metadata
    default = _default(option)
    shown = '' if default in (None, '', {}, False) else f' (default: {default})'
    settings = {'default': argparse.SUPPRESS, 'help': (meta['help'] + shown).replace('%', '%%')}
    if meta['type'] is bool:
        negatable = not option.name.startswith('no_')
        settings['action'] = argparse.BooleanOptionalAction if negatable else 'store_true'
    elif meta['type'] == Weights:
        settings.update(action=ParseMix, nargs='+', metavar='NAME')
    elif meta['type'] is dict:
        settings.update(action=KeyValues, nargs='*', metavar='KEY=VALUE')
    else:
        settings.update(type=meta['type'], nargs=meta['nargs'], const=meta['const'], choices=meta['choices'])
        if not meta['choices']:
            settings['metavar'] = option.name.split('_')[-1].upper()
    group.add_argument(flag(option.name), *meta['flags'], **settings)


def create_parser(
        config_class: type[Options], usage: str, description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Create a parser with --config and every option of a configuration; flags not given are absent from the result."""
    parser = argparse.ArgumentParser(
        prog=prog, usage=usage, description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=118),
        allow_abbrev=False)
    parser.add_argument(
        '-c', '--config', metavar='RECIPE',
        help='YAML file of options, or name of a recipe such as imagenet/resnet50_300ep; flags take precedence')
    options = fields(config_class)
    used = dict.fromkeys(option.metadata['group'] for option in options)
    titles = [title for title in GROUPS if title in used] + [title for title in used if title not in GROUPS]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for option in options:
        _add_option(groups[option.metadata['group']], option)
    return parser


def parse_flags(
        parser: argparse.ArgumentParser, config_class: type[Options],
        resolve: Callable[[dict[str, Any], str | None], Options], argv: list[str] | None = None) -> Options:
    """Read options from the command line; exits with a message if they are invalid.

    `resolve` makes the configuration from the given flags and the name of a YAML file or None.
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


@contextmanager
def blaming(config: Options, *names: str) -> Iterator[None]:
    """Turn an error that a library raises over some options into one that spells those that are not the default."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError) as e:
        given = {option.name: getattr(config, option.name) for option in fields(config)
                 if option.name in names and getattr(config, option.name) not in (None, _default(option))}
        if not given:
            raise
        words = ' '.join(word for name, value in given.items() for word in option_words(name, value))
        raise ValueError(f'{words} cannot work ({type(e).__name__}: {e}); change it or leave it out') from e


@contextmanager
def exit_with_message(prog: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn ValueError, ImportError, OSError and further `errors` into the message of a command that exits."""
    try:
        yield
    except (ValueError, ImportError, OSError, *errors) as e:
        sys.exit(f'{prog}: error: {e}')
