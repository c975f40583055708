"""Exported folders: the files that `timm.create_model('local-dir:FOLDER')` reads, and the check that they fit."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of an exported folder.

    Raises:
        ValueError: The file is missing or not what timm's `save_for_hf` writes.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise ValueError(f'{path} cannot be read ({e}): {folder} is not a folder of exported weights') from e
    wanted = dict(architecture=str, num_classes=int, pretrained_cfg=dict)
    if not isinstance(config, dict) or not all(isinstance(config.get(key), kind) for key, kind in wanted.items()):
        raise ValueError(f'{path} is not the configuration of a timm model: it needs {", ".join(wanted)}')
    if not isinstance(config.get('model_args') or {}, dict):
        raise ValueError(f'{path} is not the configuration of a timm model: its model_args are not a dictionary')
    return config


def key_problems(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Describe how the tensors of a file differ in name or shape from a model's; '' if they do not.

    Args:
        expected: Tensors of the model, by name.
        found: Tensors of the file, by name.

    Example:
        >>> import torch
        >>> key_problems({'fc.weight': torch.ones(3, 4)}, {'fc.weight': torch.ones(2, 4), 'fc.bias': torch.ones(2)})
        'unexpected keys: fc.bias; other shapes: fc.weight is (2, 4), not (3, 4)'
    """
    problems = {
        'missing keys': [key for key in expected if key not in found],
        'unexpected keys': [key for key in found if key not in expected],
        'other shapes': [
            f'{key} is {tuple(found[key].shape)}, not {tuple(value.shape)}'
            for key, value in expected.items() if key in found and found[key].shape != value.shape],
    }
    return '; '.join(
        f'{what}: {", ".join(keys[:5])}' + (f' and {len(keys) - 5} more' if len(keys) > 5 else '')
        for what, keys in problems.items() if keys)


def verify(folder: str | Path) -> dict[str, Any]:
    """Check that a folder's weights fill its network exactly, from names and shapes alone.

    timm checks this when it loads a whole model. When it leaves the classifier out (features_only, another number of
    classes) it does not, and a partial file gives a partly random model.

    Args:
        folder: A folder with `model.safetensors` and `config.json`.

    Returns:
        The folder's configuration.

    Raises:
        ValueError: A file is missing, damaged, or of another network; the message names the keys that are missing,
            unexpected or of another shape.
        RuntimeError: timm does not know the network.
    """
    folder = Path(folder)
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f'{folder} has no {WEIGHTS}; weights in other formats are not loaded')
    with torch.device('meta'):  # names and shapes only
        try:
            with safe_open(path, 'pt') as file:
                found = {key: torch.empty(file.get_slice(key).get_shape()) for key in file.keys()}
        except (OSError, SafetensorError) as e:
            raise ValueError(f'{path} is damaged or not in the safetensors format ({e})') from e
        try:
            model = timm.create_model(f'local-dir:{folder}')
        except TypeError as e:
            raise ValueError(f'{folder / CONFIG} does not fit this version of timm ({e})') from e
    problems = key_problems(model.state_dict(), found)
    if problems:
        raise ValueError(f'{path} does not fit {config["architecture"]}: {problems}')
    return config
