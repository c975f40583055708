"""Manifold Mixup: Better Representations by Interpolating Hidden States, ICML 2019, arXiv 1806.05236.

The loss is cross-entropy instead of the published code's binary cross-entropy of a softmax. The default layers are
those of the published code, the input and the ends of the first two stages; for plain ViTs, which it does not have, the
input and the ends of blocks d/3 and 2d/3.
"""
from collections.abc import Sequence

import torch

from ..anatomy import Anatomy, FeatureLayer
from ..step_random import StepRandom
from .base import Draw, PairMix, draw_mode, mix_pairs
from .registry import register_mix


@register_mix('manifold')
class ManifoldMixup(PairMix):
    """Mix pairs at one layer, drawn uniformly at each step.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam for each example instead of one for the batch.
        layers: Layers to draw from: 'input', 'embedding' (the vector before the classifier, equation (3) of
            arXiv 2311.05538), numbers of stages or blocks, names of modules. None is the default set.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> task = MixTask(
        ...     timm.create_model('test_resnet', num_classes=10), 'manifold', dict(layers=['layer2']), img_size=64)
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'layer2'
    """

    def __init__(
            self,
            alpha: float = 2.0,
            per_example: bool = False,
            layers: Sequence[str | int] | str | int | None = None,
    ) -> None:
        super().__init__(alpha, per_example)
        self._layers = [layers] if isinstance(layers, (str, int)) else layers
        if layers is not None and not self._layers:
            raise ValueError("layers=[] leaves nothing to mix; None is the default set, 'input' and 'embedding' go too")
        self.probs: dict[str, float] = {}

    def bind(self, anatomy: Anatomy) -> None:
        modes = ['input']
        if self._layers is None:
            found = anatomy.manifold_layers()
        else:
            modes = [name for name in self._layers if name in ('input', 'embedding')]
            found = [anatomy.align_layer(name) for name in self._layers if name not in modes]
        if 'embedding' in modes:
            anatomy.linear_heads()
        self.layers = {layer.name: layer for layer in found}
        modes += list(self.layers)
        self.probs = {mode: 1 / len(modes) for mode in modes}

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        return dict(mode=mode, layer=mode if mode in self.layers else None, **self.draw_pair(images, rng))

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        return mix_pairs(x, draw)

    def output(self, output: torch.Tensor, draw: Draw) -> torch.Tensor:
        # The classifier is affine: mixing its outputs is mixing its inputs.
        return mix_pairs(output, draw) if draw['mode'] == 'embedding' else output
