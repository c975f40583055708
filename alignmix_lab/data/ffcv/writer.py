"""Conversion of images to .beton files for FFCV.

Every image is decoded in full, turned upright, converted to RGB and reduced to --max-resolution. Unreadable images are
left out and listed in a CSV file beside the .beton, together with files and folders that are not images; any other
error ends the run. The file is written under a temporary name and renamed when complete. NAME.beton.json beside it
holds the class names, the source, the settings and the checksums for `python -m alignmix_lab verify`.
"""
import csv
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data
from PIL import Image
from tqdm import tqdm

from ..images.decode import MAX_PIXELS, decode_image, read_bytes
from ..images.folders import Skipped
from ..images.sources import ImageSource, open_source
from ..order import shuffled
from .beton import BetonWriter, EncodedSample, encode_sample, page_size_for, sidecar_path
from .importing import import_ffcv

_logger = logging.getLogger(__name__)

MIN_SIDE = 2  # a crop of a thinner image may round to zero pixels, which crashes FFCV's decoder


@dataclass(frozen=True)
class WriteSettings:
    """Storage settings; the defaults are ffcv-imagenet's for ResNet-50: 500 px, half of the images JPEG, quality 90."""
    max_resolution: int = 500  # maximum longer side in pixels; larger images are reduced
    write_mode: str = 'proportion'  # 'proportion' (JPEG with compress_probability, else raw pixels), 'jpg' or 'raw'
    compress_probability: float = 0.5  # share of JPEG images in 'proportion'
    jpeg_quality: int = 90
    max_pixels: int = MAX_PIXELS  # maximum number of pixels to decode (JPEGs are reduced while decoding)
    seed: int = 0  # seed for the sample order and for the choice of JPEG or raw

    def __post_init__(self):
        if self.write_mode not in ('proportion', 'jpg', 'raw'):
            raise ValueError(f"write mode {self.write_mode!r} is unknown; use 'proportion', 'jpg' or 'raw'")
        if self.max_resolution < MIN_SIDE:
            raise ValueError(f'--max-resolution {self.max_resolution} is too small; use {MIN_SIDE} or more')
        if not 0 <= self.compress_probability <= 1:
            raise ValueError(f'--compress-probability {self.compress_probability} is not between 0 and 1')
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f'--jpeg-quality {self.jpeg_quality} is not between 1 and 100')

    @property
    def jpeg_share(self) -> float:
        return {'proportion': self.compress_probability, 'jpg': 1.0, 'raw': 0.0}[self.write_mode]


class Unreadable(NamedTuple):
    """An image that was left out."""
    name: str
    label: int | str
    reason: str


@dataclass(frozen=True)
class WriteReport:
    """Summary of a written file."""
    path: Path
    num_samples: int
    unreadable: list[Unreadable]
    skipped: Sequence[Skipped] = ()  # files and folders that are not images, or repeat others


def _encode(image: Any, label: int, index: int, name: str, settings: WriteSettings) -> EncodedSample | Unreadable:
    try:
        if not isinstance(image, Image.Image):
            image = read_bytes(image)
        image = decode_image(image, max_side=settings.max_resolution, max_pixels=settings.max_pixels)
        scale = min(1.0, settings.max_resolution / max(image.size))
        if int(min(image.size) * scale) < MIN_SIDE:
            raise ValueError(f'too thin: {image.width} x {image.height} pixels')
    except Exception as error:  # Pillow raises many types on damaged files; later errors are ours, and not caught
        return Unreadable(name, label, f'{type(error).__name__}: {error}')
    as_jpeg = np.random.default_rng([settings.seed, index]).random() < settings.jpeg_share
    pixels = import_ffcv().fields.rgb_image.resizer(np.asarray(image), settings.max_resolution)
    return encode_sample(pixels, label, as_jpeg, settings.jpeg_quality)


@dataclass
class _EncodedImages(torch.utils.data.Dataset):
    source: ImageSource
    settings: WriteSettings

    def __getitem__(self, index: int) -> EncodedSample | Unreadable:
        name = self.source.describe(index)
        try:
            image, label = self.source.read(index)
        except OSError as error:  # no permission, removed since the scan, disk error
            return Unreadable(name, '', f'{type(error).__name__}: {error}')
        return _encode(image, label, index, name, self.settings)

    def __len__(self) -> int:
        return self.source.num_samples


@dataclass
class _EncodedStream(torch.utils.data.IterableDataset):
    source: ImageSource
    settings: WriteSettings

    def __iter__(self) -> Iterator[EncodedSample | Unreadable]:
        for index, (image, label) in enumerate(self.source.dataset):
            yield _encode(image, label, index, f'{self.source.title}[{index}]', self.settings)


def _samples(source: ImageSource, settings: WriteSettings, workers: int, shuffle: bool) -> Iterator:
    """Encode samples, in order; torch's DataLoader notices dead workers and re-raises their exceptions."""
    options = {'batch_size': 16, 'collate_fn': list, 'num_workers': workers}
    if source.is_stream:
        source.dataset.set_loader_cfg(num_workers=workers)
        loader = torch.utils.data.DataLoader(_EncodedStream(source, settings), **options)
    else:
        count = source.num_samples
        order = shuffled(count, settings.seed, epoch=0) if shuffle else np.arange(count)
        loader = torch.utils.data.DataLoader(_EncodedImages(source, settings), sampler=order.tolist(), **options)
    for batch in loader:
        yield from batch


