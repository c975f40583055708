"""create_loaders(): one call from the training flags to both loaders, whatever reads the data."""
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .device_loader import DeviceLoader
from .images.sources import STREAMS, ImageSource, open_source
from .options import LoaderOptions
from .sample import sample_dir
from .transforms import SizedTransform

_logger = logging.getLogger(__name__)

TRAIN_BETON, VAL_BETON = 'train.beton', 'val.beton'


@dataclass
class Loaders:
    """Both loaders and what they read."""
    train: DeviceLoader
    val: DeviceLoader
    num_classes: int
    class_names: list[str] | None
    kind: str  # 'ffcv' or 'timm'
    description: str


def create_loaders(data_dir: str | None = None, **options) -> Loaders:
    """Make the training and the evaluation loader of one rank.

    Both yield images (B, C, H, W) float32, normalised on the device, and labels (B,) int64, on the device. Training
    gives every rank the same number of full batches and uses each sample at most once an epoch; evaluation gives every
    sample once over all ranks, so ranks may differ by a batch. Call set_epoch() before each epoch.

    Args:
        data_dir: A folder with train.beton and val.beton, an ImageFolder root, or the folder of a named dataset. None:
            the built-in sample, unless `dataset` names one.
        **options: Fields of LoaderOptions.

    Raises:
        ImportError: loader='ffcv' and FFCV is missing.
        ValueError: The data is missing, damaged, too small, has labels that num_classes does not cover, or an option
            does not go with the loader; the message says what to do.

    Example:
        >>> loaders = create_loaders('imagenet_ffcv', batch_size=256, device='cuda')  # doctest: +SKIP
        >>> for images, labels in loaders.train:  # doctest: +SKIP
        ...     pass
    """
    return open_loaders(LoaderOptions(data_dir=data_dir, **options))


def open_loaders(o: LoaderOptions) -> Loaders:
    """Make the loaders that options describe; see :func:`create_loaders`."""
    kind = _choose(o.loader, o.data_dir, o.dataset)
    data_dir = o.data_dir
    if not data_dir and not o.dataset:
        data_dir = str(sample_dir(kind))
    return _ffcv_loaders(Path(data_dir), o) if kind == 'ffcv' else _timm_loaders(data_dir, o.dataset, o)


def _choose(loader: str, data_dir: str | None, dataset: str) -> str:
    """'ffcv' or 'timm', or an error that says how to get what was asked for."""
    is_sample = not data_dir and not dataset
    has_betons = bool(data_dir) and not dataset and any(
        (Path(data_dir) / name).is_file() for name in (TRAIN_BETON, VAL_BETON))
    source = f'--dataset {dataset} ' if dataset else ''
    convert = f'python -m alignmix_lab convert {source}--data-dir {data_dir or "DIR"} --output FOLDER'
    if loader == 'timm':
        return 'timm'
    if not is_sample and not has_betons:
        if data_dir and not dataset and not Path(data_dir).is_dir():
            raise ValueError(f'data folder {data_dir} does not exist')
        if loader == 'ffcv':
            raise ValueError(
                f'--loader ffcv reads {TRAIN_BETON} and {VAL_BETON}, which are not there; convert with: {convert}')
        _logger.info(f"Using timm's loader; to train through FFCV, convert the data once: {convert}")
        return 'timm'
    try:
        from .ffcv.importing import import_ffcv
        import_ffcv()
    except ImportError as error:
        if loader == 'ffcv':
            raise
        _logger.warning(f"Using timm's loader. {error}")
        return 'timm'
    return 'ffcv'


def _resolve_num_classes(asked: int | None, names: list[str] | None, largest: int | None, where: str) -> int:
    """Classes of the model, from the flag or the data; all labels must be below."""
    found = max(len(names or []), 0 if largest is None else largest + 1)
    if asked is None:
        if not found:
            raise ValueError(f'{where} does not say how many classes it has; pass --num-classes')
        return found
    if largest is not None and largest >= asked:
        raise ValueError(f'{where} has labels up to {largest}, --num-classes {asked} allows 0 to {asked - 1}; '
                         f'pass --num-classes {found} or more')
    return asked


