"""A small folder of images, exported models for it, and the evaluation of them in this process."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from alignmix_lab.evaluation import evaluate, options_class
from timm_alignmix import weights

CLASSES = ('blob', 'cross', 'stripe')
PER_CLASS, SIDE = 5, 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope='session')
def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images (15, 32, 32, 3) uint8 and labels (15,), in the order of the folder below."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(CLASSES) * PER_CLASS, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return images, np.arange(len(images)) // PER_CLASS


@pytest.fixture(scope='session')
def folder(tmp_path_factory, pixels) -> Path:
    """These images as an ImageFolder root with the split 'validation'."""
    root = tmp_path_factory.mktemp('shapes')
    for index, (image, label) in enumerate(zip(*pixels, strict=True)):
        place = root / 'validation' / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f'{index:02d}.png')
    return root


def make_network(seed: int, num_classes: int = len(CLASSES)) -> nn.Module:
    """A small network whose running statistics are not those of any one batch."""
    torch.manual_seed(seed)
    network = timm.create_model('test_resnet', num_classes=num_classes)
    network.get_classifier().weight.data.mul_(30)  # else all classes are about as probable
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, SIDE, SIDE))
    return network.eval()


def save(network: nn.Module, folder: Path, class_names: tuple[str, ...] = CLASSES) -> Path:
    """Export a network for these images."""
    data_config = dict(input_size=(3, SIDE, SIDE), mean=MEAN, std=STD, interpolation='bilinear', crop_pct=1.0)
    weights.export(network, folder, data_config=data_config, training={'mix': 'none', 'dataset': 'shapes'})
    config = json.loads((folder / 'config.json').read_text())
    config['label_names'] = list(class_names)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='session')
def networks() -> list[nn.Module]:
    """Two networks of three classes."""
    return [make_network(0), make_network(1)]


@pytest.fixture(scope='session')
def models(tmp_path_factory, networks) -> list[str]:
    """Their exported folders."""
    root = tmp_path_factory.mktemp('models')
    return [str(save(network, root / f'net-{name}')) for name, network in zip('ab', networks, strict=True)]


@pytest.fixture(scope='session')
def logits(pixels, networks) -> list[torch.Tensor]:
    """Logits (15, 3) of both networks, by themselves, in float64."""
    images = torch.from_numpy(pixels[0]).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        found = [network.double()((images - mean) / std) for network in networks]
    for network in networks:
        network.float()
    return found


@pytest.fixture
def run(folder, models, tmp_path) -> Callable[..., dict[str, Any]]:
    """Callable: run a protocol on both networks; the content of its JSON file."""
    def call(name: str, **options: Any) -> dict[str, Any]:
        settings = dict(model=models, data_dir=str(folder), loader='timm', workers=0, batch_size=4, device='cpu',
                        output=str(tmp_path / 'out'))
        config = options_class(name)(**{**settings, **options})
        evaluate(name, config)
        return json.loads((Path(config.output) / f'{name}.json').read_text())
    return call
