"""Learning rate and optimizer of a run."""
from collections.abc import Iterable

import torch
from timm.optim import list_optimizers

from .config import RunConfig
from .options import near_names

# timm's names of torch's classes with a fused update.
_FUSED_OPTIMIZERS = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')


def check_optimizer(name: str) -> None:
    """Raise a ValueError for an optimizer that timm does not have."""
    if name.lower() not in list_optimizers():
        raise ValueError(f'--opt {name}: timm has no such optimizer{near_names(name, list_optimizers())}')


def scaled_lr(config: RunConfig, global_batch_size: int) -> float:
    """Return the learning rate of a run: `lr`, or `lr_base` scaled with the global batch as in timm."""
    if config.lr is not None:
        return config.lr
    scale = config.lr_base_scale
    if scale is None:
        scale = 'sqrt' if any(name in config.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = global_batch_size / config.lr_base_size
    return config.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def fused_update(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Return the argument for fused updates of torch's own optimizers on GPUs, unless --opt-foreach or --opt-kwargs
    choose otherwise."""
    chosen = config.opt_foreach is not None or {'fused', 'foreach'} & config.opt_kwargs.keys()
    return {'fused': True} if device.type == 'cuda' and config.opt in _FUSED_OPTIMIZERS and not chosen else {}


def scale_lr(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], scale: float) -> None:
    """Scale the learning rate of some parameters, such as the classifier's.

    Splits the groups (of weight decay, layer decay) of an optimizer that has not made a step yet. timm's schedulers
    multiply the learning rate of a group by its `lr_scale`.
    """
    chosen = {id(parameter) for parameter in parameters}
    groups = []
    for group in optimizer.param_groups:
        for is_chosen in (False, True):
            own = [p for p in group['params'] if (id(p) in chosen) == is_chosen]
            if own:
                part = {**group, 'params': own}
                if is_chosen:
                    part['lr_scale'] = group.get('lr_scale', 1.0) * scale
                groups.append(part)
    optimizer.param_groups[:] = groups
