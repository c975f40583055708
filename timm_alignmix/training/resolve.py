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
    """Options of a YAML file.

    Args:
        path: A mapping of option names ('-' and '_' are the same) to values.
        config_class: The configuration that has the options.

    Raises:
        ValueError: The file is missing, no mapping, or has a key that is no option.
    """
    if not Path(path).is_file():
        raise ValueError(f'--config {path}: no such file')
    try:
        options = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except yaml.YAMLError as e:
        raise ValueError(f'--config {path} is not YAML: {e}') from e
    if not isinstance(options, dict):
        raise ValueError(f'--config {path} must hold a mapping of options to values, got {type(options).__name__}')
    options = {str(key).replace('-', '_'): value for key, value in options.items()}
    known = [option.name for option in fields(config_class)]
    unknown = [f'{key!r}{near_names(key, known)}' for key in options if key not in known]
    if unknown:
        raise ValueError(f'--config {path} has unknown keys: ' + ', '.join(unknown))
    return options


def resolve_config(flags: dict[str, Any], config_file: str | None = None) -> TrainConfig:
    """Merge the sources of options: flags win over the YAML file, which wins over the defaults.

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
