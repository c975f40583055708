"""Models for evaluation: from names, folders and checkpoints to networks that take pixels."""
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import nn

from alignmix_lab.classification.export_checkpoint import export_checkpoint
from alignmix_lab.runs.models import create_model, fit_img_size
from alignmix_lab.runs.options import near_names
from timm_alignmix import weights
from timm_alignmix.weights.folder import CONFIG

from .config import EvalConfig


class PixelModel(nn.Module):
    """A timm model that normalises pixels in [0, 1] itself and stays in evaluation mode, also after `train()`.

    Its parameters do not require gradients.
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
        """Normalise pixels (B, C, H, W) for the network."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) in float32 from pixels (B, C, H, W) in [0, 1]."""
        return self.network(self.normalize(pixels)).float()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode and restore the mode of every module on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class EvalModel:
    """A model under evaluation."""
    label: str  # short name in tables and pictures
    network: PixelModel  # the network with its normalisation; `network.network` is the timm model
    data_config: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct and crop_mode of its images
    class_names: list[str] | None  # names of its classes in order, if known
    training: dict[str, Any]  # facts of its training (`mix`, `mix_options`, `dataset`, ...), empty if unknown

    @property
    def num_classes(self) -> int:
        return self.network.network.num_classes

    @property
    def arch(self) -> str:
        return self.network.network.pretrained_cfg['architecture']

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, buffers and normalisation, independent of the name or path of the model."""
        digest = hashlib.sha256(f'{self.arch} {self.data_config}'.encode())
        for name, value in self.network.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Facts for the result files, without paths."""
        shown = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
        return {
            'label': self.label,
            'arch': self.arch,
            'num_classes': self.num_classes,
            'fingerprint': self.fingerprint,
            **{key: self.data_config[key] for key in shown},
            **({'training': self.training} if self.training else {}),
        }


# A network, the names of its classes and the facts of its training.
Opened = tuple[nn.Module, list[str] | None, dict[str, Any]]


def open_models(config: EvalConfig, device: torch.device) -> list[EvalModel]:
    """Open all models named by the options.

    Raises:
        ValueError: A model or file does not exist, or weights or labels do not fit; the message states the remedy.
    """
    sources = [source for name, checkpoint in _pairs(config) for source in _sources(name, checkpoint, config)]
    names = [name for name, _ in sources]
    labels = config.labels or short_labels(names)
    if len(labels) != len(names) or len(set(labels)) != len(labels):
        raise ValueError(
            f'--labels needs {len(names)} different names, for {", ".join(names)}; got {", ".join(labels)}')
    models = []
    for (_, open_network), label in zip(sources, labels, strict=True):
        network, class_names, training = open_network()
        overrides = {key: getattr(config, key) for key in ('img_size', 'crop_pct', 'interpolation')}
        data_config = resolve_data_config(
            {key: value for key, value in overrides.items() if value}, model=network, use_test_size=True)
        pixel_model = PixelModel(network, data_config['mean'], data_config['std']).to(device)
        if config.channels_last:
            pixel_model.to(memory_format=torch.channels_last)
        models.append(EvalModel(label, pixel_model, data_config, class_names, training))
    return models


def _pairs(config: EvalConfig) -> list[tuple[str, str | None]]:
    models, checkpoints = config.model or [], config.checkpoint or []
    if not models:
        raise ValueError(
            '--model is missing: pass a timm model name, a folder of exported weights or a training checkpoint')
    if not checkpoints:
        return [(name, None) for name in models]
    return list(zip(models * len(checkpoints) if len(models) == 1 else models, checkpoints, strict=True))


