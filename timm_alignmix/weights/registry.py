"""Tags of exported weights on this machine: `timm.create_model('resnet50.densemultimix_in1k', pretrained=True)`.

timm reads a model's tags from a table that is filled when the model's module is imported. Adding a tag by public means
registers the whole model anew, with a warning, and moves it to our module in timm's listings. So the tag is entered in
the tables themselves, and the model's entry point gets the arguments its weights were trained with (a ViT without class
token, another image size), for which timm's tags have no place. tests/weights/test_tags.py holds what is relied on.
"""
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, is_model, split_model_name_tag
from torch import nn

from .card import make_card
from .export import write_json
from .folder import CARD, CONFIG, WEIGHTS, read_config, verify

_logger = logging.getLogger(__name__)

_folders: dict[str, Path] = {}  # name of each registered tag: where its weights are
_wrapped: set[str] = set()  # networks whose entry point knows our tags


def registry_dir() -> Path:
    """$TIMM_ALIGNMIX_WEIGHTS, or timm_alignmix/weights in $XDG_DATA_HOME (~/.local/share)."""
    named = os.environ.get('TIMM_ALIGNMIX_WEIGHTS')
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get('XDG_DATA_HOME') or '~/.local/share').expanduser() / 'timm_alignmix' / 'weights'


def list_local(registry: str | Path | None = None) -> dict[str, Path]:
    """Installed weights: `{architecture}.{tag}` and their folders, by name.

    Args:
        registry: Folder of installed weights; None for :func:`registry_dir`.
    """
    registry = Path(registry or registry_dir())
    return {config.parent.name: config.parent for config in sorted(registry.glob(f'[!.]*.*/{CONFIG}'))}


def install(folder: str | Path, tag: str | None = None, registry: str | Path | None = None) -> str:
    """Copy an exported folder to the local registry, and make its tag known to timm.

    Args:
        folder: A folder of :func:`export`.
        tag: Tag to give it; None for its own, `{mix}_{dataset}`.
        registry: Folder of installed weights; None for :func:`registry_dir`.

    Returns:
        The name for `timm.create_model`.

    Raises:
        ValueError: The weights do not fit their network, there is no tag, or timm has weights of that name.
    """
    config = verify(folder)
    tag = tag or config['pretrained_cfg'].get('tag')
    if not tag:
        raise ValueError(f'{folder} has no tag of its own; pass one, such as densemultimix_in1k')
    name = f'{config["architecture"]}.{tag}'
    if tag != os.path.basename(tag) or tag.startswith('.'):
        raise ValueError(f'tag {tag!r} is no name; take letters, digits, "_" and "-", such as densemultimix_in1k')
    _check_free(name)
    target = Path(registry or registry_dir()) / name
    target.mkdir(parents=True, exist_ok=True)
    config['pretrained_cfg']['tag'] = tag
    with tempfile.TemporaryDirectory(prefix='.install.', dir=target) as temporary:
        draft = Path(temporary)
        shutil.copy2(Path(folder) / WEIGHTS, draft / WEIGHTS)
        write_json(draft / CONFIG, config)
        (draft / CARD).write_text(make_card(config), encoding='utf-8')
        for file in (WEIGHTS, CARD, CONFIG):
            os.replace(draft / file, target / file)
    _register(name, target)
    return name


def register_local(registry: str | Path | None = None) -> list[str]:
    """Make every tag of the local registry known to timm; called by `import timm_alignmix`.

    A folder that cannot be read is left out with a warning: it must not stop anyone's import.

    Args:
        registry: Folder of installed weights; None for :func:`registry_dir`.

    Returns:
        The names for `timm.create_model`.
    """
    names = []
    for name, folder in list_local(registry).items():
        try:
            _register(name, folder)
            names.append(name)
        except ValueError as e:
            _logger.warning(f'{folder} is not available as {name}: {e}')
    return names


def _check_free(name: str) -> None:
    if name in get_arch_pretrained_cfgs(name) and name not in _folders:
        raise ValueError(f'timm has weights of its own named {name}; install them under another --tag')


def _register(name: str, folder: Path) -> None:
    from timm.models import _registry as tables

    architecture, tag = split_model_name_tag(name)
    config = read_config(folder)
    if not is_model(architecture) or config['architecture'] != architecture:
        raise ValueError(f'its network {config["architecture"]} is not known to timm as {architecture}')
    _check_free(name)
    try:
        cfg = PretrainedCfg(**{
            **config['pretrained_cfg'],
            'architecture': architecture,
            'tag': tag,
            'num_classes': config['num_classes'],
            'label_names': config.get('label_names'),
            'file': str(folder.absolute()),
            'source': 'local-dir',
        })
    except TypeError as e:
        raise ValueError(f'{folder / CONFIG} is not a configuration of this version of timm ({e})') from e
    tables._model_pretrained_cfgs[name] = cfg
    tables._model_has_pretrained.add(name)
    if name not in tables._model_with_tags[architecture]:
        tables._model_with_tags[architecture].append(name)
    if architecture not in _wrapped:
        entry_points = tables._model_entrypoints
        entry_points[architecture] = _with_arguments(architecture, entry_points[architecture])
        _wrapped.add(architecture)
    _folders[name] = folder.absolute()


def _with_arguments(architecture: str, entry_point: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """An entry point that builds what our tags were trained with, and anything else as before."""
    @functools.wraps(entry_point)
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        folder = _find(architecture, pretrained_cfg)
        if folder is None:
            return entry_point(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        config = verify(folder) if pretrained else read_config(folder)
        model_args = config.get('model_args', {})
        kwargs = {**model_args, **kwargs, 'pretrained_model_args': model_args}
        model = entry_point(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        model._model_args = dict(model_args)  # timm.create_model adds its caller's, so that a later export keeps both
        return model
    return create


def _find(architecture: str, pretrained_cfg: Any) -> Path | None:
    """The folder that a tag, or the configuration timm resolved it to, stands for."""
    if isinstance(pretrained_cfg, str):
        return _folders.get(f'{architecture}.{pretrained_cfg}')
    file = pretrained_cfg.get('file') if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, 'file', None)
    return next((folder for folder in _folders.values() if file and Path(file) == folder), None)
