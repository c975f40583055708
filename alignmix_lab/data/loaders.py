"""Training and evaluation loaders from one set of options, for FFCV and timm alike."""
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .device_loader import DeviceLoader
from .ffcv.beton import BetonInfo, inspect_beton
from .ffcv.importing import import_ffcv
from .images.folders import find_split_folder
from .images.sources import ImageSource, MultiLabelSource, open_source
from .options import LoaderOptions
from .sample import sample_dir
from .transforms import SizedTransform

_logger = logging.getLogger(__name__)

TRAIN_BETON, VAL_BETON = 'train.beton', 'val.beton'


@dataclass
class Loaders:
    """Both loaders and a summary of the data."""
    train: DeviceLoader
    val: DeviceLoader
    num_classes: int
    class_names: list[str] | None
    kind: str  # 'ffcv' or 'timm'
    description: str
    val_listing: bytes | None = None  # the validation images, if --val-share chose them


def create_loaders(data_dir: str | None = None, **options) -> Loaders:
    """Create the training and the evaluation loader of one rank.

    Both yield images (B, C, H, W) float32, normalised on the device, and labels (B,) int64, on the device, or rows of 0
    and 1 (B, classes) float32 with multi_label. Training gives every rank the same number of full batches and uses each
    sample at most once per epoch, unless `balanced_sampling` or `aug_repeats` repeat some. Evaluation yields each
    sample exactly once over all ranks, so ranks may differ by a batch. Call set_epoch() before each epoch.

    Args:
        data_dir: A folder with train.beton and val.beton, an ImageFolder root, or the folder of a named dataset. None
            selects the built-in sample, unless `dataset` names one.
        **options: Fields of LoaderOptions.

    Raises:
        ImportError: loader='ffcv', but FFCV is not installed.
        ValueError: The data is missing, damaged, too small, or has labels that num_classes does not cover, or an option
            does not work with the loader. The message states the remedy.

    Example:
        >>> loaders = create_loaders('imagenet_ffcv', batch_size=256, device='cuda')  # doctest: +SKIP
        >>> for images, labels in loaders.train:  # doctest: +SKIP
        ...     pass
    """
    return open_loaders(LoaderOptions(data_dir=data_dir, **options))


def open_loaders(o: LoaderOptions) -> Loaders:
    """Create the loaders for a set of options; see :func:`create_loaders`."""
    kind = _choose(o.loader, o.data_dir, o.dataset)
    if not o.data_dir and not o.dataset:
        o = replace(o, data_dir=str(sample_dir(kind)))
    return _ffcv_loaders(o) if kind == 'ffcv' else _timm_loaders(o)


def ffcv_usable(loader: str) -> bool:
    """Whether FFCV can be imported.

    Raises:
        ImportError: It cannot, but the loader is 'ffcv'.
    """
    try:
        import_ffcv()
    except ImportError as error:
        if loader == 'ffcv':
            raise
        _logger.warning(f"Using timm's loader. {error}")
        return False
    return True


def _choose(loader: str, data_dir: str | None, dataset: str) -> str:
    if loader == 'timm':
        return 'timm'
    is_folder = bool(data_dir) and not dataset
    is_sample = not data_dir and not dataset
    if not is_sample and not (is_folder and any(
            (Path(data_dir) / name).is_file() for name in (TRAIN_BETON, VAL_BETON))):
        if is_folder and not Path(data_dir).is_dir():
            raise ValueError(f'data folder {data_dir} does not exist')
        source = f'--dataset {dataset} ' if dataset else ''
        convert = f'python -m alignmix_lab convert {source}--data-dir {data_dir or "DIR"} --output FOLDER'
        if loader == 'ffcv':
            raise ValueError(
                f'--loader ffcv reads {TRAIN_BETON} and {VAL_BETON}, which are not there; convert with: {convert}')
        _logger.info(f"Using timm's loader; to train with FFCV, convert the data once: {convert}")
        return 'timm'
    return 'ffcv' if ffcv_usable(loader) else 'timm'


def _resolve_num_classes(asked: int | None, found: int | None, largest: int | None, where: str) -> int:
    """Number of classes of the model: as asked for, or else as found in the data."""
    if asked is None and found is None:
        raise ValueError(f'{where} does not say how many classes it has; pass --num-classes')
    if asked is not None and largest is not None and largest >= asked:
        raise ValueError(f'{where} has labels up to {largest}, --num-classes {asked} allows 0 to {asked - 1}; '
                         f'pass --num-classes {found} or more')
    return found if asked is None else asked


