"""Build a detector from a configuration, or from the description in its checkpoints."""
from typing import Any

from timm.models import clean_state_dict
from torch import nn

from timm_alignmix.weights import key_problems

from .config import DetectConfig
from .models import build_faster_rcnn, build_ssd
from .transforms import multiscale_sizes

BUILDERS = {'ssd': build_ssd, 'fasterrcnn': build_faster_rcnn}


def create_detector(config: DetectConfig, class_names: list[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Build the detector of a configuration.

    Args:
        config: The options.
        class_names: Names of labels 1, 2, ...

    Returns:
        The detector, and its description for :func:`rebuild`: plain values that do not refer to the backbone's weights.

    Raises:
        ValueError: The backbone, its weights or an option does not fit.
    """
    faster = config.detector == 'fasterrcnn'
    if config.batch_size == 1 and config.model_kwargs.get('conv4_stride1'):
        raise ValueError(
            'conv4_stride1 adds batch norms to maps of one position, which cannot train on a single image; '
            'pass --batch-size 2 or more')
    if not faster:
        arguments = dict(size=config.img_size)
    elif config.augment == 'lsj':  # the images are already squares of this side
        arguments = dict(min_size=config.img_size, max_size=config.img_size)
    elif config.augment == 'multiscale':
        arguments = dict(min_size=multiscale_sizes(config.img_size), max_size=config.max_size)
    else:
        arguments = dict(min_size=config.img_size, max_size=config.max_size)
    # Like torchvision, Faster R-CNN freezes the norms and the first stage of a pretrained backbone.
    freeze_bn = (faster and config.weights is not None) if config.freeze_bn is None else config.freeze_bn
    frozen_stages = config.frozen_stages
    model = BUILDERS[config.detector](
        config.backbone,
        len(class_names) + 1,
        weights=config.weights,
        freeze_bn=freeze_bn,
        **({} if frozen_stages is None else dict(frozen_stages=frozen_stages)),
        grad_checkpointing=config.grad_checkpointing,
        backbone_kwargs=config.backbone_kwargs,
        **arguments,
        **config.model_kwargs,
    )
    report = model.backbone_report
    if frozen_stages is None:
        frozen_stages = int(faster and config.weights is not None and not model.backbone.plain)
    description = dict(
        detector=config.detector,
        backbone=report.arch,
        class_names=list(class_names),
        arguments=dict(
            **arguments,
            **config.model_kwargs,
            freeze_bn=freeze_bn,
            frozen_stages=frozen_stages,
            image_mean=report.image_mean,
            image_std=report.image_std,
            backbone_kwargs=report.kwargs,
        ),
    )
    return model, description


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Build the detector of a description, with random weights."""
    build = BUILDERS[description['detector']]
    return build(description['backbone'], len(description['class_names']) + 1, **description['arguments'])


def fill(model: nn.Module, state_dict: dict[str, Any], source: str) -> None:
    """Load weights after checking every key and shape.

    Raises:
        ValueError: The message lists the keys that do not fit.
    """
    state_dict = clean_state_dict(state_dict)
    problems = key_problems(model.state_dict(), state_dict)
    if problems:
        raise ValueError(f'{source} does not fit the detector: {problems}')
    model.load_state_dict(state_dict)
