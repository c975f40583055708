"""Attention of the class token, which fused kernels do not return.

Shape suffixes: B batch, R patches, h heads, N tokens, d channels of a head.
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat

from .layers import Patch


class ClassAttention:
    """Attention of a model's class token to its patches, of one layer: the mean over heads, without attention dropout.

    One row of it is computed again from a call of the module `name`: from the output of the layer's projection to
    queries, keys and values, or from the input of the layer, where that projection is no module or not all that goes
    into them (BEiT, EVA, CaiT, XCiT).

    Args:
        name: The module to watch, the projection or the layer.
        attention: The layer.
        prefix: Number of leading tokens that are not patches.
        patch: Patches of the images.
    """

    def __init__(self, name: str, attention: nn.Module, prefix: int, patch: Patch) -> None:
        self.name, self.patch = name, patch
        self._attention, self._prefix, self._of_qkv = attention, prefix, name.endswith('.qkv')

    @torch.no_grad()
    def read(self, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        """Attention (B, R), float32 or better and without gradient, from the arguments and output of a call.

        The patches of a row sum to what prefix tokens leave of 1.
        """
        layer = self._attention
        if self._of_qkv:
            qkv = output.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q_Bh1d, k_BhNd = qkv[0, :, :, :1], qkv[1]
        else:
            q_Bh1d, k_BhNd = self._project(args[0])
        if getattr(layer, 'q_norm', None) is not None:
            q_Bh1d, k_BhNd = layer.q_norm(q_Bh1d), layer.k_norm(k_BhNd)
        if kwargs.get('rope') is not None:  # the class token has no place, so its query is not rotated
            n = layer.num_prefix_tokens
            rotated = apply_rot_embed_cat(k_BhNd[:, :, n:], kwargs['rope'], half=getattr(layer, 'rotate_half', False))
            k_BhNd = torch.cat([k_BhNd[:, :, :n], rotated], dim=2)
        k_BhNd = k_BhNd.repeat_interleave(q_Bh1d.shape[1] // k_BhNd.shape[1], dim=1)
        with torch.autocast(q_Bh1d.device.type, enabled=False):
            dtype = torch.promote_types(q_Bh1d.dtype, torch.float32)
            score_Bh1N = q_Bh1d.to(dtype) * layer.scale @ k_BhNd.to(dtype).transpose(2, 3)
            if getattr(layer, 'relative_position_bias_table', None) is not None:
                score_Bh1N = score_Bh1N + layer._get_rel_pos_bias()[..., :1, :]
            if kwargs.get('shared_rel_pos_bias') is not None:
                score_Bh1N = score_Bh1N + kwargs['shared_rel_pos_bias'][..., :1, :]
            return score_Bh1N.softmax(dim=3).mean(dim=1)[:, 0, self._prefix:]

    def _project(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query of the class token and keys of all tokens."""
        layer, first = self._attention, x_BND[:, :1]
        if hasattr(layer, 'q'):
            q, k = layer.q(first), layer.k(x_BND)
        elif layer.qkv is None:
            q, k = layer.q_proj(first), layer.k_proj(x_BND)
        else:
            bias = (None, None) if layer.qkv.bias is None else layer.qkv.bias.chunk(3)
            if getattr(layer, 'q_bias', None) is not None:
                bias = layer.q_bias, layer.k_bias
            q, k = (
                F.linear(x, weight, b)
                for x, weight, b in zip((first, x_BND), layer.qkv.weight.chunk(3), bias, strict=False))
        channels = q.shape[2] // layer.num_heads
        return q.unflatten(2, (-1, channels)).transpose(1, 2), k.unflatten(2, (-1, channels)).transpose(1, 2)
