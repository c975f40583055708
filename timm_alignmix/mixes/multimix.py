"""MultiMix: Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples, NeurIPS 2023, arXiv
2311.05538 [M].

Equations (6)-(8). With probability `prob` a step replaces the clean loss by that of n random points in the convex hull
of the embeddings of the mini-batch; otherwise it is input mixup. The paper leaves alpha of the input-mixup half open
(2.0 here). The self-distillation of the 2022 draft (arXiv 2206.14868) is not part of the method.
"""
import torch

from ..anatomy import Anatomy, FeatureLayer
from ..functional import convex_weights, dense_multimix_rows, multimix_loss, target_mass
from ..step_random import StepRandom
from .base import Draw, PairMix, draw_mode, mix_examples
from .registry import register_mix

_CROWDED = 1.5  # examples of a mixture for each class: from here on targets teach little


class HullMix(PairMix):
    """Base class of MultiMix and Dense MultiMix: input mixup, or n random points in the convex hull of the mini-batch.

    Arguments as :class:`MultiMix`; `mode` names the feature mode.
    """

    def __init__(
            self,
            n: int,
            m: int | None,
            alpha: float | tuple[float, float],
            prob: float,
            input_alpha: float,
            per_example: bool,
            mode: str,
    ) -> None:
        super().__init__(input_alpha, per_example)
        low, high = (alpha, alpha) if isinstance(alpha, (int, float)) else alpha
        if n < 1 or not (m is None or m >= 1) or not 0 <= prob <= 1 or not 0 < low <= high:
            raise ValueError(
                f'need n >= 1, m >= 1 or None, 0 <= prob <= 1 and alpha > 0 or a pair 0 < low <= high, got n={n}, '
                f'm={m}, prob={prob}, alpha={alpha}')
        self.n, self.m, self.hull_alpha, self.mode = n, m, (float(low), float(high)), mode
        self.probs = {mode: prob, 'input': 1 - prob}
        self.pairs = prob == 0

    def remark(self, batch: int, num_classes: int) -> str:
        m = min(self.m or batch, batch)
        if m < _CROWDED * num_classes:
            return ''
        return (
            f'{self.name} mixes {m} examples of {num_classes} classes at a time, whose targets are nearly the same '
            'every time and teach little: with few classes a small m, such as m=2 or m=4, learns faster '
            '(docs/methods.md)')

    def draw_weights(self, batch: int, rng: StepRandom, positions: int | None = None) -> torch.Tensor:
        m = None if self.m is None else min(self.m, batch)
        return convex_weights(self.n, batch, self.hull_alpha, m, rng.device, positions)

    def num_rows(self, batch: int, draw: Draw) -> int:
        return draw['weights'].shape[:-1].numel() if 'weights' in draw else batch


@register_mix('multimix')
class MultiMix(HullMix):
    """MultiMix: n random convex combinations of all embeddings of the mini-batch.

    Args:
        n: Generated examples per step and device.
        m: Examples with weight in each combination, a random subset; None is the whole batch.
        alpha: Concentration of the Dirichlet distribution: a pair for U[low, high], or a fixed number.
        prob: Probability of mixing embeddings; otherwise input mixup.
        input_alpha: lam ~ Beta(input_alpha, input_alpha) of the input-mixup steps.
        per_example: One lam for each example of input-mixup steps instead of one for the batch.
        mix_at: 'embedding', or an earlier layer (number of a stage or block, or name of a module; [M] Figure 4(a)),
            after which the network runs on n examples.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> task = MixTask(model, 'multimix', dict(n=100, prob=1.0), img_size=64)
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'embedding'
    """

    def __init__(
            self,
            n: int = 1000,
            m: int | None = None,
            alpha: float | tuple[float, float] = (0.5, 2.0),
            prob: float = 0.5,
            input_alpha: float = 2.0,
            per_example: bool = False,
            mix_at: str | int = 'embedding',
    ) -> None:
        super().__init__(n, m, alpha, prob, input_alpha, per_example, mode='embedding')
        self.mix_at = mix_at

    def bind(self, anatomy: Anatomy) -> None:
        if self.mix_at == 'embedding':
            anatomy.linear_heads()
        else:
            layer = anatomy.align_layer(self.mix_at)
            self.layers = {layer.name: layer}

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        if mode == 'input':
            return dict(mode=mode, layer=None, **self.draw_pair(images, rng))
        weights = self.draw_weights(len(images), rng)
        return dict(mode=mode, layer=next(iter(self.layers), None), lam=None, weights=weights)

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        return torch.einsum('nb,b...->n...', draw['weights'].to(x.dtype), x)

    def loss(self, output, feature_map, target, draw, criterion):
        if draw['mode'] == 'input' or draw['layer'] is not None:
            return None
        if criterion.closed_form:
            target, smoothing = criterion.closed_form_target(target, output)
            return multimix_loss(output, target, draw['weights'], smoothing, criterion.binary)
        target_BC = criterion.soft_target(target, output)
        return criterion(*dense_multimix_rows(output.unsqueeze(1), target_BC, draw['weights'].unsqueeze(0)))

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_examples(target_BC, draw['weights']) if 'weights' in draw else super().target(target_BC, draw)

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        is_clean = 'weights' in draw and draw['layer'] is None  # the mixed rows are never computed
        return target_mass(output, target) if is_clean else super().mass(output, target, draw)

    def rows(self, output, feature_map, target, draw, smoothing):
        if draw['mode'] == 'input' or draw['layer'] is not None:
            return super().rows(output, feature_map, target, draw, smoothing)
        return dense_multimix_rows(output.unsqueeze(1), target, draw['weights'].unsqueeze(0), smoothing=smoothing)
