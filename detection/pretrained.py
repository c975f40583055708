"""Classification weights for a detector's backbone, with a check that every key is loaded.

For some families `load_state_dict(strict=False)` on a feature backbone silently loads nothing, which turns a transfer
experiment into training from scratch. Here weights are first loaded into a whole classification network of their own
size, where every key must match, and then transferred to the network of the detector's size.
"""
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_model_args, get_model_traits, load_state_dict
from torch import nn

from alignmix_lab.classification.export_checkpoint import export_checkpoint
from alignmix_lab.runs.checkpoint import load_weights
from alignmix_lab.runs.models import create_model
from timm_alignmix.weights import read_config


@dataclass(frozen=True)
class Source:
    """A classification network as described by its weights."""
    model: nn.Module  # the network, on the meta device if it has no weights
    arch: str  # timm's name of its architecture
    kwargs: dict[str, Any]  # arguments of `timm.create_model` that rebuild it
    mean: tuple[float, ...]  # of the pixels of its images, 0-1 scale
    std: tuple[float, ...]
    weights: str | None  # source of its weights, None for random ones


def read_source(backbone: str, weights: str | Path | None = None, use_ema: bool = True) -> Source:
    """Build the classification network described by a backbone's name or by its weights.

    Args:
        backbone: timm name with or without a tag, folder of exported weights, 'local-dir:FOLDER' or 'hf-hub:NAME'.
        weights: Folder, tag or name as above, or a training checkpoint; None for random weights.
        use_ema: Use the moving average of a checkpoint that has one.

    Raises:
        ValueError: There is no such model or weights, the architectures differ, or keys do not match.
    """
    if weights is None:
        with torch.device('meta'):
            model = _create(_timm_name(backbone))
        return _describe(model, None)
    if Path(weights).is_file():
        source = _read_checkpoint(Path(weights), use_ema)
    else:
        source = _read_named(_timm_name(weights))
    with torch.device('meta'):
        arch = _arch(_create(_timm_name(backbone)))
    if arch != source.arch:
        raise ValueError(
            f'weights {weights} are of {source.arch}, the backbone is {arch}; pass backbone={source.arch!r}')
    return source


def adapt(source: Source, **kwargs: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the source's network with other arguments of `timm.create_model` and transfer its weights.

    Position tables of another image size are resized by timm's rules for the family, and LeViT's attention biases by
    `resize_offset_table`.

    Returns:
        The network and the keys that were resized.

    Raises:
        ValueError: Keys or shapes do not match.
    """
    kwargs = {**source.kwargs, **kwargs}
    model = _create(source.arch, **kwargs)
    if source.weights is None:
        return model, ()
    state = source.model.state_dict()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    resized = tuple(key for key, shape in shapes.items() if key in state and state[key].shape != shape)
    for key in resized:
        if key.endswith('.attention_biases'):
            grids = [net.get_submodule(key.rpartition('.')[0]).resolution for net in (source.model, model)]
            state[key] = resize_offset_table(state[key], *grids)
    if any(state[key].shape != shapes[key] for key in resized):
        overlay = dict(
            state_dict=dict(state),
            num_classes=kwargs['num_classes'],
            input_size=source.model.pretrained_cfg['input_size'],
        )
        model = _create(source.arch, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        state.update({key: model.state_dict()[key] for key in resized})
    load_weights(model, state, source.weights, source.arch)
    return model, resized


def resize_offset_table(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize attention biases that are stored per absolute offset between two positions (LeViT).

    Offset 0 stays offset 0 and the largest offset stays the largest, so that a bias keeps its meaning as a fraction of
    the image. Grids are (H, W).

    Args:
        table: (heads, H * W); entry dy * W + dx is the bias of positions dy rows and dx columns apart.

    Returns:
        (heads, new H * new W), in the dtype of the table.
    """
    maps = table.float().reshape(1, len(table), *grid)
    maps = F.interpolate(maps, size=tuple(new_grid), mode='bicubic', align_corners=True)
    return maps.flatten(2)[0].to(table.dtype)


def _timm_name(name: str | Path) -> str:
    """Add timm's prefix to the path of a folder."""
    return f'local-dir:{name}' if ':' not in str(name) and Path(name).is_dir() else str(name)


def _create(name: str, **kwargs: Any) -> nn.Module:
    return create_model(name, f'backbone {name}', 'pass the folder or file of weights as --weights', **kwargs)


def _arch(model: nn.Module) -> str:
    return model.pretrained_cfg['architecture']


def _describe(model: nn.Module, weights: str | None) -> Source:
    cfg = model.pretrained_cfg
    if get_model_traits(model).get('in_chans', 3) != 3:
        raise ValueError(f'{weights or _arch(model)} takes {model.in_chans} channels; the detectors take RGB images')
    # get_model_args omits dropout, which belongs to the classification run and not to the architecture.
    return Source(model, _arch(model), get_model_args(model), tuple(cfg['mean']), tuple(cfg['std']), weights)


def _read_named(name: str) -> Source:
    """Read an exported folder, tag or hub name. Local files are read here, others by timm's strict loader."""
    model = _create(name)
    file = model.pretrained_cfg.get('file')
    if file and Path(file).is_dir():
        file = str(Path(file, 'model.safetensors'))
    if not file or not Path(file).is_file():
        return _describe(_create(name, pretrained=True), name)
    load_weights(model, load_state_dict(file), name, _arch(model))
    return _describe(model, name)


def _read_checkpoint(path: Path, use_ema: bool) -> Source:
    """Export a training checkpoint and read the export, which describes the network and its images."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(path, folder, ema=None if use_ema else False)
        source = _read_named(f'local-dir:{folder}')
        ema = read_config(folder)['training']['weights'] == 'ema'
    return replace(source, weights=f'{path} (moving average)' if ema else str(path))
