"""Record of a model's forward pass on a copy, and the comparisons with which a split of it is checked."""
import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .dense_head import NORMS


class UnsupportedModel(ValueError):
    """The model cannot be mixed exactly in the requested way."""


@dataclass
class Call:
    """Call of a module during the recorded forward pass."""
    name: str
    module: nn.Module
    inputs: tuple
    output: Any
    is_leaf: bool


class Trace:
    """Forward pass of a copy of the model on two random images of an input size (channels, height, width).

    Raises:
        UnsupportedModel: The model does not run, or does not return logits; the message begins with `name`.
    """

    def __init__(self, model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
        self.copy = _perturbed_copy(model)  # in eval mode and float32 (float64 for float64 models)
        param = next(self.copy.parameters())
        generator = torch.Generator().manual_seed(0)
        self._images, self._others = (
            torch.randn(2, *input_size, generator=generator).to(param.device, param.dtype) for _ in range(2))
        # Calls of the modules that ran exactly once, in the order they ended.
        self.calls, self.logits = self._watch(name, model.num_classes)
        self.by_name = {call.name: call for call in self.calls}

    def _watch(self, name: str, num_classes: int) -> tuple[list[Call], torch.Tensor]:
        calls: list[Call] = []
        handles = []
        for path, module in self.copy.named_modules():
            def hook(module, inputs, output, path=path):
                calls.append(Call(path, module, inputs, output, not any(True for _ in module.children())))
            handles.append(module.register_forward_hook(hook))
        try:
            with torch.no_grad():
                logits = self.copy(self._images)
        except Exception as e:
            C, H, W = self._images.shape[1:]
            raise UnsupportedModel(
                f'{name} does not run on {H}x{W} images with {C} channels ({e!r}); pass img_size, the size of your '
                'images, or create the model for it') from e
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UnsupportedModel(f'{name} returns {shape} for 2 images, expected logits (2, {num_classes})')
        names = [call.name for call in calls]
        return [call for call in calls if call.name and names.count(call.name) == 1], logits

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Logits of the images that were recorded, once more, without the caller's autocast."""
        with torch.autocast(self._images.device.type, enabled=False):
            return self.copy(self._images)

    def logits_with(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Logits of two OTHER images with this output of a module put in."""
        handle = self.copy.get_submodule(name).register_forward_hook(lambda module, inputs, _: output)
        try:
            with torch.no_grad():
                return self.copy(self._others)
        finally:
            handle.remove()

    def cuts(self, call: Call) -> bool:
        """Check that this module's output alone determines the logits.

        Logits of an untrained network may hardly depend on the image. So the difference to the recorded logits must
        also be small against the change that the other images make.
        """
        logits = self.logits_with(call.name, call.output)
        return is_same(logits, self.logits) and bool((logits - self.logits).abs().max() <= 0.05 * self._change)

    @functools.cached_property
    def _change(self) -> torch.Tensor:
        """Largest change of a logit between the images and the other images."""
        with torch.no_grad():
            return (self.copy(self._others) - self.logits).abs().max()

    def path_of(self, module: nn.Module) -> str:
        """Name of a module of the copy."""
        return next(name for name, m in self.copy.named_modules() if m is module)


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare up to the float32 rounding of a deep network, relative to the largest value."""
    a, b = a.double(), b.double()
    return bool(torch.isfinite(a).all()) and bool((a - b).abs().max() <= 1e-3 * b.abs().max())


@torch.no_grad()
def _perturbed_copy(model: nn.Module) -> nn.Module:
    """Copy in eval mode without constant parameters: with a head of zeros every comparison would be true."""
    clone = copy.deepcopy(model).eval()
    if next(clone.parameters()).dtype != torch.float64:
        clone.float()
    generator = torch.Generator().manual_seed(0)

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, 'grad_checkpointing'):
            module.grad_checkpointing = False  # it would call the children of stages without the stages
        if isinstance(module, NORMS) and module.running_mean is not None:
            module.running_mean.add_(noise(module.running_mean), alpha=0.1)
            module.running_var.mul_(1 + 0.2 * noise(module.running_var).tanh())
    for param in clone.parameters():
        if param.numel() and bool((param == param.flatten()[0]).all()):
            param.add_(noise(param), alpha=0.1)
    return clone
