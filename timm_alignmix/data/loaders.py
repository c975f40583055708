"""create_loaders(): one call from the training flags to both loaders, whatever reads the data."""
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .device_loader import DeviceLoader
from .sample import sample_dir
from .sources import STREAMS, ImageSource, open_source
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


@dataclass(frozen=True)
class LoaderOptions:
    """What both loaders are made from; named as the training flags are.

    Args:
        train_split: Training split or folder.
        val_split: Evaluation split or folder.
        class_map: timm class map file; '' for none.
        dataset_download: Let the dataset's library download it.
        input_size: (channels, height, width).
        batch_size: Training samples per batch and rank.
        val_batch_size: Evaluation samples per batch and rank; None for batch_size.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: Resizing in evaluation; timm's loader only, FFCV averages areas.
        crop_pct: Side of evaluation's centre crop, relative to the shorter side.
        scale: Range of the training crop's area, relative to the image's.
        ratio: Range of the training crop's aspect ratio.
        hflip: Probability of a horizontal flip in training.
        train_interpolation: Resizing in training; None for `interpolation`. timm's loader only.
        crop_mode: Of evaluation: 'center', or 'squash' for the whole image. timm's loader only.
        crop_resize: Train on random crops of the image resized to a square of this side, instead of random resized
            crops. timm's loader only.
        crop_padding: Train on random crops of the image with this many black pixels around it, instead of random
            resized crops. timm's loader only.
        no_aug: Train on centre crops, without augmentation.
        color_jitter: Strength of colour jitter. timm's loader only.
        aa: Auto-augment policy, such as 'rand-m9-mstd0.5'. timm's loader only.
        reprob: Probability of random erasing. timm's loader only.
        remode: Mode of random erasing.
        recount: Most regions erased in an image.
        workers: Threads (FFCV) or processes (timm) per loader.
        pin_mem: Pin the memory of batches (timm; FFCV does so for CUDA).
        device: Where batches go.
        channels_last: Memory format of the images.
        seed: Seed of order and augmentation; the same on all ranks.
        rank: This process.
        world_size: Processes.
        num_classes: Classes of the model; labels must be below. None: those of the data.
        os_cache: FFCV: read through the page cache (True), or page by page into the process's own memory (False). None:
            the page cache where the file fits in memory.
    """
    train_split: str = 'train'
    val_split: str = 'validation'
    class_map: str = ''
    dataset_download: bool = False
    input_size: tuple[int, int, int] = (3, 224, 224)
    batch_size: int = 128
    val_batch_size: int | None = None
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = 'bilinear'
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    crop_resize: int | None = None
    crop_padding: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    train_interpolation: str | None = None
    no_aug: bool = False
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    remode: str = 'pixel'
    recount: int = 1
    workers: int = 4
    pin_mem: bool = False
    device: torch.device | str = 'cpu'
    channels_last: bool = False
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    num_classes: int | None = None
    os_cache: bool | None = None

    def for_split(self, train: bool) -> dict:
        """The options that every kind of batches takes."""
        return {
            'batch_size': self.batch_size if train else self.val_batch_size or self.batch_size,
            'train': train,
            'workers': self.workers,
            'seed': self.seed,
            'rank': self.rank,
            'world_size': self.world_size,
        }


def create_loaders(data_dir: str | None = None, dataset: str = '', loader: str = 'auto', **options) -> Loaders:
    """Make the training and the evaluation loader of one rank.

    Both yield images (B, C, H, W) float32, normalised on the device, and labels (B,) int64, on the device. Training
    gives every rank the same number of full batches and uses each sample at most once an epoch; evaluation gives every
    sample once over all ranks, so ranks may differ by a batch. Call set_epoch() before each epoch.

    Args:
        data_dir: A folder with train.beton and val.beton, an ImageFolder root, or the folder of a named dataset. None:
            the built-in sample.
        dataset: timm dataset name such as 'torch/cifar10'; '' for folders.
        loader: 'ffcv' for .beton files, 'timm' for all else, 'auto' for FFCV where it is installed and the files are
            there.
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
    o = LoaderOptions(**options)
    if loader not in ('auto', 'ffcv', 'timm'):
        raise ValueError(f"loader {loader!r} is unknown; use 'auto', 'ffcv' or 'timm'")
    kind = _choose(loader, data_dir, dataset)
    if not data_dir and not dataset:
        data_dir = str(sample_dir(kind))
    return _ffcv_loaders(Path(data_dir), o) if kind == 'ffcv' else _timm_loaders(data_dir, dataset, o)


def _choose(loader: str, data_dir: str | None, dataset: str) -> str:
    """'ffcv' or 'timm', or an error that says how to get what was asked for."""
    is_sample = not data_dir and not dataset
    has_betons = bool(data_dir) and not dataset and any(
        (Path(data_dir) / name).is_file() for name in (TRAIN_BETON, VAL_BETON))
    source = f'--dataset {dataset} ' if dataset else ''
    convert = f'python -m timm_alignmix.data.write {source}--data-dir {data_dir or "DIR"} --output FOLDER'
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
        from .ffcv_import import import_ffcv
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
    from .beton import inspect_beton
    from .ffcv_loader import FFCVBatches

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