def _ffcv_loaders(o: LoaderOptions) -> Loaders:
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

    infos = [inspect_beton(Path(o.data_dir) / name) for name in (TRAIN_BETON, VAL_BETON)]
    names = infos[0].class_names
    if None not in (names, infos[1].class_names) and names != infos[1].class_names:
        raise ValueError(f'{infos[0].path} and {infos[1].path} have different classes; convert both in one run')
    largest = max(int(info.labels.max()) for info in infos)
    num_classes = _resolve_num_classes(o.num_classes, max(len(names or []), largest + 1), largest, o.data_dir)
    made = [ffcv_loader(info, o, train) for info, train in zip(infos, (True, False), strict=True)]
    cache = 'page cache' if made[0].batches.os_cache else 'quasi-random order, own memory'
    return _loaders(made, num_classes, names, 'ffcv', f'FFCV, {o.data_dir} ({cache})')


def ffcv_loader(info: BetonInfo, o: LoaderOptions, train: bool) -> DeviceLoader:
    """Create the loader of a .beton file."""
    if o.val_share:
        raise ValueError(
            f'--val-share {o.val_share}: {info.path} is divided already; leave it out, or use the original images')
    if train and o.train_samples:
        raise ValueError(f'--train-samples {o.train_samples} needs the original images; use --loader timm')
    from .ffcv.loader import FFCVBatches
    return DeviceLoader(FFCVBatches(info, o, train), o, train)


def _timm_loaders(o: LoaderOptions) -> Loaders:
    folder = Path(o.data_dir or '')
    if not o.dataset and not (folder / o.train_split).exists() and (folder / TRAIN_BETON).exists():
        raise ValueError(
            f'{o.data_dir} holds .beton files only, which need FFCV; use --loader ffcv (with FFCV installed) or '
            'pass the folder of the original images as --data-dir')
    if o.val_share:
        train, val = open_divided(o)
    else:
        train = open_split_source(o, o.train_split, True)
        val = open_split_source(o, o.val_split, False, train.class_to_idx)
    if o.train_samples:
        train = train.first(o.train_samples)
    where, labels = o.dataset or o.data_dir, [source.largest_label for source in (train, val)]
    largest = max((label for label in labels if label is not None), default=None)
    found = max(len(train.class_names or []), 0 if largest is None else largest + 1) or None
    o = replace(o, num_classes=_resolve_num_classes(o.num_classes, found, largest, where))
    for source in (train, val):
        if isinstance(source, MultiLabelSource):
            _warn_of_empty_classes(source)
    made = [timm_loader(train, o, True), timm_loader(val, o, False)]
    loaders = _loaders(made, o.num_classes, train.class_names, 'timm', f"timm's loader, {where}")
    return replace(loaders, val_listing=val.listing() if o.val_share else None)


def _warn_of_empty_classes(source: MultiLabelSource) -> None:
    empty = [name for name, count in source.count_images().items() if not count]
    if empty:
        _logger.warning(
            f'{source.title}: no image has the class {", ".join(empty[:20])}; in evaluation its average precision and '
            'F1 count as 0')


def open_split_source(
        o: LoaderOptions, split: str, train: bool, class_to_idx: dict[str, int] | None = None) -> ImageSource:
    """Open the images of a split, which --val-share may divide; see :func:`open_source`."""
    if o.val_share and split in (o.train_split, o.val_split):
        return open_divided(o, class_to_idx)[split == o.val_split]
    return open_source(
        o.data_dir, o.dataset, split, o.class_map, o.dataset_download, class_to_idx, o.multi_label,
        is_training=train, batch_size=o.batch_size, seed=o.seed)


def open_divided(o: LoaderOptions, class_to_idx: dict[str, int] | None = None) -> tuple[ImageSource, ImageSource]:
    """Open the training images in the two parts of --val-share; see :meth:`ImageSource.divide`."""
    source = open_split_source(replace(o, val_share=0.0), o.train_split, False, class_to_idx)
    try:
        folder = None if o.dataset else find_split_folder(o.data_dir, o.val_split)
    except ValueError:
        folder = None
    if folder is not None and folder.name != 'test':  # test images may well be kept for the end
        raise ValueError(
            f'--val-share {o.val_share}: there is a folder of validation images, {folder}; leave --val-share out to '
            'use it, or move it away')
    return source.divide(o.val_share, o.seed)


def timm_loader(
        source: ImageSource, o: LoaderOptions, train: bool, make_transform: Callable | None = None) -> DeviceLoader:
    """Create the loader of an open source; its transform defaults to that of the options."""
    from .timm_loader import StreamBatches, TimmBatches
    batches = StreamBatches if source.is_stream else TimmBatches
    return DeviceLoader(batches(source, make_transform or SizedTransform(o, train), o, train), o, train)


def _loaders(made: list[DeviceLoader], num_classes: int, names: list[str] | None, kind: str, where: str) -> Loaders:
    train, val = made
    counts = f'{train.num_samples} training and {val.num_samples} validation images, {num_classes} classes'
    return Loaders(train, val, num_classes, names, kind, f'{where}: {counts}')
