#!/usr/bin/env python3
"""Train a detector on a timm backbone: SSD or Faster R-CNN, on VOC, COCO or any folder of either format.

VOC07+12, one GPU:  accelerate launch -m detection.train -c recipes/detection/ssd300_voc0712.yaml --data-dir VOCdevkit
                    --weights DIR_OR_TAG
COCO, eight GPUs:   accelerate launch --multi_gpu --num_processes 8 -m detection.train --detector fasterrcnn
                    --dataset coco --data-dir /data/coco --backbone resnet50 --weights DIR_OR_TAG --batch-size 2
Your own photos:    python -m detection.train --dataset voc --data-dir FOLDER --backbone resnet18 --epochs 20
Continue a run:     ... --experiment NAME --resume auto

--weights takes a folder that train_imagenet.py exported, a tag such as resnet50.densemultimix_in1k, or a last.pth.tar;
every key of the backbone is checked to be filled. A run's folder holds summary.csv (one line per epoch: VOC's AP by
11 points and by area, COCO's mAP), classes-test.json (the same per class), pictures-test/ and checkpoints.
"""
import logging
import sys
from functools import partial
from typing import Any

import torch
import yaml
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.utils import random_seed, setup_default_logging

from timm_alignmix.training import cli, fit
from timm_alignmix.training.build import Run, add_optimizer, create_accelerator
from timm_alignmix.training.checkpoint import CheckpointSaver
from timm_alignmix.training.train import open_run, wrap_run

from .backbones import layer_decay_groups
from .build import create_detector, fill
from .config import DetectConfig, resolve_detect_config
from .data import DetectionDataset, DetectionLoader, DetectionLoaders, read_annotations
from .evaluate import evaluate
from .export import read_weights
from .task import DetectionTask, DetectionTotals
from .transforms import create_transform

_logger = logging.getLogger(__name__)


def train(config: DetectConfig) -> dict[str, Any] | None:
    """Train as configured; see :func:`timm_alignmix.training.train`."""
    run, saver = prepare(config)
    return fit(run, saver, partial(evaluate, folder=saver.folder))


def prepare(config: DetectConfig) -> tuple[Run, CheckpointSaver]:
    """Build and check a run, resume it where asked, and make it ready for its devices.

    Raises:
        ValueError: An option, the data or the model does not fit, with the remedy.
    """
    run = build_run(config)
    backbone = safe_model_name(config.backbone.rstrip('/').rpartition('/')[2])
    saver = open_run(run, f'{config.detector}-{backbone}-{config.img_size}')
    if not config.dry_run:
        wrap_run(run)
    return run, saver


def build_run(config: DetectConfig) -> Run:
    """Build and check the parts of a run; nothing is wrapped for several processes or resumed yet."""
    accelerator = create_accelerator(config)
    # Faster R-CNN's batches differ in size: searching for the fastest convolution each time costs more than it gains.
    torch.backends.cudnn.benchmark = config.detector == 'ssd'
    annotations = read_annotations(
        config.dataset, config.data_dir, config.train_split, config.val_split, config.class_names,
        config.keep_difficult)
    random_seed(config.seed)
    model, description = create_detector(config, annotations[0].class_names)
    if config.initial_checkpoint:
        fill(model, read_weights(config.initial_checkpoint)[0], config.initial_checkpoint)
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    loaders = create_loaders(config, *annotations, model.backbone_report.image_mean, accelerator)
    task = DetectionTask(model, description, accelerator.device, accelerator.is_main_process)
    size = f'{config.img_size} to {config.max_size}' if config.max_size else str(config.img_size)
    report = model.backbone_report
    data_config = dict(
        input_size=size, mean=report.image_mean, std=report.image_std, class_names=annotations[0].class_names)
    run = Run(config, accelerator, loaders, task, data_config, DetectionTotals)
    layer_decay = config.layer_decay
    add_optimizer(run, None if layer_decay is None else layer_decay_groups(model, layer_decay, config.weight_decay))
    return run


def create_loaders(config, train, val, image_mean, accelerator) -> DetectionLoaders:
    """Training and validation loaders of this process."""
    shared = dict(
        workers=config.workers,
        device=accelerator.device,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_mem=config.pin_mem,
    )
    transform = create_transform(config.augment, config.img_size, image_mean, config.hflip)
    return DetectionLoaders(
        train=DetectionLoader(
            DetectionDataset(train.records, transform, config.seed), config.batch_size, True,
            aspect_ratio_group_factor=config.aspect_ratio_group_factor, **shared),
        val=DetectionLoader(
            DetectionDataset(val.records), config.validation_batch_size or config.batch_size, False, **shared),
        class_names=train.class_names,
        description=f'{config.dataset} in {config.data_dir}; training: {train.describe()}; validation: '
                    f'{val.describe()}; augmentation {config.augment}',
    )


def parse_config(argv: list[str] | None = None) -> DetectConfig:
    """Options from the command line; ends the program with a message where they are wrong."""
    parser = cli.create_parser(
        DetectConfig, 'accelerate launch -m detection.train --data-dir DIR [-c FILE.yaml] [options]', __doc__)
    return cli.parse_flags(parser, DetectConfig, resolve_detect_config, argv)


def main(argv: list[str] | None = None) -> None:
    setup_default_logging()
    config = parse_config(argv)
    try:
        run, saver = prepare(config)
    except (ValueError, ImportError, OSError) as e:  # wrong options, data or environment: the message has the remedy
        sys.exit(f'detection.train: error: {e}')
    if config.dry_run:
        print(yaml.safe_dump(config.to_dict(), default_flow_style=False))
        return
    fit(run, saver, partial(evaluate, folder=saver.folder))
    run.accelerator.state.destroy_process_group()


if __name__ == '__main__':
    main()
