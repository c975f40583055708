"""AlignMixup: Improving Representations By Interpolating Aligned Features, CVPR 2022, arXiv 2103.15375 [A].

Equations (6)-(12) and Algorithm 1, without the autoencoder. Differences from the paper or its release, and why:

* lam always weighs what comes from x, and y, as in the release. The paper's (12) swaps both, which is equal in law
  because Beta(a, a) is symmetric.
* The three modes are uniform, as in the paper; the release draws 1/2, 1/4, 1/4 (mode_probs).
* The number of Sinkhorn iterations is fixed; the release stops on a batch mean (tolerance stops each sample alone).
* Each aligned feature is a convex combination (final_marginal='kept'); the release normalises columns last ('columns').
* The default layer (align_at) is ours: one that another stage or block follows. The release aligns the map that is
  average-pooled ('last'), where pooling and a linear classifier undo the alignment: mean_i(A~_i) = mean_j(A'_j).
"""
import warnings
from typing import Any

import torch

from ..anatomy import Anatomy, FeatureLayer
from ..functional import align_to
from ..step_random import StepRandom
from .base import Draw, PairMix, draw_mode, mix_pairs, mode_probabilities, partners_of
from .registry import register_mix

_MODES = ('input', 'feat', 'feat_prime')


class AlignedMix(PairMix):
    """Base class of methods that mix pairs after moving features of one to the positions of the other.

    Arguments as :class:`AlignMix`.
    """

    def __init__(
            self,
            alpha: float,
            per_example: bool,
            eps: float,
            iterations: int,
            final_marginal: str,
            tolerance: float | None,
    ) -> None:
        super().__init__(alpha, per_example)
        if eps <= 0 or iterations < 0:
            raise ValueError(f'eps must be > 0 and iterations >= 0, got eps={eps} and iterations={iterations}')
        if final_marginal not in ('kept', 'columns'):
            raise ValueError(f"final_marginal must be 'kept' or 'columns', got {final_marginal!r}")
        self.eps, self.iterations = eps, iterations
        self.final_marginal, self.tolerance = final_marginal, tolerance

    def mix_aligned(self, feat_BDR: torch.Tensor, draw: Draw, keep_partner: bool) -> torch.Tensor:
        """Mix features (B, D, R) at the positions of each example (11), or of its partner (12)."""
        partner_BDR = partners_of(feat_BDR, draw['perm'])
        # The release normalises columns, the partner's side, last in both modes.
        side = 'moved' if self.final_marginal == 'columns' and not keep_partner else 'kept'
        options: dict[str, Any] = dict(
            eps=self.eps, iterations=self.iterations, final_marginal=side, tolerance=self.tolerance)
        if keep_partner:
            return mix_pairs(align_to(partner_BDR, feat_BDR, **options), draw, partner_BDR)
        return mix_pairs(feat_BDR, draw, align_to(feat_BDR, partner_BDR, **options))


@register_mix('alignmix')
class AlignMix(AlignedMix):
    """AlignMixup: input mixup, or features mixed after aligning their positions by optimal transport.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        mode_probs: Probabilities of 'input', 'feat' (equation (11), keeps x's positions) and 'feat_prime' (equation
            (12), keeps the partner's), in order or by name.
        per_example: One lam for each example ([A] Algorithm 1) instead of one for the batch (the release).
        align_at: Layer: 'auto' (end of the last stage but one; LeViT's stem; a middle ViT block), 'last', the number of
            a stage or block, or the name of a module.
        eps: Entropy coefficient.
        iterations: Sinkhorn iterations; 0 is one softmax.
        final_marginal: 'kept' or 'columns', see :func:`timm_alignmix.functional.align`.
        tolerance: Early stop of the iterations for each sample; the release's value is 0.1.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> task = MixTask(model, 'alignmix', dict(mode_probs=dict(feat=1)), img_size=64)
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'feat'
    """

    def __init__(
            self,
            alpha: float = 2.0,
            mode_probs: Any = (1 / 3, 1 / 3, 1 / 3),
            per_example: bool = False,
            align_at: str | int = 'auto',
            eps: float = 0.1,
            iterations: int = 100,
            final_marginal: str = 'kept',
            tolerance: float | None = None,
    ) -> None:
        super().__init__(alpha, per_example, eps, iterations, final_marginal, tolerance)
        self.probs = mode_probabilities(mode_probs, _MODES)
        self.align_at = align_at

    def bind(self, anatomy: Anatomy) -> None:
        layer = anatomy.align_layer(self.align_at)
        if layer.before_pool:
            warnings.warn(
                f'{anatomy.name}: features aligned at {layer.name!r} go straight into pooling, which ignores '
                "positions: alignment is (nearly) a no-op there; align an earlier layer (align_at='auto')",
                stacklevel=2)
        self.layers = {layer.name: layer}

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        layer = None if mode == 'input' else next(iter(self.layers))
        return dict(mode=mode, layer=layer, **self.draw_pair(images, rng))

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        mixed_BDR = self.mix_aligned(layer.layout.positions(x), draw, keep_partner=draw['mode'] == 'feat_prime')
        # A class token has no position: it is mixed, not aligned.
        prefix = mix_pairs(x[:, :layer.layout.prefix], draw) if layer.layout.prefix else None
        return layer.layout.restore(mixed_BDR, x, prefix)
