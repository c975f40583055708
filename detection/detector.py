"""Build a detector from a configuration, or from the description in its checkpoints."""
import inspect
from dataclasses import fields
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD

from alignmix_lab.runs.options import blaming

from .backbones import create_backbone
from .config import DetectConfig
from .models import build_faster_rcnn, build_ssd
from .transforms import multiscale_sizes

BUILDERS = {'ssd': build_ssd, 'fasterrcnn': build_faster_rcnn}


def create_detector(config: DetectConfig, class_names: list[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Build the detector of a configuration for labels 1, 2, ... of these names.

    Returns:
        The detector, and its description for :func:`rebuild`: plain values that do not refer to the backbone's weights.

    Raises:
        ValueError: The backbone, its weights or an option does not fit.
    """
    _check_model_kwargs(config)
    faster, size = config.detector == 'fasterrcnn', config.img_size
    if config.batch_size == 1 and config.model_kwargs.get('conv4_stride1'):
        raise ValueError(
            'conv4_stride1 adds batch norms to maps of one position, which cannot train on a single image; '
            'pass --batch-size 2 or more')
    arguments = dict(size=size) if not faster else dict(
        min_size=multiscale_sizes(size) if config.augment == 'multiscale' else size,
        max_size=size if config.augment == 'lsj' else config.max_size,  # lsj makes squares of this side
    )
    frozen = {name: value for name in ('freeze_bn', 'frozen_stages') if (value := getattr(config, name)) is not None}
    with blaming(config, 'backbone_kwargs', 'model_kwargs'):
        model = BUILDERS[config.detector](
            config.backbone, len(class_names) + 1, weights=config.weights, grad_checkpointing=config.grad_checkpointing,
            backbone_kwargs=config.backbone_kwargs, **frozen, **arguments, **config.model_kwargs)
    report = model.backbone_report
    description = dict(
        detector=config.detector,
        backbone=report.arch,
        class_names=list(class_names),
        arguments=dict(
            **arguments, **config.model_kwargs, freeze_bn=report.freeze_bn, frozen_stages=report.frozen_stages,
            image_mean=report.image_mean, image_std=report.image_std, backbone_kwargs=report.kwargs),
    )
    return model, description


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Build the detector of a description, with random weights."""
    build = BUILDERS[description['detector']]
    return build(description['backbone'], len(description['class_names']) + 1, **description['arguments'])


def _check_model_kwargs(config: DetectConfig) -> None:
    """Refuse what torchvision ignores: its detectors take any name, and look at values when they first need them."""
    own = (p for build in (BUILDERS[config.detector], create_backbone)
           for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY)
    theirs = (p for p in inspect.signature({'ssd': SSD, 'fasterrcnn': FasterRCNN}[config.detector]).parameters.values()
              if isinstance(p.default, (int, float)) or p.name == 'bbox_reg_weights')
    flags = {field.name for field in fields(config)} | {'min_size'}  # --img-size
    defaults = {p.name: p.default for p in (*own, *theirs) if p.name not in flags}
    for name, value in config.model_kwargs.items():
        if name not in defaults:
            raise ValueError(
                f'--model-kwargs {name}={value}: {config.detector} has no such option, or a flag of its own sets it; '
                f'its options: {", ".join(defaults)}')
        kind = type(defaults[name])
        if kind in (int, float, bool) and not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f'--model-kwargs {name}={value} is no {kind.__name__}; the default is {defaults[name]}')
