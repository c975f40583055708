"""What images are read and how: the options of every loader, once."""
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignmix_lab.runs.options import Options, config_option

_data = partial(config_option, 'Data')
_aug = partial(config_option, 'Augmentation and regularization')


@dataclass
class SourceOptions(Options):
    """Where images come from."""

    data_dir: str | None = _data(
        None, 'ImageFolder root (train/ and val/ or validation/ inside), or a folder with train.beton and val.beton; '
        'without --data-dir, --dataset and --config the built-in sample is used')
    dataset: str = _data('', "timm dataset name, e.g. torch/cifar10, hfds/<repo>, wds/<name>; '' = --data-dir decides")
    dataset_download: bool = _data(False, 'let torch/ datasets download themselves', bool, affects_result=False)
    class_map: str = _data('', 'file that maps class names to indices')
    loader: str = _data('auto', 'ffcv, timm, or ffcv where it is installed and fits', choices=('auto', 'ffcv', 'timm'))


@dataclass
class TrainDataOptions(SourceOptions):
    """Splits and augmentation of a training run."""

    train_split: str = _data('train', 'training split')
    val_split: str = _data('validation', 'evaluation split')

    no_aug: bool = _aug(False, 'no training augmentation', bool)
    scale: list[float] = _aug([0.08, 1.0], 'area of the random crop', float, nargs=2, low=0)
    ratio: list[float] = _aug([3 / 4, 4 / 3], 'aspect ratio of the random crop', float, nargs=2, low=0)
    crop_resize: int | None = _aug(
        None, 'random crop of the image resized to a square of this side, instead of the random resized crop (timm '
        'loader)', int, low=1)
    crop_padding: int = _aug(
        0, 'random crop of the image padded with this many black pixels, instead of the random resized crop (timm '
        'loader)', int, low=0)
    hflip: float = _aug(0.5, 'probability of a horizontal flip', float, low=0)
    train_interpolation: str | None = _aug(None, "resize interpolation in training; default: the loader's")
    color_jitter: float = _aug(0.0, "colour jitter (timm loader; timm's own default is 0.4)", float, low=0)
    aa: str | None = _aug(None, 'AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5 (timm loader)')
    reprob: float = _aug(0.0, 'probability of random erasing (timm loader)', float, low=0)
    remode: str = _aug('pixel', 'fill of random erasing', choices=('const', 'rand', 'pixel'))
    recount: int = _aug(1, 'regions of random erasing', int, low=1)


@dataclass
class LoaderOptions(TrainDataOptions):
    """What both loaders are made from: a user's options, and what the model and the launcher decide.

    Attributes:
        input_size: (channels, height, width).
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        interpolation: Resizing in evaluation; timm's loader only, FFCV averages areas.
        crop_pct: Side of evaluation's centre crop, relative to the shorter side.
        crop_mode: Of evaluation: 'center', or 'squash' for the whole image. timm's loader only.
        batch_size: Training samples per batch and rank.
        validation_batch_size: Evaluation samples per batch and rank; None for batch_size.
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

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = 'bilinear'
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    batch_size: int = 128
    validation_batch_size: int | None = None
    workers: int = 4
    pin_mem: bool = False
    device: torch.device | str = 'cpu'
    channels_last: bool = False
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    num_classes: int | None = None
    os_cache: bool | None = None

    @classmethod
    def of(cls, config: Options, **decided: Any) -> 'LoaderOptions':
        """Take over every option that a configuration has, but for what is decided elsewhere."""
        return cls(**{
            **{option.name: getattr(config, option.name) for option in fields(cls) if hasattr(config, option.name)},
            **decided,
        })

    def for_split(self, train: bool) -> dict[str, Any]:
        """The options that every kind of batches takes."""
        return {
            'batch_size': self.batch_size if train else self.validation_batch_size or self.batch_size,
            'train': train,
            'workers': self.workers,
            'seed': self.seed,
            'rank': self.rank,
            'world_size': self.world_size,
        }
