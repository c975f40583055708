"""Evaluation data: every image of a split once over all processes, as pixels in [0, 1]."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alignmix_lab.data import sample_dir
from alignmix_lab.data.device_loader import DeviceLoader
from alignmix_lab.data.ffcv.beton import inspect_beton
from alignmix_lab.data.images.folders import EVAL_FOLDERS, TRAIN_FOLDERS
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.loaders import TRAIN_BETON, VAL_BETON, ffcv_loader, ffcv_usable, open_split_source, timm_loader
from alignmix_lab.data.options import LoaderOptions


@dataclass
class Batch:
    """Images of this process."""
    images: torch.Tensor  # (B, C, H, W) float32 pixels in [0, 1], on the device
    labels: torch.Tensor  # (B,) int64 or, with --multi-label, (B, classes) float32, on the device
    indices: torch.Tensor  # (B,) int64 positions in the dataset, on the CPU


class EvalLoader:
    """Batches of this process from one split, in dataset order; `num_samples` counts those of all processes."""

    def __init__(self, loader: DeviceLoader, class_names: list[str] | None, where: str):
        self._loader = loader
        self._indices = torch.from_numpy(loader.order())
        self.num_samples = loader.num_samples
        self.class_names = class_names
        self.description = f'{where}: {loader.num_samples} images'

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for images, labels in self._loader:
            yield Batch(images, labels, self._indices[start:start + len(labels)])
            start += len(labels)


def open_split(o: LoaderOptions, split: str, class_names: list[str] | None) -> EvalLoader:
    """Open a split for models that take the same kind of images.

    Args:
        o: Loader options; `num_classes` of the model, or None if the images need no classifier.
        split: Name of the split or of its folder.
        class_names: Class names of the model, if known; labels of image folders follow them.

    Raises:
        ValueError: The data is missing or empty, or its classes are not those of the model.
    """
    beton = _find_beton(o, split)
    if beton is not None:
        data = inspect_beton(beton)
        where = f'FFCV, {beton.name} of {beton.parent.name}'
        loader = ffcv_loader(data, o, False)
    else:
        where = f"timm's loader, {o.dataset or Path(o.data_dir or 'the built-in sample').name}, {split}"
        if not o.data_dir and not o.dataset:
            o = replace(o, data_dir=str(sample_dir('timm')))
        class_to_idx = None
        if class_names and not o.dataset and not o.class_map:
            class_to_idx = {name: index for index, name in enumerate(class_names)}
        data = open_split_source(o, split, False, class_to_idx)
        loader = timm_loader(data, o, False)
    _check_classes(where, data.num_classes, data.class_names, class_names, o.num_classes, bool(o.class_map))
    return EvalLoader(loader, data.class_names, where)


def open_unlabelled(source: ImageSource, o: LoaderOptions, make_transform: Callable | None = None) -> EvalLoader:
    """Open images without classes; their labels have no meaning. See :meth:`Evaluation.unlabelled`."""
    return EvalLoader(timm_loader(source, o, False, make_transform), None, source.title)


def _find_beton(o: LoaderOptions, split: str) -> Path | None:
    """Path of the .beton file to read, or None to read images."""
    if o.loader == 'timm' or o.dataset:
        return None
    name = TRAIN_BETON if split in TRAIN_FOLDERS else VAL_BETON if split in EVAL_FOLDERS else f'{split}.beton'
    path = Path(o.data_dir, name) if o.data_dir else None
    if (path is None or path.is_file()) and ffcv_usable(o.loader):
        path = path or sample_dir('ffcv') / name
        if path.is_file():
            return path
    if o.loader == 'ffcv':
        raise ValueError(f'--loader ffcv: {path.parent} has no {name}; convert the split, or use --loader timm')
    return None


def _check_classes(
        where: str, found: int | None, names: list[str] | None, model_names: list[str] | None, num_classes: int | None,
        mapped: bool) -> None:
    if num_classes is None or found is None:
        return
    if found > num_classes or (found < num_classes and not mapped):
        raise ValueError(
            f'{where} has {found} classes, the model has {num_classes}; evaluate on the data it was trained for, or '
            'pass --class-map FILE if the data has only some of its classes')
    if not mapped and names and model_names and list(names) != list(model_names):
        other = [f'{a!r} is {b!r}' for a, b in zip(names, model_names, strict=True) if a != b]
        raise ValueError(
            f'{where} has other classes than the model was trained on, or in another order: {", ".join(other[:3])}')
