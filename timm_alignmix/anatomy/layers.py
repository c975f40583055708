"""Feature layers of a model and the layout of their positions.

Shape suffixes: B batch, C classes, D channels, R spatial positions.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn


@dataclass(frozen=True)
class Layout:
    """Layout of a feature tensor: 'NCHW', 'NHWC', or 'NLC' with `prefix` leading tokens that have no position."""
    kind: str
    prefix: int = 0

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """Features as (B, D, R), a view if the layout allows."""
        if self.kind == 'NCHW':
            return x.flatten(2)
        if self.kind == 'NHWC':
            return x.flatten(1, 2).transpose(1, 2)
        return x[:, self.prefix:].transpose(1, 2)

    def grid(self, x: torch.Tensor, H: int, W: int) -> tuple[int, int] | None:
        """Rows and columns of the features of images of this size; None if a sequence is no grid of their shape."""
        if self.kind == 'NLC':
            return grid_of(x.shape[1] - self.prefix, H, W)
        rows, columns = x.shape[2:] if self.kind == 'NCHW' else x.shape[1:3]
        return rows, columns

    def restore(self, feat_BDR: torch.Tensor, like: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Bring features (B, D, R) into the shape of `like`, with (B, prefix, D) for its leading tokens."""
        if self.kind == 'NCHW':
            return feat_BDR.reshape(len(feat_BDR), *like.shape[1:])
        x = feat_BDR.transpose(1, 2)
        if self.kind == 'NHWC':
            return x.reshape(len(feat_BDR), *like.shape[1:])
        return torch.cat([prefix.to(x.dtype), x], dim=1) if self.prefix else x


class Patch(NamedTuple):
    """Sides in pixels of the patches of an image."""
    height: float
    width: float

    def grid(self, H: int, W: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; the last ones may be cut short."""
        rows, columns = (math.ceil(side / patch - 1e-6) for side, patch in zip((H, W), self, strict=True))
        return rows, columns


def grid_of(count: int, H: int, W: int) -> tuple[int, int] | None:
    """Rows and columns of a number of positions, if they are a grid of an image's shape."""
    rows = max(round((count * H / W) ** 0.5), 1) if count > 0 else 0
    if rows and count % rows == 0 and abs(rows / (count // rows) - H / W) < 0.2 * H / W:
        return rows, count // rows
    return None


@dataclass(frozen=True)
class FeatureLayer:
    """Module whose output alone determines the logits."""
    name: str
    layout: Layout
    num_positions: int  # R at the image size that the model was examined at
    # The output goes straight into average pooling, or its class token into the classifier, so moving features between
    # positions does not reach the logits.
    before_pool: bool


def output_module(model: nn.Module, name: str) -> nn.Module:
    """Innermost module whose output is that of module `name`, for hooks.

    A forward hook of an nn.Sequential itself is not called where gradient checkpointing runs its children one by one.
    """
    module = model.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and len(module):
        module = module[-1]
    return module


@torch.no_grad()
def feature_map(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    """Output of a model's module for images, in evaluation mode and without gradient. Modes are restored."""
    found = []
    training = [module for module in model.modules() if module.training]
    handle = output_module(model, name).register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        model.eval()(images)
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return found[0]
