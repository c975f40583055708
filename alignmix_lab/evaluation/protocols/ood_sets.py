"""OOD sets: folders, array files and noise."""
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import ToNumpy, str_to_pil_interp

from alignmix_lab.data.images.folders import EXTENSIONS
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.order import eval_shard
from alignmix_lab.data.transforms import Size

from ..context import Evaluation
from ..data import Batch
from ..models import EvalModel
from .noise import image_noise

NOISES = {  # and their names in tables and pictures
    'uniform': 'uniform noise',
    'gaussian': 'Gaussian noise',
    'uniform-added': 'ID + uniform noise',
    'gaussian-added': 'ID + Gaussian noise',
}


class _Files(ImageSource):
    """All image files below a folder, sorted by name."""

    def __init__(self, folder: Path):
        files = sorted(path for path in folder.rglob('*') if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not files:
            raise ValueError(f'--ood {folder}: no images in the folder or below (extensions {", ".join(EXTENSIONS)})')
        super().__init__(files, folder.name)

    def read(self, index: int) -> tuple[Any, int]:
        return open(self.dataset[index], 'rb'), 0

    def describe(self, index: int) -> str:
        return str(self.dataset[index])


class _Array(ImageSource):
    """Images of an array file."""

    def __init__(self, path: Path, key: str):
        loaded = np.load(path)
        if path.suffix == '.npz':
            if key not in loaded.files:
                raise ValueError(f'--ood {path} has no array {key!r}; --ood-key names one of {", ".join(loaded.files)}')
            loaded = loaded[key]
        shape = loaded.shape
        if loaded.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)) or not shape[0]:
            raise ValueError(
                f'--ood {path}: images must be uint8 of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W) with N > 0, got '
                f'{loaded.dtype} {shape}')
        super().__init__(loaded[..., 0] if shape[3:] == (1,) else loaded, path.stem)

    def read(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.dataset[index]), 0


def centre_crop(image: Image.Image, size: Size, interpolation: str = 'bilinear') -> np.ndarray:
    """Crop the centre of an image, without scaling unless it is too small, to (C, H, W) uint8 of the given (H, W)."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale > 1:
        target = max(width, round(scale * image.width)), max(height, round(scale * image.height))
        image = image.resize(target, str_to_pil_interp(interpolation))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return ToNumpy()(image.crop((left, top, left + width, top + height)))


def crop_transform(size: Size, interpolation: str) -> Callable:
    """Return :func:`centre_crop` as a function of the image."""
    return partial(centre_crop, size=size, interpolation=interpolation)


def open_set(name: str, key: str) -> ImageSource:
    """Open an OOD set by its path; `key` names the images of .npz files.

    Raises:
        ValueError: It is missing, empty or of another kind.
    """
    path = Path(name)
    if path.is_dir():
        return _Files(path)
    if path.is_file() and path.suffix in ('.npz', '.npy'):
        return _Array(path, key)
    raise ValueError(f'--ood {name}: no folder of images and no .npz or .npy file')


def _noise(kind: str, shape: tuple[int, ...], indices: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw U(0, 1), or N(0.5, 0.5) with a standard deviation of 0.5, for each position in the dataset."""
    if kind == 'uniform':
        return image_noise(torch.rand, shape, indices, seed, 1)
    return 0.5 + 0.5 * image_noise(torch.randn, shape, indices, seed, 2)


def noise_batches(ev: Evaluation, model: EvalModel, name: str) -> Iterator[Batch]:
    """Yield this process's share of a noise set, alone or added to the images of the split, clipped to [0, 1]."""
    kind, _, added = name.partition('-')
    loader, seed = ev.loader(model), ev.config.seed
    if added:
        for batch in loader:
            noise = _noise(kind, tuple(batch.images.shape[1:]), batch.indices, seed).to(batch.images.device)
            yield Batch((batch.images + noise).clamp(0, 1), batch.labels, batch.indices)
        return
    shape = tuple(model.data_config['input_size'])
    share = torch.from_numpy(
        eval_shard(loader.num_samples, ev.accelerator.process_index, ev.accelerator.num_processes))
    for indices in share.split(ev.config.batch_size) if len(share) else ():
        noise = _noise(kind, shape, indices, seed).clamp(0, 1).to(ev.device)
        yield Batch(noise, torch.zeros_like(indices), indices)