def write_beton(
        source: ImageSource, path: str | Path, settings: WriteSettings | None = None, workers: int | None = None,
        shuffle: bool = False, progress: bool = True) -> WriteReport:
    """Write one split to a .beton file, with a JSON description and the list of unreadable images beside it.

    An existing file is replaced when the new one is complete.

    Args:
        workers: Worker processes; None for one per visible CPU, 0 for this process.
        shuffle: Store the samples in random order. Advisable for training sets: a file in class order cannot be
            shuffled well if it is too large for memory and read page by page.

    Raises:
        RuntimeError: No image could be read, or a worker failed.
        ValueError: The source has more samples than it announced, or does not say how many.
        OSError: The file cannot be written.
    """
    settings = settings or WriteSettings()
    path = Path(path)
    count = source.num_samples
    if not count:
        raise ValueError(
            f"{source.title} does not say how many samples it has; for webdataset add '|NUMBER' to the split")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    unreadable: list[Unreadable] = []
    labels: list[int] = []
    writer = BetonWriter(temporary, count, page_size_for(settings.max_resolution))
    try:
        for sample in tqdm(_samples(source, settings, workers, shuffle), total=count, desc=path.name, unit='img',
                           disable=not progress):
            if isinstance(sample, Unreadable):
                unreadable.append(sample)
            else:
                writer.append(sample)
                labels.append(sample.label)
        if not labels:
            raise RuntimeError(
                f'none of the {count} images of {source.title} could be read; the first: {unreadable[:1]}')
        _write_reports(path, source, settings, writer.close(), len(labels), unreadable)
        os.replace(temporary, path)
    except BaseException:
        writer.abort()
        temporary.unlink(missing_ok=True)
        raise
    _log_result(path, source, labels, unreadable)
    return WriteReport(path, len(labels), unreadable, source.skipped)


def unreadable_path(path: Path) -> Path:
    """CSV file beside a .beton that lists what was left out."""
    return path.with_name(path.name + '.unreadable.csv')


def _write_reports(
        path: Path, source: ImageSource, settings: WriteSettings, checksums: dict, num_samples: int,
        unreadable: list[Unreadable]) -> None:
    listing = unreadable_path(path)
    listing.unlink(missing_ok=True)
    if unreadable or source.skipped:
        with open(listing, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            table = csv.writer(file)
            table.writerow(Unreadable._fields)
            table.writerows(unreadable)
            table.writerows(Unreadable(name, '', reason) for name, reason in source.skipped)
    description = {
        'class_names': source.class_names,
        'num_samples': num_samples,
        'num_unreadable': len(unreadable),
        'num_skipped': len(source.skipped),
        'num_expected': source.num_samples,
        'source': source.title,
        'settings': asdict(settings),
        'checksums': checksums,
    }
    sidecar_path(path).write_text(json.dumps(description) + '\n', encoding='utf-8')


def _log_result(path: Path, source: ImageSource, labels: list[int], unreadable: list[Unreadable]) -> None:
    count = source.num_samples
    _logger.info(f'{path}: {len(labels)} of {count} images, {path.stat().st_size / 2 ** 20:.1f} MiB')
    if unreadable:
        _logger.warning(f'{len(unreadable)} images could not be read and were left out; see {unreadable_path(path)}')
        for sample in unreadable[:5]:
            _logger.warning(f'  {sample.name!r}: {sample.reason}')  # any bytes may be in a name
    missing = count - len(labels) - len(unreadable)
    if missing:
        _logger.warning(f'{source.title} announced {count} samples but did not yield {missing} of them')
    if source.class_names and source.labels is not None:
        lost = sorted({source.class_names[label] for label in set(source.labels) - set(labels)})
        if lost:
            _logger.warning(f'classes without a readable image: {", ".join(lost[:20])}')


def convert(
        data_dir: str | None,
        output: str | Path,
        dataset: str = '',
        train_split: str = 'train',
        val_split: str = 'validation',
        class_map: str = '',
        dataset_download: bool = False,
        settings: WriteSettings | None = None,
        workers: int | None = None,
        overwrite: bool = False,
        progress: bool = True,
) -> list[WriteReport]:
    """Write train.beton and val.beton, after opening and checking both splits; '' as a split skips it.

    For the source see :func:`open_source`, for the files :func:`write_beton`.

    Raises:
        ImportError: FFCV is not installed.
        ValueError: There is nothing to convert, or the files exist.
    """
    import_ffcv()
    jobs, class_to_idx = [], None
    for split, name in ((train_split, 'train.beton'), (val_split, 'val.beton')):
        if not split:
            continue
        path = Path(output) / name
        if path.exists() and not overwrite:
            raise ValueError(f'{path} exists; pass --overwrite to replace it')
        source = open_source(data_dir, dataset, split, class_map, dataset_download, class_to_idx, is_training=False)
        class_to_idx = source.class_to_idx
        classes = f', {len(source.class_names)} classes' if source.class_names else ''
        _logger.info(f'{source.title}: {source.num_samples} images{classes} -> {path}')
        jobs.append((source, path, name == 'train.beton'))
    if not jobs:
        raise ValueError('nothing to convert: both splits are empty')
    return [
        write_beton(source, path, settings, workers, shuffle=shuffle, progress=progress)
        for source, path, shuffle in jobs
    ]
