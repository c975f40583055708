"""A small folder of real images, short runs on it, and an evaluation that shares nothing with the code under test."""
import contextlib
import functools
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

from alignmix_lab.classification import TrainConfig, train
from alignmix_lab.commands import train as train_command

ROOT = Path(__file__).resolve().parents[3]
SIZE = 64
NUM_TRAIN, NUM_VAL = 84, 27  # no multiple of the batch sizes and process counts used


@dataclass
class Finished:
    """A run that has ended."""
    config: TrainConfig
    result: dict[str, Any] | None
    folder: Path
    log: list[str]
    printed: str


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(config: TrainConfig) -> Finished:
    logger, lines, printed = logging.getLogger('alignmix_lab'), _Lines(), io.StringIO()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        with contextlib.redirect_stdout(printed):
            result = train(config)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        AcceleratorState._reset_state(reset_partial_state=True)
    return Finished(config, result, Path(config.output) / config.experiment, lines.lines, printed.getvalue())


@pytest.fixture(scope='package', autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only waits, and long where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """An ImageFolder of scikit-learn's digits, 10 classes of 64 x 64 pixels."""
    root = tmp_path_factory.mktemp('digits')
    pixels, labels = load_digits(return_X_y=True)
    for index in range(NUM_TRAIN + NUM_VAL):
        grey = (pixels[index].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        folder = root / ('train' if index < NUM_TRAIN else 'validation') / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f'{index:04d}.png')
    return root


@pytest.fixture(scope='session')
def val_pixels(digits) -> tuple[torch.Tensor, torch.Tensor]:
    """Validation images (N, 3, 64, 64) in [0, 1], float32, and labels (N,)."""
    files = sorted((digits / 'validation').glob('*/*.png'))
    images = np.stack([np.asarray(Image.open(file).convert('RGB')) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.tensor([int(file.parent.name) for file in files])


@pytest.fixture(scope='session')
def evaluate(val_pixels) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Callable: loss, top1 and top5 of a model on the validation images, in one batch."""
    def measure(model: torch.nn.Module) -> dict[str, float]:
        images, labels = val_pixels
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
        with torch.no_grad():
            logits = model.eval()((images - mean) / std).double()
        order = logits.argsort(dim=1, descending=True)
        hits = order == labels[:, None]
        return {
            'loss': F.cross_entropy(logits, labels).item(),
            'top1': 100 * hits[:, :1].any(1).double().mean().item(),
            'top5': 100 * hits[:, :5].any(1).double().mean().item(),
        }
    return measure


@pytest.fixture(scope='session')
def make_config(digits) -> Callable[..., TrainConfig]:
    """Callable: the configuration of a short run into a folder, with options changed."""
    def make(output: Path, **options: Any) -> TrainConfig:
        settings = dict(
            data_dir=str(digits), loader='timm', workers=0, model='test_resnet', img_size=SIZE, crop_pct=1.0,
            batch_size=16, validation_batch_size=8, epochs=2, warmup_epochs=0, opt='adamw', lr=3e-3, hflip=0.0,
            scale=(0.6, 1.0), device='cpu', output=str(output), experiment='run', export='none', curves=False,
        )
        return TrainConfig(**{**settings, **options})
    return make


@pytest.fixture(scope='session')
def run_training() -> Callable[[TrainConfig], Finished]:
    """Callable: train, and keep what was logged and printed."""
    return _run


@pytest.fixture(scope='session')
def finished(tmp_path_factory, make_config) -> Callable[[str], Finished]:
    """Callable: the run of a mixing method, trained once for all tests. Do not write into its folder."""
    options = {
        'none': dict(smoothing=0.1, export='auto', log_interval=2),
        'alignmix': dict(mix_kwargs={'mode_probs': (0.5, 0.25, 0.25)}, grad_accum_steps=2),
        'multimix': dict(mix_kwargs={'n': 12}, channels_last=True),
        'densemultimix': dict(
            mix_kwargs={'n': 12}, epochs=3, warmup_epochs=1, drop=0.1, model_ema=True, model_ema_decay=0.7,
            color_jitter=0.2, curves=True),
    }

    @functools.cache
    def run(mix: str) -> Finished:
        return _run(make_config(tmp_path_factory.mktemp(mix), mix=mix, **options[mix]))
    return run


@pytest.fixture
def new_model() -> Callable[[], torch.nn.Module]:
    """Callable: an untrained model as the runs build it."""
    return lambda: timm.create_model('test_resnet', num_classes=10)


@pytest.fixture(scope='session')
def script():
    """What train_imagenet.py runs."""
    return train_command
