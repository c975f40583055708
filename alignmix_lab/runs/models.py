"""Creation of timm models, with one sentence for the user if it fails."""
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch import nn

PROBE_SECONDS = 5


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
