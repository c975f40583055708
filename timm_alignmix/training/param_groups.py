"""A learning rate of its own for the classifier."""
from collections.abc import Iterable

import torch


def scale_head_lr(optimizer: torch.optim.Optimizer, head: Iterable[torch.nn.Parameter], scale: float) -> None:
    """Split the classifier's parameters off an optimizer's groups and scale their learning rate.

    The groups are timm's (weight decay, layer decay), so whatever built them stays as it is; timm's schedulers multiply
    the learning rate of a group by its `lr_scale`.

    Args:
        optimizer: An optimizer that has made no step.
        head: Parameters of the classifier.
        scale: Learning rate of the classifier, relative to that of the rest.
    """
    ids = {id(parameter) for parameter in head}
    groups = []
    for group in optimizer.param_groups:
        for is_head in (False, True):
            parameters = [p for p in group['params'] if (id(p) in ids) == is_head]
            if parameters:
                part = {**group, 'params': parameters}
                if is_head:
                    part['lr_scale'] = group.get('lr_scale', 1.0) * scale
                groups.append(part)
    optimizer.param_groups[:] = groups


def classifier_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of a timm model's classifier, or of all of them where it has several."""
    heads = model.get_classifier()
    return [p for head in (heads if isinstance(heads, (tuple, list)) else [heads]) for p in head.parameters()]
