"""Creation of timm models, with one sentence for the user if it fails, and their frozen parts."""
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.models._manipulate import group_with_matcher
from torch import nn

PROBE_SECONDS = 5
_RUNNING_STATISTICS = ('running_mean', 'running_var')


def create_model(name: str, said: str, remedy: str = '', pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Call `timm.create_model` for a model (also 'local-dir:FOLDER' or 'hf-hub:NAME') that the user named.

    `said`, the option and value that named it, begins the message of an error; `remedy`, what to do where the
    pretrained weights cannot be loaded, ends it.

    Raises:
        ValueError: timm cannot build the model or load its weights. Without network this takes seconds, not a minute.
    """
    offline, unreachable = constants.HF_HUB_OFFLINE, False
    try:
        asks_hub = not offline and 'pretrained_cfg_overlay' not in kwargs and _is_on_hub(name, pretrained)
        unreachable = asks_hub and not _hub_answers()
        constants.HF_HUB_OFFLINE = offline or unreachable  # reads the cache, without retries
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, ValueError, OSError, TypeError, AssertionError) as e:
        reason = f'{constants.ENDPOINT} does not answer' if unreachable else ' '.join(str(e).split())
        raise ValueError(
            f'{said}: timm cannot build it{" with its pretrained weights" if pretrained else ""} ({reason})'
            + (f'; {remedy}' if pretrained and remedy else '')) from e
    finally:
        constants.HF_HUB_OFFLINE = offline


def size_error(probe: nn.Module, size: tuple[int, int, int]) -> Exception | None:
    """Return the error of a network on the meta device if it does not take images (C, H, W) of `size`."""
    try:
        with torch.no_grad():
            probe.eval()(torch.empty(2, *size, device='meta'))
    except (RuntimeError, AssertionError, ValueError) as e:
        return e
    return None


def fit_img_size(
        build: Callable[..., nn.Module], probe: nn.Module, size: tuple[int, int, int],
) -> tuple[dict[str, Any], nn.Module, Exception | None]:
    """Find out whether a network needs `img_size` for images of `size`. No weights are computed.

    Args:
        build: Builds the network on the meta device with further arguments of `timm.create_model`.
        probe: The network without further arguments.
        size: (C, H, W) of the images.

    Returns:
        The argument, empty if it is not needed or no remedy; the network with it; the error that remains.
    """
    error = size_error(probe, size)
    if error is not None:
        needed = {'img_size': size[-1] if size[-1] == size[-2] else size[-2:]}
        with suppress(Exception):  # after any error, img_size is no remedy
            sized = build(**needed)
            if size_error(sized, size) is None:
                return needed, sized, None
    return {}, probe, error


def _is_on_hub(name: str, pretrained: bool) -> bool:
    if ':' in name:
        return not name.startswith('local-dir:')
    cfg = timm.get_pretrained_cfg(name) if pretrained else None
    return bool(cfg and cfg.hf_hub_id and not cfg.file)


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the types differ by version of the client
        return False
    return True


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a timm model's classifier, or of all its classifiers."""
    heads = model.get_classifier()
    return [p for head in (heads if isinstance(heads, (tuple, list)) else [heads]) for p in head.parameters()]


def freeze(model: nn.Module, part: str, name: str) -> None:
    """Keep a part of a timm model as it is: parameters do not train, batch norms stay in eval mode after `train()`.

    Copies of the model, such as moving averages, are frozen alike.

    Args:
        part: 'backbone', all but the classifier; or a number: the stem and the first so many stages (of transformers:
            blocks), which are the groups of the model's `group_matcher(coarse=True)`.
        name: Name of the model for messages.

    Raises:
        ValueError: The model does not have as many stages.
    """
    frozen = _layers_of(model, part, name)
    for key, parameter in model.named_parameters():
        if key in frozen:
            parameter.requires_grad = False
    for key, _ in model.named_buffers():
        owner, _, kind = key.rpartition('.')
        if key in frozen and kind in _RUNNING_STATISTICS:
            norm = model.get_submodule(owner).eval()
            norm.train = partial(_stay, norm)  # may be pickled, unlike a method


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of a frozen norm's `train`."""
    return norm


def trained_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with running statistics, except frozen ones."""
    return (module for module in model.modules()
            if set(_RUNNING_STATISTICS) & module._buffers.keys() and 'train' not in vars(module))


def _layers_of(model: nn.Module, part: str, name: str) -> set[str]:
    """Names of the parameters and buffers of a part."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    head = {id(parameter) for parameter in classifier_parameters(model)}
    body = {key for key, tensor in tensors.items() if id(tensor) not in head}
    if part == 'backbone':
        owners = {key.rpartition('.')[0] for key in tensors.keys() - body}
        return {key for key in body if key.rpartition('.')[0] not in owners}  # buffers of the classifier's own norm
    matcher = model.group_matcher(coarse=True)
    groups = group_with_matcher(((key, key) for key in tensors), matcher, reverse=True)
    stages = max(groups.values()) - 1  # without the stem and the head
    if int(part) > stages:
        raise ValueError(
            f'--freeze {part}: {name} has {stages} stages or blocks; --freeze backbone leaves only the classifier')
    return {key for key in body if groups[key] <= int(part)}
