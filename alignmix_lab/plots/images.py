"""Helpers of all pictures: loading images and networks, and drawing images and weights of positions."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from alignmix_lab.evaluation.config import EvalConfig
from alignmix_lab.evaluation.models import EvalModel, open_models
from alignmix_lab.runs.checkpoint import read_checkpoint
from alignmix_lab.runs.sharding import read_shards
from timm_alignmix.mixes.alignmix_ae import AlignMixAE
from timm_alignmix.task import MixTask

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')


def find_images(paths: Sequence[str | Path], count: int) -> list[Path]:
    """Collect image files; of each folder, some that are spread evenly over it.

    Args:
        paths: Files or folders.
        count: Total number of images; further ones are ignored.

    Raises:
        ValueError: A path does not exist, or there are too few images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in SUFFIXES)
            picked = np.linspace(0, len(inside) - 1, min(count, len(inside))).round().astype(int)
            found += [inside[i] for i in picked]
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f'{path}: no such file or folder')
    if len(found) < count:
        raise ValueError(f'this picture needs {count} images, got {len(found)} from {", ".join(map(str, paths))}')
    return found[:count]


def read_images(files: Sequence[str | Path], img_size: int, crop_pct: float = 1.0) -> torch.Tensor:
    """Read pixels (B, 3, img_size, img_size) in [0, 1], after resizing the shorter side and cropping the centre."""
    transform = create_transform((3, img_size, img_size), crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = []
    for file in files:
        with Image.open(file) as image:
            pixels.append(transform(image.convert('RGB')))
    return torch.stack(pixels).clamp(0, 1)


def network_input(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalise pixels for a model."""
    mean, std = _normalisation(model, pixels)
    return (pixels - mean) / std


def to_pixels(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Invert :func:`network_input`, clamped to [0, 1]."""
    mean, std = _normalisation(model, images)
    return (images * std + mean).clamp(0, 1)


def _normalisation(model: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = resolve_data_config({}, model=model)
    return tuple(torch.tensor(config[key], dtype=like.dtype).view(1, -1, 1, 1) for key in ('mean', 'std'))


def open_network(name: str, pretrained: bool = True, img_size: int | None = None) -> EvalModel:
    """Open a network, named as for evaluate.py --model; the folder of a run stands for its last epoch.

    Raises:
        ValueError: The model, folder or checkpoint does not exist.
    """
    last = Path(name) / 'last.pth.tar'
    config = EvalConfig(model=[str(last) if last.is_file() else name], pretrained=pretrained, img_size=img_size)
    return open_models(config, torch.device('cpu'))[0]


def open_autoencoder(name: str) -> tuple[nn.Module, AlignMixAE]:
    """Open the network of an alignmix_ae run and its method with the trained decoder, in evaluation mode.

    Args:
        name: A training checkpoint, or the folder of a run.

    Raises:
        ValueError: It is not a checkpoint of such a run.
    """
    path = Path(name)
    path = path / 'last.pth.tar' if path.is_dir() else path
    state = read_shards(read_checkpoint(path), path, 'task_state', 'task_state_ema')
    opened = open_network(str(path))
    facts = opened.training
    if facts.get('mix') != 'alignmix_ae' or not facts['mix_options']['decoder']:
        raise ValueError(f'{path} was trained with mix {facts.get("mix")!r}; only --mix alignmix_ae trains a decoder')
    model, size = opened.network.network, opened.data_config['input_size'][1:]
    task = MixTask(model, 'alignmix_ae', facts['mix_options'], img_size=size, verbose=False)
    task.load_task_state(state['task_state_ema' if facts['weights'] == 'ema' else 'task_state'])
    task.trainable_module.eval()
    task.trainable_module.remove_hooks()
    return model, task.mix


def show(ax: Axes, pixels_CHW: torch.Tensor, title: str = '', frame: str | None = None) -> None:
    """Draw an image without axes; `frame` is the colour of a frame around it."""
    ax.imshow(pixels_CHW.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation='nearest')
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.set_title(title, pad=3)
    for spine in ax.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame, linewidth=3)


def spotlight(
        ax: Axes, pixels_CHW: torch.Tensor, weight_HW: torch.Tensor, title: str = '', frame: str | None = None) -> None:
    """Draw an image that is bright where the weights are large relative to their maximum, else dim and grey."""
    side = pixels_CHW.shape[1:]
    lit = weight_HW / weight_HW.max().clamp_min(1e-12)
    lit = torch.nn.functional.interpolate(lit[None, None].float(), side, mode='nearest')[0]
    grey = pixels_CHW.mean(dim=0, keepdim=True).expand_as(pixels_CHW)
    show(ax, lit * pixels_CHW + (1 - lit) * 0.25 * grey, title, frame)
