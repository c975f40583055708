"""Build the parts of a detection run, and refuse options that cannot work before training starts."""
import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import random_seed

from alignmix_lab.data.loaders import Loaders
from alignmix_lab.runs.accelerator import start_processes
from alignmix_lab.runs.checkpoint import load_weights
from alignmix_lab.runs.run import Run

from .annotations import Annotations
from .backbones import layer_decay_groups
from .config import DetectConfig
from .data import DetectionDataset, DetectionLoader, read_annotations
from .detector import create_detector
from .export_checkpoint import read_weights
from .task import DetectionTask, DetectionTotals
from .transforms import create_transform


def build_run(config: DetectConfig) -> Run:
    """Build and check the parts of a run, without resuming it or wrapping it for its devices.

    Raises:
        ValueError: An option, the data or the model does not fit; the message suggests a remedy.
    """
    accelerator = start_processes(config)
    # Faster R-CNN's batches differ in size, so benchmarking convolutions for each size costs more than it saves.
    torch.backends.cudnn.benchmark = config.detector == 'ssd'
    train, val = read_annotations(
        config.dataset, config.data_dir, config.train_split, config.val_split, config.class_names,
        config.keep_difficult)
    random_seed(config.seed)
    model, description = create_detector(config, train.class_names)
    if config.initial_checkpoint:
        load_weights(model, read_weights(config.initial_checkpoint)[0], config.initial_checkpoint, 'the detector')
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    report = model.backbone_report
    loaders = create_loaders(config, train, val, report.image_mean, accelerator)
    task = DetectionTask(model, description, accelerator.device, accelerator.is_main_process)
    size = f'{config.img_size} to {config.max_size}' if config.max_size else str(config.img_size)
    data_config = dict(
        input_size=size, mean=report.image_mean, std=report.image_std, class_names=train.class_names)
    run = Run(config, accelerator, loaders, task, data_config, DetectionTotals)
    layer_decay = config.layer_decay
    run.add_optimizer(None if layer_decay is None else layer_decay_groups(model, layer_decay, config.weight_decay))
    return run


def create_loaders(
        config: DetectConfig, train: Annotations, val: Annotations, image_mean: list[float],
        accelerator: Accelerator) -> Loaders:
    """Create the training and validation loader of this process."""
    shared = dict(
        workers=config.workers,
        device=accelerator.device,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_mem=config.pin_mem,
    )
    transform = create_transform(config.augment, config.img_size, image_mean, config.hflip)
    return Loaders(
        train=DetectionLoader(
            DetectionDataset(train.records, transform, config.seed), config.batch_size, True,
            aspect_ratio_group_factor=config.aspect_ratio_group_factor, **shared),
        val=DetectionLoader(
            DetectionDataset(val.records), config.validation_batch_size or config.batch_size, False, **shared),
        num_classes=len(train.class_names),
        class_names=train.class_names,
        kind=config.dataset,
        description=f'{config.dataset} in {config.data_dir}; training: {train.describe()}; validation: '
                    f'{val.describe()}; augmentation {config.augment}',
    )
