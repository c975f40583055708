"""Options of a detection run, shared by flags, YAML files and `args.yaml`."""
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from alignmix_lab.runs.config import RunConfig, aug_, data_, opt_, run_, sched_
from alignmix_lab.runs.options import config_option, flag, read_yaml, with_default

from .transforms import AUGMENTATIONS

DETECTORS = ('ssd', 'fasterrcnn')

detector_ = partial(config_option, 'Detector')


@dataclass
class DetectConfig(RunConfig):
    """Options of a detection run. The defaults are common small ones; recipes/detection/ has the papers' settings."""

    metrics: ClassVar[tuple[str, ...]] = (
        'voc07_11pt', 'voc_area', 'map', 'map50', 'map75', 'map_small', 'map_medium', 'map_large')

    dataset: str = data_('voc', 'format of --data-dir: VOC folders or COCO annotation files', choices=('voc', 'coco'))
    data_dir: str | None = data_(
        None, 'voc: VOCdevkit (VOC2007, VOC2012 inside) or any folder with Annotations, JPEGImages and '
        'ImageSets/Main; coco: a folder with annotations/instances_SPLIT.json and the images')
    train_split: str | None = data_(
        None, "training split; default: 2007_trainval+2012_trainval, train2017, or the folder's own")
    val_split: str | None = data_(
        None, "validation split; default: 2007_test, val2017, or the folder's own")
    class_names: list[str] | None = data_(
        None, 'classes in order; default: the 20 of VOC for VOCdevkit, else those of the training split', nargs='+')
    keep_difficult: bool = data_(True, "train on VOC's difficult objects too; they never count in the evaluation", bool)

    detector: str = detector_('fasterrcnn', 'SSD, or Faster R-CNN with a feature pyramid', choices=DETECTORS)
    backbone: str = detector_('resnet50', 'timm model name, folder of exported weights, or tag')
    weights: str | None = detector_(
        None, 'weights of the backbone: folder of exported weights, tag such as resnet50.densemultimix_in1k, or a '
        'last.pth.tar of train_imagenet.py; default: random')
    img_size: int | None = detector_(
        None, 'ssd: side of the square input, default 300; fasterrcnn: shorter side, default 800', int, low=32)
    max_size: int | None = detector_(
        None, 'fasterrcnn: maximum of the longer side; default: 1333/800 of --img-size', int, low=32)
    frozen_stages: int | None = detector_(
        None, 'number of frozen first stages of the backbone; default: 1 for fasterrcnn with --weights, else 0', int,
        low=0)
    freeze_bn: bool | None = detector_(
        None, 'freeze the batch norms of the backbone; default: only for fasterrcnn with --weights', bool)
    grad_checkpointing: bool = detector_(False, 'recompute activations of the backbone to save memory', bool)
    backbone_kwargs: dict = detector_({}, 'further arguments of timm.create_model', dict)
    model_kwargs: dict = detector_({}, 'further arguments of build_ssd or build_faster_rcnn', dict)
    initial_checkpoint: str = detector_(
        '', 'weights of a whole detector to start from: a training checkpoint or exported folder')

    batch_size: int = with_default(RunConfig, 'batch_size', 8)
    aspect_ratio_group_factor: int | None = opt_(
        None, 'batch images of similar shape, to pad less: bins per octave of width/height; 0: any shapes; default: 3 '
        "(torchvision's) for fasterrcnn, 0 for ssd, whose input is square", int, low=0)
    weight_decay: float = with_default(RunConfig, 'weight_decay', 1e-4)

    sched: str = sched_('multistep', 'schedule', choices=('cosine', 'multistep', 'step', 'poly', 'wsd', 'constant'))
    lr_base: float = with_default(RunConfig, 'lr_base', 0.02)
    lr_base_size: int = with_default(RunConfig, 'lr_base_size', 16)
    epochs: int = with_default(RunConfig, 'epochs', 26)
    decay_milestones: list[int] = with_default(RunConfig, 'decay_milestones', [16, 22])
    warmup_epochs: int = with_default(RunConfig, 'warmup_epochs', 1)
    sched_on_updates: bool = with_default(RunConfig, 'sched_on_updates', True)

    augment: str | None = aug_(
        None, 'training augmentation; ssd: colour, zoom-out, IoU crops; multiscale: shorter side from 0.6 to 1 of '
        '--img-size; lsj: large-scale jitter; default: ssd for ssd, hflip for fasterrcnn', choices=AUGMENTATIONS)
    hflip: float = aug_(0.5, 'probability of a horizontal flip', float, low=0)

    output: str = with_default(RunConfig, 'output', './output/detection')
    eval_metric: str | None = run_(
        None, 'metric that ranks checkpoints; default: voc07_11pt for voc, map for coco', choices=metrics,
        affects_result=True)
    pictures: int = run_(8, 'validation images to draw with their detections at every evaluation', int, low=0)
    picture_threshold: float = run_(0.4, 'smallest score of a drawn box', float, low=0, below=1)

    @property
    def arch(self) -> str:
        return f'{self.detector} on {self.backbone}'

    def __post_init__(self):
        super().__post_init__()
        if self.data_dir is None:
            raise ValueError('--data-dir is missing: pass the folder of the images and annotations')
        if self.augment == 'multiscale' and self.detector == 'ssd':
            raise ValueError('--augment multiscale: the input of SSD has a fixed size; use --augment ssd')
        if self.augment == 'ssd' and self.detector != 'ssd':
            raise ValueError('--augment ssd goes with --detector ssd')
        if self.max_size is not None and self.detector == 'ssd':
            raise ValueError('--max-size is for fasterrcnn; the input of SSD is a square of --img-size')
        for name in ('layer_decay_min_scale', 'layer_decay_no_opt_scale'):
            if getattr(self, name):
                raise ValueError(f'{flag(name)} has no effect on detectors; freeze stages with --frozen-stages')


def resolve_config(flags: dict[str, Any], config_file: str | None = None) -> DetectConfig:
    """Merge flags, recipe and defaults, in this order of precedence, and set the defaults that depend on the detector.

    Raises:
        ValueError: An option does not exist or does not accept its value; the message names it.
    """
    config = DetectConfig(**{**(read_yaml(config_file, DetectConfig) if config_file else {}), **flags})
    ssd, groups = config.detector == 'ssd', config.aspect_ratio_group_factor
    size = config.img_size or (300 if ssd else 800)
    return replace(
        config,
        aspect_ratio_group_factor=(0 if ssd else 3) if groups is None else groups,
        img_size=size,
        max_size=None if ssd else config.max_size or round(size * 1333 / 800),
        augment=config.augment or ('ssd' if ssd else 'hflip'),
        eval_metric=config.eval_metric or ('voc07_11pt' if config.dataset == 'voc' else 'map'),
    )
