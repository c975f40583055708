"""Every option of a detection run: those that all training shares, and the detector's own."""
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from alignmix_lab.runs.config import RunConfig
from alignmix_lab.runs.options import config_option, flag, read_yaml

from .transforms import AUGMENTATIONS

DETECTORS = ('ssd', 'fasterrcnn')

_data = partial(config_option, 'Data')
_model = partial(config_option, 'Detector')
_opt = partial(config_option, 'Optimizer')
_sched = partial(config_option, 'Learning rate schedule')
_aug = partial(config_option, 'Augmentation and regularization')
_norm = partial(config_option, 'Batch norm and weight averaging')
_run = partial(config_option, 'Run, logs and checkpoints', affects_result=False)


@dataclass
class DetectConfig(RunConfig):
    """Options of a detection run. Defaults are small and common; the papers' settings are in recipes/detection/."""

    metrics: ClassVar[tuple[str, ...]] = (
        'voc07_11pt', 'voc_area', 'map', 'map50', 'map75', 'map_small', 'map_medium', 'map_large')

    dataset: str = _data('voc', 'format of --data-dir: VOC folders or COCO annotation files', choices=('voc', 'coco'))
    data_dir: str | None = _data(
        None, 'voc: VOCdevkit (VOC2007, VOC2012 inside) or any folder with Annotations, JPEGImages and '
        'ImageSets/Main; coco: a folder with annotations/instances_SPLIT.json and the images')
    train_split: str | None = _data(
        None, "training split, e.g. 2007_trainval+2012_trainval or train2017; default: these, or the folder's own")
    val_split: str | None = _data(
        None, "validation split, e.g. 2007_test or val2017; default: these, or the folder's own")
    class_names: list[str] | None = _data(
        None, 'classes in order; default: the 20 of VOC for VOCdevkit, else what the training split has', nargs='+')
    keep_difficult: bool = _data(True, "train on VOC's difficult objects too; never part of the measure", bool)

    detector: str = _model('fasterrcnn', 'SSD, or Faster R-CNN with a feature pyramid', choices=DETECTORS)
    backbone: str = _model('resnet50', 'timm model name, folder of exported weights, or tag')
    weights: str | None = _model(
        None, 'weights of the backbone: folder of exported weights, tag such as resnet50.densemultimix_in1k, or a '
        'last.pth.tar of train_imagenet.py; default: random')
    img_size: int | None = _model(
        None, 'ssd: side of the square input, default 300; fasterrcnn: shorter side, default 800', int, low=32)
    max_size: int | None = _model(
        None, 'fasterrcnn: limit of the longer side; default: 1333/800 of --img-size', int, low=32)
    frozen_stages: int | None = _model(
        None, 'first stages of the backbone that do not train; default: 1 for fasterrcnn with --weights, else 0', int,
        low=0)
    freeze_bn: bool | None = _model(
        None, 'freeze the batch norms of the backbone; default: for fasterrcnn with --weights', bool)
    grad_checkpointing: bool = _model(False, 'recompute activations of the backbone to save memory', bool)
    backbone_kwargs: dict = _model({}, 'further arguments of timm.create_model', dict)
    model_kwargs: dict = _model({}, 'further arguments of build_ssd or build_faster_rcnn', dict)
    initial_checkpoint: str = _model(
        '', 'start from the weights of a whole detector: a training checkpoint or exported folder')

    batch_size: int = _opt(8, 'training images per process', int, low=1, flags=('-b',))
    aspect_ratio_group_factor: int | None = _opt(
        None, 'batches of images of alike shape, which pad less: bins per octave of width/height; 0: any shapes; '
        "default: 3 for fasterrcnn, torchvision's value, 0 for ssd, whose input is square", int, low=0)
    weight_decay: float = _opt(1e-4, 'weight decay (not on biases and norms)', float, low=0)

    sched: str = _sched('multistep', 'schedule', choices=('cosine', 'multistep', 'step', 'poly', 'wsd', 'constant'))
    lr_base: float = _sched(0.02, 'learning rate at --lr-base-size: lr = lr-base * scale(global batch / base size)',
                            float, low=0)
    lr_base_size: int = _sched(16, 'global batch size that --lr-base belongs to', int, low=1)
    epochs: int = _sched(26, 'epochs of the schedule', int, low=1)
    decay_milestones: list[int] = _sched([16, 22], 'epochs where multistep decays', int, nargs='+')
    warmup_epochs: int = _sched(1, 'epochs of linear warm-up', int, low=0)
    sched_on_updates: bool = _sched(True, 'change the learning rate at every update instead of every epoch', bool)

    augment: str | None = _aug(
        None, 'training augmentation; ssd: colour, zoom-out, IoU crops; multiscale: shorter side from 0.6 to 1 of '
        '--img-size; lsj: large-scale jitter; default: ssd for ssd, hflip for fasterrcnn', choices=AUGMENTATIONS)
    hflip: float = _aug(0.5, 'probability of a horizontal flip', float, low=0)

    model_ema_decay: float = _norm(0.9998, 'decay of the moving average', float, low=0)

    output: str = _run('./output/detection', 'folder that holds the folders of runs')
    eval_metric: str | None = _run(
        None, 'metric that ranks checkpoints; default: voc07_11pt for voc, map for coco', choices=metrics,
        affects_result=True)
    pictures: int = _run(8, 'validation images whose detections are drawn at every evaluation', int, low=0)
    picture_threshold: float = _run(0.4, 'smallest score of a drawn box', float, low=0, below=1)

    @property
    def arch(self) -> str:
        return f'{self.detector} on {self.backbone}'

    def __post_init__(self):
        super().__post_init__()
        if self.data_dir is None:
            raise ValueError('--data-dir is missing: say where the images and annotations are')
        if self.augment == 'multiscale' and self.detector == 'ssd':
            raise ValueError('--augment multiscale: the input of SSD has one size; use --augment ssd')
        if self.augment == 'ssd' and self.detector != 'ssd':
            raise ValueError('--augment ssd goes with --detector ssd')
        if self.max_size is not None and self.detector == 'ssd':
            raise ValueError('--max-size is for fasterrcnn; the input of SSD is a square of --img-size')
        for name in ('layer_decay_min_scale', 'layer_decay_no_opt_scale'):
            if getattr(self, name):
                raise ValueError(f'{flag(name)} has no effect on detectors; --frozen-stages stops first stages')


def resolve_detect_config(flags: dict[str, Any], config_file: str | None = None) -> DetectConfig:
    """Merge flags, which win, with a YAML file and the defaults; fill in what depends on the detector.

    Args:
        flags: Options given explicitly.
        config_file: YAML file of options, or None.

    Raises:
        ValueError: An unknown key or a value that its option does not take, by name.
    """
    config = DetectConfig(**{**(read_yaml(config_file, DetectConfig) if config_file else {}), **flags})
    ssd = config.detector == 'ssd'
    size = config.img_size or (300 if ssd else 800)
    groups = config.aspect_ratio_group_factor
    return replace(
        config,
        aspect_ratio_group_factor=(0 if ssd else 3) if groups is None else groups,
        img_size=size,
        max_size=None if ssd else config.max_size or round(size * 1333 / 800),
        augment=config.augment or ('ssd' if ssd else 'hflip'),
        eval_metric=config.eval_metric or ('voc07_11pt' if config.dataset == 'voc' else 'map'),
    )
