"""Small models as after training, their exports, and processes that start afresh."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_alignmix import weights

ROOT = Path(__file__).resolve().parents[3]
NO_PLUGIN = "import sys; sys.modules['timm_alignmix'] = None  # any import of it raises\n"


def random_statistics(model: nn.Module) -> nn.Module:
    """Give norms and biases values that training would: at their start many of them would not be missed."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.dtype.is_floating_point and value.ndim <= 1:
            value.copy_(value + 0.2 * torch.rand(value.shape, generator=generator))
    return model.eval()


class Exported:
    """A model as after training, and its export."""

    def __init__(self, folder: Path, name: str, num_classes: int, size: int, mix: str = 'none', **model_kwargs):
        torch.manual_seed(0)
        self.model_kwargs = model_kwargs
        self.model = random_statistics(timm.create_model(name, num_classes=num_classes, **model_kwargs))
        self.images = torch.randn(2, 3, size, size)
        self.folder = weights.export(
            self.model, folder / 'export', dataset='Flower Photos', license='cc0-1.0',
            data_config=dict(
                input_size=(3, size, size), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), crop_pct=0.9,
                interpolation='bilinear', crop_mode='squash'),
            training={
                'mix': mix, 'weights': 'raw', 'recipe': {'lr': 0.1},
                'accuracy': {'measured_on': 'raw', 'exported': 'last',
                             'last': {'epoch': 2, 'loss': 1.5, 'top1': 61.25, 'top5': 91.0}}},
            class_names=[f'class {i}' for i in range(num_classes)])


@pytest.fixture(scope='session')
def cnn(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp('cnn'), 'test_resnet', 7, 64)


@pytest.fixture(scope='session')
def vit(tmp_path_factory):
    """Built for dense mixing: no class token, no norm after the pooling."""
    dense = dict(global_pool='avg', class_token=False, fc_norm=False)
    return Exported(tmp_path_factory.mktemp('vit'), 'test_vit', 7, 64, 'densemultimix', img_size=64, **dense)


@pytest.fixture(scope='session')
def own_network(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp('own'), 'preactresnet18', 7, 32, 'alignmix', channels=(8, 8, 16, 16))


@pytest.fixture(scope='session')
def run_python(tmp_path_factory):
    """Callable: run code in a new process, without timm_alignmix unless `plugin`; fails with the process's errors."""
    def run(code: str, plugin: bool = False, **env: str) -> str:
        start = f'import torch; torch.set_num_threads({torch.get_num_threads()})\n'
        paths = {'PYTHONPATH': str(ROOT)} if plugin else {}
        done = subprocess.run(
            [sys.executable, '-c', ('' if plugin else NO_PLUGIN) + start + code], capture_output=True, text=True,
            cwd=tmp_path_factory.mktemp('process'), env={**os.environ, **paths, **env}, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
    return run