def _ffcv_loaders(folder: Path, o: LoaderOptions) -> Loaders:
    refused = {
        '--color-jitter': o.color_jitter, '--aa': o.aa, '--reprob': o.reprob, '--class-map': o.class_map,
        '--crop-resize': o.crop_resize, '--crop-padding': o.crop_padding,
        '--crop-mode': '' if o.crop_mode == 'center' else o.crop_mode,
    }
    for flag, value in refused.items():
        if value:
            raise ValueError(f'{flag} {value} is not available with FFCV; use --loader timm, or leave it out')
    if o.interpolation != 'bilinear' or o.train_interpolation not in (None, 'bilinear'):
        _logger.info('FFCV resizes by area averaging; --interpolation and --train-interpolation have no effect')
    from .ffcv.beton import inspect_beton
    from .ffcv.loader import FFCVBatches

    infos = [inspect_beton(folder / name) for name in (TRAIN_BETON, VAL_BETON)]
    names = infos[0].class_names
    if None not in (names, infos[1].class_names) and names != infos[1].class_names:
        raise ValueError(f'{infos[0].path} and {infos[1].path} have different classes; convert both in one run')
    largest = max(int(info.labels.max()) for info in infos)
    num_classes = _resolve_num_classes(o.num_classes, names, largest, str(folder))
    made = []
    for info, train in zip(infos, (True, False), strict=True):
        batches = FFCVBatches(
            info,
            o.input_size,
            **o.for_split(train),
            scale=o.scale,
            ratio=o.ratio,
            hflip=o.hflip,
            no_aug=o.no_aug,
            crop_pct=o.crop_pct,
            device=o.device,
            os_cache=o.os_cache,
        )
        made.append(DeviceLoader(batches, o.mean, o.std, torch.device(o.device), o.channels_last))
    cache = 'page cache' if made[0].batches.os_cache else 'quasi-random order, own memory'
    return _loaders(made, num_classes, names, 'ffcv', f'FFCV, {folder} ({cache})')


def _timm_loaders(data_dir: str | None, dataset: str, o: LoaderOptions) -> Loaders:
    if data_dir and not dataset and not (Path(data_dir) / o.train_split).exists() \
            and (Path(data_dir) / TRAIN_BETON).exists():
        raise ValueError(
            f'{data_dir} holds .beton files only, which need FFCV; use --loader ffcv (with FFCV installed) or '
            'give --data-dir the original images')
    sources: list[ImageSource] = []
    for split, train in ((o.train_split, True), (o.val_split, False)):
        is_stream = dataset.partition('/')[0].lower() in STREAMS
        stream = {'is_training': train, 'batch_size': o.batch_size, 'seed': o.seed} if is_stream else {}
        class_to_idx = sources[0].class_to_idx if sources else None
        sources.append(open_source(data_dir, dataset, split, o.class_map, o.dataset_download, class_to_idx, **stream))
    names = sources[0].class_names
    largest = max((max(source.labels) for source in sources if source.labels), default=None)
    num_classes = _resolve_num_classes(o.num_classes, names, largest, dataset or data_dir)
    made = [_timm_loader(source, train, num_classes, o) for source, train in zip(sources, (True, False), strict=True)]
    return _loaders(made, num_classes, names, 'timm', f"timm's loader, {dataset or data_dir}")


def _timm_loader(source: ImageSource, train: bool, num_classes: int, o: LoaderOptions) -> DeviceLoader:
    from .timm_loader import StreamBatches, TimmBatches

    erasing = {'reprob': o.reprob, 'remode': o.remode, 'recount': o.recount} if train and not o.no_aug else {}
    make = StreamBatches if source.is_stream else partial(TimmBatches, channels=o.input_size[0])
    pin_memory = o.pin_mem and torch.device(o.device).type == 'cuda'
    batches = make(
        source, SizedTransform(o, train), tuple(o.input_size[1:]), num_classes=num_classes, pin_memory=pin_memory,
        **o.for_split(train))
    return DeviceLoader(
        batches, o.mean, o.std, torch.device(o.device), o.channels_last, o.input_size[0], **erasing, seed=o.seed)


def _loaders(made: list[DeviceLoader], num_classes: int, names: list[str] | None, kind: str, where: str) -> Loaders:
    train, val = made
    counts = f'{train.num_samples} training and {val.num_samples} validation images, {num_classes} classes'
    return Loaders(train, val, num_classes, names, kind, f'{where}: {counts}')
