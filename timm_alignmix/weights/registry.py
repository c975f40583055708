"""Tags of exported weights on this machine: `timm.create_model('resnet50.densemultimix_in1k', pretrained=True)`.

`import timm_alignmix` lists one folder, :func:`registry_dir`, and gives timm a tag for every folder in it that is named
{architecture}.{tag}. It opens no file, and nothing in that folder makes the import fail. The files are read when a tag
is asked for; ValueError then says what is wrong with them. TIMM_ALIGNMIX_NO_LOCAL_WEIGHTS=1 skips the listing.

timm takes the tags of a network from `default_cfgs` in the network's module at the time it registers the network. A tag
of ours is added there and the network is registered again, in its own module. Its entry point is wrapped, to pass on
the arguments the weights were trained with (a ViT without class token, another image size): timm's tags have no place
for them. Other tags, the default tag and listings stay as they were; tests/timm_alignmix/weights/test_tags.py checks
this for every network.
"""
import functools
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, is_model, model_entrypoint, register_model, split_model_name_tag
from torch import nn

from .card import make_card
from .export import write_json
from .folder import CARD, CONFIG, WEIGHTS, read_config, verify

_logger = logging.getLogger(__name__)

_NAME = re.compile(r'\w+\.\w[\w.-]*', re.ASCII)
_folders: dict[str, Path] = {}  # weights of each registered tag, by name


class _LocalCfg(PretrainedCfg):
    """Entry in timm's tables that knows its folder only. timm hands out deep copies, which are read from the files."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PretrainedCfg:
        config = _read(Path(self.file), self.architecture)
        own = dict(
            architecture=self.architecture, tag=self.tag, num_classes=config['num_classes'],
            label_names=config.get('label_names'), file=self.file, source=self.source)
        try:
            return PretrainedCfg(**{**config['pretrained_cfg'], **own})
        except TypeError as e:
            raise ValueError(f'{Path(self.file) / CONFIG} does not fit this version of timm ({e})') from e


def registry_dir() -> Path:
    """Folder of installed weights: $TIMM_ALIGNMIX_WEIGHTS, or timm_alignmix/weights in $XDG_DATA_HOME (~/.local/share).

    Raises:
        RuntimeError: There is no home directory.
    """
    named = os.environ.get('TIMM_ALIGNMIX_WEIGHTS')
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get('XDG_DATA_HOME') or '~/.local/share').expanduser() / 'timm_alignmix' / 'weights'
    except RuntimeError as e:
        raise RuntimeError(
            'no home directory to keep installed weights; set TIMM_ALIGNMIX_WEIGHTS to a folder, or HOME') from e


def list_local(registry: str | Path | None = None) -> dict[str, Path]:
    """Installed weights by name, {architecture}.{tag}, sorted. The files are not looked at.

    Args:
        registry: Folder of installed weights; None for :func:`registry_dir`.

    Raises:
        OSError: The folder exists and cannot be listed.
        RuntimeError: There is no home directory.

    Example:
        >>> list_local('no/such/folder')
        {}
    """
    registry = Path(registry or registry_dir()).absolute()
    try:
        names = sorted(filter(_NAME.fullmatch, os.listdir(registry)))
    except FileNotFoundError:
        return {}
    return {name: registry / name for name in names if os.path.isdir(registry / name)}


def install(folder: str | Path, tag: str | None = None, registry: str | Path | None = None) -> str:
    """Copy an exported folder to the local registry and make its tag known to timm.

    Args:
        folder: A folder of :func:`export`.
        tag: Tag to give it; None for its own, {mix}_{dataset}.
        registry: Folder of installed weights; None for :func:`registry_dir`.

    Returns:
        The name for `timm.create_model`.

    Raises:
        ValueError: The weights do not fit their network, there is no tag, or timm has weights of that name.

    Example:
        >>> install('runs/resnet50/export', tag='densemultimix_in1k')  # doctest: +SKIP
        'resnet50.densemultimix_in1k'
    """
    config = verify(folder)
    tag = tag or config['pretrained_cfg'].get('tag')
    if not tag:
        raise ValueError(f'{folder} has no tag of its own; pass one, such as densemultimix_in1k')
    name = f'{config["architecture"]}.{tag}'
    if not _NAME.fullmatch(name):
        raise ValueError(f'{tag!r} is not a tag; use letters, digits, "_" and "-", such as densemultimix_in1k')
    _check_free(name)
    target = Path(registry or registry_dir()).absolute() / name
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
    """Make the tags of the local registry known to timm; `import timm_alignmix` calls it.

    Folders of networks that timm does not know are skipped; so is, with a warning, a folder named as weights of timm's
    own, or a registry that cannot be listed.

    Args:
        registry: Folder of installed weights; None for :func:`registry_dir`.

    Returns:
        The names for `timm.create_model`.
    """
    try:
        found = list_local(registry)
    except RuntimeError:  # no home directory, hence nothing installed
        return []
    except OSError as e:
        _logger.warning(f'Installed weights are not available: {e}')
        return []
    names = []
    for name, folder in found.items():
        if not is_model(name):
            continue
        try:
            _register(name, folder)
            names.append(name)
        except ValueError as e:
            _logger.warning(f'{folder} is not available as {name}: {e}')
    return names


def _default_cfgs(architecture: str) -> dict[str, DefaultCfg]:
    """Tags of all networks in the module that defines a network."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    cfgs = getattr(module, 'default_cfgs', {})
    if not isinstance(cfgs.get(architecture), DefaultCfg):
        raise ValueError(f'{module.__name__} has no DefaultCfg for {architecture} to add tags to')
    return cfgs


