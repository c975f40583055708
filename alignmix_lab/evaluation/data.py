"""Images to evaluate on: one split, every image once over all processes, as pixels in [0, 1]."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignmix_lab.data import open_source, sample_dir
from alignmix_lab.data.device_loader import DeviceLoader
from alignmix_lab.data.images.sources import EVAL_FOLDERS, STREAMS, TRAIN_FOLDERS, ImageSource
from alignmix_lab.data.loaders import TRAIN_BETON, VAL_BETON
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import StreamBatches, TimmBatches
from alignmix_lab.data.transforms import SizedTransform

from .config import EvalConfig


@dataclass
class Batch:
    """Images of this process.

    Attributes:
        images: (B, C, H, W) float32 pixels in [0, 1], on the device.
        labels: (B,) int64, on the device.
        indices: (B,) int64, places in the data set, on the CPU.
    """
    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class EvalLoader:
    """Batches of this process from one split, in the order of the data.

    Attributes:
        num_samples: Images of the split, over all processes.
        num_classes: Classes of the data; None where it does not say.
        class_names: Their names in order, where known.
        description: What is read, for the result files.
    """

    def __init__(
            self,
            loader: DeviceLoader,
            indices: np.ndarray,
            num_classes: int | None,
            class_names: list[str] | None,
            description: str,
    ):
        self._loader = loader
        self._indices = torch.from_numpy(indices)
        self.num_samples = loader.num_samples
        self.num_classes = num_classes
        self.class_names = class_names
        self.description = description

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for images, labels in self._loader:
            yield Batch(images, labels, self._indices[start:start + len(labels)])
            start += len(labels)


def open_split(
        config: EvalConfig,
        split: str,
        data_config: dict[str, Any],
        class_names: list[str] | None,
        num_classes: int | None,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
) -> EvalLoader:
    """The loader of a split for models with one kind of images.

    Args:
        config: The options.
        split: Name of the split or of its folder.
        data_config: `input_size`, `interpolation` and `crop_pct`.
        class_names: Classes of the model, where known: labels of folders follow them, whichever folders are there.
        num_classes: Classes of the model; labels must be below. None: the images need no classifier.
        device: Where batches go.
        rank: This process.
        world_size: Processes.

    Raises:
        ValueError: The data is missing or empty, or its classes are not those of the model.
    """
    share = dict(
        batch_size=config.batch_size, train=False, workers=config.workers, seed=config.seed, rank=rank,
        world_size=world_size)
    beton = _find_beton(config, split)
    if beton is not None:
        batches, found, names = _open_beton(beton, data_config, share, device)
        where = f'FFCV, {beton.name} of {beton.parent.name}'
    else:
        batches, found, names = _open_images(config, split, data_config, class_names, num_classes, share, device)
        where = f"timm's loader, {config.dataset or Path(config.data_dir or 'the built-in sample').name}, {split}"
    check_classes(where, found, names, class_names, num_classes, bool(config.class_map))
    loader = _pixels(batches, device, config, data_config['input_size'][0])
    if isinstance(batches, StreamBatches):
        indices = np.arange(rank, loader.num_samples, world_size)
    else:
        indices = loader.order()
    return EvalLoader(loader, indices, found, names, f'{where}: {loader.num_samples} images')


def open_unlabelled(
        source: ImageSource,
        make_transform: Callable,
        config: EvalConfig,
        input_size: tuple[int, int, int],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
) -> EvalLoader:
    """Images of any source without classes; their labels mean nothing.

    Args:
        source: The images.
        make_transform: From (H, W) to a function from a PIL image to (C, H, W) uint8.
        config: The options.
        input_size: (C, H, W).
        device: Where batches go.
        rank: This process.
        world_size: Processes.
    """
    batches = TimmBatches(
        source, make_transform, tuple(input_size[1:]), batch_size=config.batch_size, train=False,
        channels=input_size[0], num_classes=1, workers=config.workers, pin_memory=_pinned(config, device), rank=rank,
        world_size=world_size)
    loader = _pixels(batches, device, config, input_size[0])
    return EvalLoader(loader, loader.order(), None, None, f'{source.title}: {loader.num_samples} images')


def _pixels(batches: Any, device: torch.device, config: EvalConfig, channels: int) -> DeviceLoader:
    """Batches on the device as pixels in [0, 1]."""
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    return DeviceLoader(batches, zeros, ones, device, config.channels_last, channels)


def _find_beton(config: EvalConfig, split: str) -> Path | None:
    """The .beton file to read, or None for images."""
    if config.loader == 'timm' or config.dataset:
        return None
    name = TRAIN_BETON if split in TRAIN_FOLDERS else VAL_BETON if split in EVAL_FOLDERS else f'{split}.beton'
    try:
        from alignmix_lab.data.ffcv.importing import import_ffcv
        import_ffcv()
    except ImportError:
        if config.loader == 'ffcv':
            raise
        return None
    folder = Path(config.data_dir) if config.data_dir else sample_dir('ffcv')
    if (folder / name).is_file():
        return folder / name
    if config.loader == 'ffcv':
        raise ValueError(f'--loader ffcv: {folder} has no {name}')
    return None


def _open_beton(path: Path, data_config: dict[str, Any], share: dict[str, Any], device: torch.device) -> tuple:
    from alignmix_lab.data.ffcv.beton import inspect_beton
    from alignmix_lab.data.ffcv.loader import FFCVBatches

    info = inspect_beton(path)
    batches = FFCVBatches(
        info, data_config['input_size'], **share, crop_pct=data_config['crop_pct'], device=device)
    return batches, max(len(info.class_names or []), int(info.labels.max()) + 1), info.class_names


def _open_images(
        config: EvalConfig,
        split: str,
        data_config: dict[str, Any],
        class_names: list[str] | None,
        num_classes: int | None,
        share: dict[str, Any],
        device: torch.device,
) -> tuple:
    root = config.data_dir or (None if config.dataset else str(sample_dir('timm')))
    class_to_idx = None
    if class_names and not config.dataset and not config.class_map:
        class_to_idx = {name: index for index, name in enumerate(class_names)}
    is_stream = config.dataset.partition('/')[0].lower() in STREAMS
    stream = {'is_training': False, 'batch_size': config.batch_size, 'seed': config.seed} if is_stream else {}
    source = open_source(root, config.dataset, split, config.class_map, config.dataset_download, class_to_idx, **stream)
    labels = source.labels
    found = max(len(source.class_names or []), max(labels, default=-1) + 1 if labels else 0) or None
    shown = {key: data_config[key] for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
    channels, *size = data_config['input_size']
    make = StreamBatches if source.is_stream else partial(TimmBatches, channels=channels)
    batches = make(
        source, SizedTransform(LoaderOptions(**shown), False), tuple(size), num_classes=num_classes or found or 2**31,
        pin_memory=_pinned(config, device), **share)
    return batches, found, source.class_names


def _pinned(config: EvalConfig, device: torch.device) -> bool:
    return config.pin_mem and device.type == 'cuda'


def check_classes(
        where: str,
        found: int | None,
        names: list[str] | None,
        model_names: list[str] | None,
        num_classes: int | None,
        mapped: bool,
) -> None:
    """Refuse data whose classes are not those of the model: accuracy would be that of other classes.

    Raises:
        ValueError: The number or the names of the classes differ.
    """
    if num_classes is None or found is None:
        return
    if found > num_classes or (found < num_classes and not mapped):
        raise ValueError(
            f'{where} has {found} classes, the model has {num_classes}; evaluate on the data it was trained for, or '
            'pass --class-map FILE where the data has some of its classes only')
    if not mapped and names and model_names and list(names) != list(model_names):
        other = [f'{a!r} is {b!r}' for a, b in zip(names, model_names, strict=True) if a != b]
        raise ValueError(
            f'{where} has other classes than the model was trained on, or in another order: {", ".join(other[:3])}')