def _sources(name: str, checkpoint: str | None, config: EvalConfig) -> list[tuple[str, Callable[[], Opened]]]:
    """Names of the networks behind a --model, and functions that open them."""
    if checkpoint is not None:
        return [(f'{name}/{checkpoint}', partial(_open_state, name, checkpoint, config))]
    folder = Path(name.removeprefix('local-dir:'))
    if name.startswith('local-dir:') or (folder / CONFIG).is_file():
        return [(str(folder), partial(_open_folder, folder, config))]
    if folder.is_file():
        return [(name, partial(_open_checkpoint, folder, config))]
    if folder.is_dir():
        found = [path for path in (folder / 'last.pth.tar', folder / 'model_best.pth.tar') if path.is_file()]
        if not found:
            raise ValueError(
                f'--model {name}: the folder has neither exported weights ({CONFIG}) nor training checkpoints '
                '(last.pth.tar, model_best.pth.tar)')
        return [(str(path), partial(_open_checkpoint, path, config)) for path in found]
    return [(name, partial(_open_name, name, config))]


def _open_name(name: str, config: EvalConfig) -> Opened:
    if ':' not in name and not timm.is_model(name):
        raise ValueError(
            f'--model {name}: no file or folder of this name, and no timm model'
            f'{near_names(name, timm.list_models())}')
    if config.pretrained and ':' not in name and not timm.is_model_pretrained(name):
        raise ValueError(
            f'--model {name}: timm has no weights for it; pass --checkpoint FILE, or --no-pretrained for random ones')
    kwargs = {'num_classes': config.num_classes, **config.model_kwargs}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    said = f'--model {name}'
    kwargs = _with_img_size(name, said, config, kwargs)
    network = create_model(
        name, said, 'pass --checkpoint FILE, or --no-pretrained for random weights', config.pretrained, **kwargs)
    names = network.pretrained_cfg.get('label_names')
    return network, list(names) if names else None, {}


def _with_img_size(name: str, said: str, config: EvalConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add `img_size` to the arguments of a network that was built for another size than --img-size and takes it."""
    if not config.img_size or 'img_size' in kwargs:
        return kwargs

    def build(**needed: Any) -> nn.Module:
        with torch.device('meta'):
            return create_model(name, said, **kwargs, **needed)

    probe = build()
    size = resolve_data_config({'img_size': config.img_size}, model=probe, use_test_size=True)['input_size']
    needed, probe, error = fit_img_size(build, probe, size)
    if error is not None:
        built_for = probe.pretrained_cfg['input_size'][-1]
        raise ValueError(
            f'{said} does not take images of {size[-2]}x{size[-1]}; pass --img-size {built_for} (model error: '
            f'{error})') from error
    return {**kwargs, **needed}


def _open_state(name: str, path: str, config: EvalConfig) -> Opened:
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


def _open_folder(folder: Path, config: EvalConfig) -> Opened:
    exported = weights.verify(folder)
    name, said = f'local-dir:{folder}', f'--model {folder}'
    network = create_model(name, said, pretrained=True, **_with_img_size(name, said, config, {}))
    return network, exported.get('label_names'), exported.get('training', {})


def _open_checkpoint(path: Path, config: EvalConfig) -> Opened:
    """Open a training checkpoint through its export, which describes the network and the images of the run."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(path, folder, ema=config.ema)
        return _open_folder(Path(folder), config)


def short_labels(names: list[str]) -> list[str]:
    """Shorten names to the parts that differ, such as 'none' for 'runs/photos-none-0/last.pth.tar'.

    If that makes labels equal or empty, the names are kept.
    """
    def clean(name: str) -> str:
        name = re.sub(r'(\.pth)?\.tar$|\.pth?$|\.safetensors$', '', name).rstrip('/')
        return re.sub(r'/model_best$', '/best', name)

    if len(names) == 1:
        name = clean(names[0])
        parts = [part for part in name.split('/') if part not in ('last', 'best', 'export', '')]
        return [parts[-1] if parts else name]
    tokens = [re.split(r'([/\-_. ])', clean(name)) for name in names]
    shortest = min(map(len, tokens))
    start = next((i for i in range(shortest) if len({t[i] for t in tokens}) > 1), shortest)
    end = next((i for i in range(1, shortest - start + 1) if len({t[-i] for t in tokens}) > 1), shortest - start + 1)
    labels = [''.join(t[start:len(t) - end + 1]).strip('/-_. ') for t in tokens]
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    return [clean(name) if names.count(name) == 1 else f'{clean(name)} {i + 1}' for i, name in enumerate(names)]
