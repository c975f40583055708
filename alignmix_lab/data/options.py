"""Options of the data loaders, in one place."""
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignmix_lab.runs.options import Options, config_option, flag

# Without timm's 'random', which only training has.
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

_data = partial(config_option, 'Data')
_aug = partial(config_option, 'Augmentation and regularization')


@dataclass
class SourceOptions(Options):
    """Where the images come from."""

    data_dir: str | None = _data(
        None, 'ImageFolder root with train/ and val/ or validation/, or a folder with train.beton and val.beton; '
        'without --data-dir, --dataset and --config the built-in sample is used')
    dataset: str = _data('', 'timm dataset name, e.g. torch/cifar10, hfds/<repo>, wds/<name>; default: read --data-dir')
    dataset_download: bool = _data(False, 'let torch/ datasets download themselves', bool, affects_result=False)
    class_map: str = _data('', 'file that maps class names to indices')
    multi_label: bool = _data(
        False, 'images with any number of labels, read from SPLIT.csv or COCO annotations in --data-dir; trains with '
        'binary cross-entropy and ranks by map (timm loader)', bool)
    loader: str = _data(
        'auto', 'data loader; auto picks ffcv if it is installed and the data is in .beton files, else timm',
        choices=('auto', 'ffcv', 'timm'))
    val_share: float = _data(
        0.0, 'without a validation split: share of the training images of each class, chosen by --seed, to evaluate on '
        '(timm loader); the same in training and evaluation', float, low=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.multi_label:
            return
        if not self.data_dir:
            raise ValueError('--multi-label needs --data-dir, a folder with files of labels')
        for name in ('dataset', 'class_map'):
            if getattr(self, name):
                raise ValueError(
                    f'--multi-label reads files of labels in --data-dir; leave {flag(name)} {getattr(self, name)} out')
        if self.loader == 'ffcv':
            raise ValueError('--loader ffcv has one label for each image; use --loader timm with --multi-label')
        self.loader = 'timm'


@dataclass
class TrainDataOptions(SourceOptions):
    """Splits and augmentation for training."""

    train_split: str = _data('train', 'training split')
    val_split: str = _data('validation', 'validation split')
    train_samples: int | None = _data(
        None, 'train on the first so many images of each class only, to study small training sets (timm loader)', int,
        low=1)
    balanced_sampling: bool = _data(
        False, 'draw every class equally often: in an epoch of the usual length, images of rare classes are repeated, '
        'each time augmented anew', bool)

    no_aug: bool = _aug(False, 'turn off training augmentation', bool)
    scale: list[float] = _aug([0.08, 1.0], 'area range of the random resized crop', float, nargs=2, low=0)
    ratio: list[float] = _aug([3 / 4, 4 / 3], 'aspect ratio range of the random resized crop', float, nargs=2, above=0)
    crop_resize: int | None = _aug(
        None, 'resize images to a square of this side and crop at random, instead of the random resized crop (timm '
        'loader)', int, low=1)
    crop_padding: int = _aug(
        0, 'pad images with this many black pixels and crop at random, instead of the random resized crop (timm '
        'loader)', int, low=0)
    hflip: float = _aug(0.5, 'probability of a horizontal flip', float, low=0)
    train_interpolation: str | None = _aug(None, 'interpolation for training; default: that of evaluation',
                                      choices=('random', *INTERPOLATIONS))
    color_jitter: float = _aug(0.0, "colour jitter (timm loader; timm's own default is 0.4)", float, low=0)
    aa: str | None = _aug(None, 'AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5 (timm loader)')
    reprob: float = _aug(0.0, 'probability of random erasing (timm loader)', float, low=0)
    remode: str = _aug('pixel', 'fill of erased regions', choices=('const', 'rand', 'pixel'))
    recount: int = _aug(1, 'maximum number of erased regions per image', int, low=1)
    aug_repeats: float = _aug(
        0.0, 'repeated augmentation: so many copies of an image, augmented differently, on different processes of a '
        'step or in one batch; an epoch keeps its length', float, low=0)

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.aug_repeats < 1:
            raise ValueError(f'--aug-repeats {self.aug_repeats:g} repeats nothing; pass 1 or more, or 0')


@dataclass
class LoaderOptions(TrainDataOptions):
    """Everything a loader needs: the user's options plus what the model and the launcher decide."""

    input_size: tuple[int, int, int] = (3, 224, 224)  # (channels, height, width)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # per channel, for pixels in [0, 1]
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD  # per channel, for pixels in [0, 1]
    interpolation: str = 'bilinear'  # resize interpolation in evaluation (timm loader; FFCV averages areas)
    crop_pct: float = 0.875  # side of the evaluation centre crop, relative to the shorter image side
    crop_mode: str = 'center'  # evaluation crop: 'center', or 'squash' to keep the whole image (timm loader)
    batch_size: int = 128  # training samples per batch and rank
    validation_batch_size: int | None = None  # evaluation samples per batch and rank; None uses batch_size
    workers: int = 4  # threads (FFCV) or processes (timm) per loader
    pin_mem: bool = False  # pin the batches in memory (timm; FFCV always does so for CUDA)
    device: torch.device | str = 'cpu'
    channels_last: bool = False
    seed: int = 42  # seed for order and augmentation; the same on all ranks
    rank: int = 0
    world_size: int = 1  # processes
    num_classes: int | None = None  # classes of the model; labels must be below. None takes the number from the data
    # FFCV only: read through the page cache, which all processes of a machine share (True), or page by page into the
    # memory of each process, which shuffles within a window only (False). None: the page cache if the file fits there.
    os_cache: bool | None = None

    @classmethod
    def of(cls, config: Options, **decided: Any) -> 'LoaderOptions':
        """Copy the options that a configuration shares with the loaders; `decided` takes precedence."""
        return cls(**{
            **{option.name: getattr(config, option.name) for option in fields(cls) if hasattr(config, option.name)},
            **decided,
        })

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == 'cuda'

    def split_batch_size(self, train: bool) -> int:
        """Samples per batch and rank in either split."""
        return self.batch_size if train else self.validation_batch_size or self.batch_size
