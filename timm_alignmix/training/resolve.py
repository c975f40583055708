"""From flags, a YAML file and the sample's settings to one `TrainConfig`."""
import difflib
import logging
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from timm_alignmix.data import SAMPLE_DEFAULTS

from .config import Options, TrainConfig, flag

_logger = logging.getLogger(__name__)


def near_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known names that look like `name`, '' where none does."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def read_yaml(path: str, config_class: type[Options] = TrainConfig) -> dict[str, Any]:
    """Options of a YAML file and of the files it is based on.

    Args:
        path: A mapping of option names ('-' and '_' are the same) to values. The key `base` names one file or a list of
            them, relative to this one, whose options hold where this file is silent; of several the later wins.
            A value replaces the base's as a whole, mappings such as `mix_kwargs` too.
        config_class: The configuration that has the options.

    Raises:
        ValueError: A file is missing, no mapping, has a key that is no option, or is its own base.
    """
    return _read_layers(Path(path), config_class, ())


def _read_layers(path: Path, config_class: type[Options], above: tuple[Path, ...]) -> dict[str, Any]:
    """Options of a file over those of its bases; `above` are the files that led here, the first one first."""
    said = f'--config {path}' + (f' (base of {above[-1]})' if above else '')
    if path.resolve() in [file.resolve() for file in above]:
        raise ValueError(f'{said}: the file is its own base, through ' + ' -> '.join(map(str, (*above, path))))
    options = _read_mapping(path, said)
    bases = options.pop('base', [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f'{said}: base must be a file or a list of files, got {bases!r}')
    known = [option.name for option in fields(config_class)]
    unknown = [f'{key!r}{near_names(key, [*known, "base"])}' for key in options if key not in known]
    if unknown:
        raise ValueError(f'{said} has unknown keys: ' + ', '.join(unknown))
    merged: dict[str, Any] = {}
    for base in bases:
        merged.update(_read_layers(path.parent / base, config_class, (*above, path)))
    return {**merged, **options}


def _read_mapping(path: Path, said: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f'{said}: no such file')
    try:
        options = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except yaml.YAMLError as e:
        raise ValueError(f'{said} is not YAML: {e}') from e
    if not isinstance(options, dict):
        raise ValueError(f'{said} must hold a mapping of options to values, got {type(options).__name__}')
    return {str(key).replace('-', '_'): value for key, value in options.items()}


def resolve_config(flags: dict[str, Any], config_file: str | None = None) -> TrainConfig:
    """Merge the sources of options: flags win over the YAML file, which wins over its bases and the defaults.

    With no data directory, data set or YAML file the run is the built-in sample, under the sample's own settings.

    Args:
        flags: Options given explicitly.
        config_file: YAML file of options, or None.

    Raises:
        ValueError: An unknown key or a value that its option does not take, by name.
    """
    if config_file:
        base = read_yaml(config_file)
    elif flags.get('data_dir') or flags.get('dataset'):
        base = {}
    else:
        base = dict(SAMPLE_DEFAULTS)
        used = ' '.join(f'{flag(key)} {value}' for key, value in base.items() if key not in flags)
        _logger.info(f'No --data-dir, --dataset or --config: training on the built-in sample with {used}')
    return TrainConfig(**{**base, **flags})
