"""The models to evaluate: from names, folders and checkpoints to networks that take pixels."""
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from alignmix_lab.classification.export_checkpoint import export_checkpoint
from alignmix_lab.runs.options import near_names
from timm_alignmix import weights
from timm_alignmix.weights.folder import CONFIG

from .config import EvalConfig


class PixelModel(nn.Module):
    """A timm model that takes pixels in [0, 1], the normalisation inside, and stays in evaluation mode.

    Batch norms use their running statistics and dropout is off, whoever calls `train()`. Parameters need no gradient.

    Args:
        network: The timm model.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> 'PixelModel':
        return super().train(False)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) as the network wants them."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) in float32 of pixels (B, C, H, W) in [0, 1]."""
        return self.network(self.normalize(pixels)).float()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """A model in evaluation mode; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class EvalModel:
    """A model under evaluation.

    Attributes:
        label: Short name in tables and pictures.
        source: What the user named.
        network: The network with its normalisation; `network.network` is the timm model.
        data_config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct` of its images.
        class_names: Names of its classes in order, where it knows them.
        training: Facts of its training (`mix`, `mix_options`, `dataset`, ...), empty where not known.
    """
    label: str
    source: str
    network: PixelModel
    data_config: dict[str, Any]
    class_names: list[str] | None
    training: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return self.network.network.num_classes

    @property
    def arch(self) -> str:
        return self.network.network.pretrained_cfg['architecture']

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, buffers and normalisation: the same model under another name or path has the same."""
        digest = hashlib.sha256(f'{self.arch} {self.data_config}'.encode())
        for name, value in self.network.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Plain facts for the result files, without paths of this machine."""
        shown = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
        return {
            'label': self.label,
            'arch': self.arch,
            'num_classes': self.num_classes,
            'fingerprint': self.fingerprint,
            **{key: self.data_config[key] for key in shown},
            **({'training': self.training} if self.training else {}),
        }


@dataclass(frozen=True)
class _Source:
    """One network to open: what it is called and how."""
    name: str
    open: Callable[[], tuple[nn.Module, list[str] | None, dict[str, Any]]]


def open_models(config: EvalConfig, device: torch.device) -> list[EvalModel]:
    """Open every model named by the options, on a device.

    Raises:
        ValueError: No such model or file, weights that do not fit, or labels that do not; names it and the remedy.
    """
    sources = [source for name, checkpoint in _pairs(config) for source in _sources(name, checkpoint, config)]
    labels = config.labels or short_labels([source.name for source in sources])
    if len(labels) != len(sources) or len(set(labels)) != len(labels):
        names = ', '.join(source.name for source in sources)
        raise ValueError(f'--labels needs {len(sources)} different names, for {names}; got {", ".join(labels)}')
    models = []
    for source, label in zip(sources, labels, strict=True):
        network, class_names, training = source.open()
        overrides = {key: getattr(config, key) for key in ('img_size', 'crop_pct', 'interpolation')}
        data_config = resolve_data_config(
            {key: value for key, value in overrides.items() if value}, model=network, use_test_size=True)
        pixel_model = PixelModel(network, data_config['mean'], data_config['std']).to(device)
        if config.channels_last:
            pixel_model.to(memory_format=torch.channels_last)
        models.append(EvalModel(label, source.name, pixel_model, data_config, class_names, training))
    return models


def _pairs(config: EvalConfig) -> list[tuple[str, str | None]]:
    models, checkpoints = config.model or [], config.checkpoint or []
    if not models:
        raise ValueError('--model is missing: name a timm model, a folder of exported weights or a training checkpoint')
    if not checkpoints:
        return [(name, None) for name in models]
    return list(zip(models * len(checkpoints) if len(models) == 1 else models, checkpoints, strict=True))


def _sources(name: str, checkpoint: str | None, config: EvalConfig) -> list[_Source]:
    if checkpoint is not None:
        return [_Source(f'{name}/{checkpoint}', lambda: _open_state(name, checkpoint, config))]
    folder = Path(name.removeprefix('local-dir:'))
    if name.startswith('local-dir:') or (folder / CONFIG).is_file():
        return [_Source(str(folder), lambda: _open_folder(folder))]
    if folder.is_file():
        return [_Source(name, lambda: _open_checkpoint(folder, config))]
    if folder.is_dir():
        found = [path for path in (folder / 'last.pth.tar', folder / 'model_best.pth.tar') if path.is_file()]
        if not found:
            raise ValueError(
                f'--model {name}: the folder has neither exported weights ({CONFIG}) nor training checkpoints '
                '(last.pth.tar, model_best.pth.tar)')
        return [_Source(str(path), lambda path=path: _open_checkpoint(path, config)) for path in found]
    return [_Source(name, lambda: _open_name(name, config))]


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except (RuntimeError, ValueError, OSError, TypeError, AssertionError) as e:
        raise ValueError(f'--model {name}: timm cannot build it ({e})') from e


def _open_name(name: str, config: EvalConfig) -> tuple[nn.Module, list[str] | None, dict[str, Any]]:
    if ':' not in name and not timm.is_model(name):
        raise ValueError(
            f'--model {name}: no file or folder of this name, and no timm model'
            f'{near_names(name, timm.list_models())}')
    if config.pretrained and ':' not in name and not timm.is_model_pretrained(name):
        raise ValueError(
            f'--model {name}: timm has no weights for it; pass --checkpoint FILE, or --no-pretrained for random ones')
    kwargs = {'num_classes': config.num_classes, **config.model_kwargs}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    network = _create(name, pretrained=config.pretrained, **kwargs)
    names = network.pretrained_cfg.get('label_names')
    return network, list(names) if names else None, {}


def _open_state(name: str, path: str, config: EvalConfig) -> tuple[nn.Module, list[str] | None, dict[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f'--checkpoint {path}: no such file')
    state = load_state_dict(path, use_ema=config.ema is not False)
    network, names, _ = _open_name(name, replace(config, pretrained=False))
    problems = weights.key_problems(network.state_dict(), state)
    if problems:
        raise ValueError(
            f'--checkpoint {path} does not fit --model {name} with {network.num_classes} classes (--num-classes and '
            f'--model-kwargs change it): {problems}')
    network.load_state_dict(state)
    return network, names, {}


def _open_folder(folder: Path) -> tuple[nn.Module, list[str] | None, dict[str, Any]]:
    exported = weights.verify(folder)
    return _create(f'local-dir:{folder}', pretrained=True), exported.get('label_names'), exported.get('training', {})


def _open_checkpoint(path: Path, config: EvalConfig) -> tuple[nn.Module, list[str] | None, dict[str, Any]]:
    """Export a training checkpoint and read the export, which knows the network and the images of the run."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(path, folder, ema=config.ema)
        return _open_folder(Path(folder))


def short_labels(names: list[str]) -> list[str]:
    """What differs between names: 'runs/photos-none-0/last.pth.tar' among its like is 'none'.

    Where the words in common leave two labels alike or empty, more is kept.
    """
    def clean(name: str) -> str:
        name = re.sub(r'(\.pth)?\.tar$|\.pth?$|\.safetensors$', '', name).rstrip('/')
        return re.sub(r'/model_best$', '/best', name)

    if len(names) == 1:
        return [_last_telling(clean(names[0]))]
    tokens = [re.split(r'([/\-_. ])', clean(name)) for name in names]
    shortest = min(map(len, tokens))
    start = next((i for i in range(shortest) if len({t[i] for t in tokens}) > 1), shortest)
    end = next((i for i in range(1, shortest - start + 1) if len({t[-i] for t in tokens}) > 1), shortest - start + 1)
    labels = [''.join(t[start:len(t) - end + 1]).strip('/-_. ') for t in tokens]
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    return [clean(name) if names.count(name) == 1 else f'{clean(name)} {i + 1}' for i, name in enumerate(names)]


def _last_telling(name: str) -> str:
    """The last part of a path that is not the same in every run."""
    parts = [part for part in name.split('/') if part not in ('last', 'best', 'export', '')]
    return parts[-1] if parts else name