def _check_free(name: str) -> None:
    architecture, tag = split_model_name_tag(name)
    if tag in _default_cfgs(architecture)[architecture].tags and name not in _folders:
        raise ValueError(f'timm has weights of its own named {name}; install them under another tag')


def _register(name: str, folder: Path) -> None:
    _check_free(name)
    architecture, tag = split_model_name_tag(name)
    cfgs = _default_cfgs(architecture)
    known = cfgs[architecture]
    cfgs[architecture] = DefaultCfg(
        tags=deque(dict.fromkeys([*known.tags, tag])),  # the first is the default, which stays
        cfgs={**known.cfgs, tag: _LocalCfg(file=str(folder), source='local-dir')},
        is_pretrained=known.is_pretrained,
    )
    entry_point = model_entrypoint(architecture)
    if not hasattr(entry_point, 'takes_local_tags'):
        entry_point = _with_arguments(architecture, entry_point)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Overwriting', UserWarning)
        register_model(entry_point)
    _folders[name] = folder


def _with_arguments(architecture: str, entry_point: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Entry point that builds what our tags were trained with, and anything else as before."""
    @functools.wraps(entry_point)
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        folder = _find(architecture, pretrained_cfg)
        if folder is None:
            return entry_point(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        model_args = _read(folder, architecture).get('model_args') or {}
        if pretrained:
            verify(folder)
        kwargs = {**model_args, **kwargs, 'pretrained_model_args': model_args}
        model = entry_point(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
        model._model_args = dict(model_args)  # timm.create_model adds its caller's, so that a later export keeps both
        return model
    create.takes_local_tags = True  # type: ignore[attr-defined]
    return create


def _find(architecture: str, pretrained_cfg: Any) -> Path | None:
    """Folder of a tag of ours, given as a string or as the configuration that timm resolved it to."""
    if isinstance(pretrained_cfg, str):
        return _folders.get(f'{architecture}.{pretrained_cfg}')
    file = pretrained_cfg.get('file') if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, 'file', None)
    return next((folder for folder in _folders.values() if file and Path(file) == folder), None)


def _read(folder: Path, architecture: str) -> dict[str, Any]:
    config = read_config(folder)
    if config['architecture'] != architecture:
        raise ValueError(f'{folder} has weights of {config["architecture"]}, not of {architecture} as its name says')
    return config
