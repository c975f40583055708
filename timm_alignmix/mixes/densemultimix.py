"""Dense MultiMix: Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples, NeurIPS 2023,
arXiv 2311.05538 [M].

Equations (9)-(14): MultiMix at every position of the last feature map, each with its own interpolation vectors,
weighted by attention. The paper leaves open: the attention (u = GAP(z) here; h = ReLU with l1 norm on maps, softmax on
tokens), whether gradients pass through it (not here: it is a confidence), the reduction over positions (the mean over
those with any attention here), and alpha of the input-mixup half (2.0 here). Inference is that of the plain model.
"""
import torch

from ..anatomy import Anatomy
from ..functional import attention_map, dense_multimix_loss, dense_multimix_rows
from ..step_random import StepRandom
from .base import Draw, draw_mode
from .multimix import HullMix
from .registry import register_mix


@register_mix('densemultimix')
class DenseMultiMix(HullMix):
    """Dense MultiMix: MultiMix at every position of the last feature map.

    Args:
        n: Generated examples per step, position and device.
        m: Examples with weight in each combination, a random subset; None is the whole batch.
        alpha: Concentration of the Dirichlet distribution: a pair for U[low, high], or a fixed number.
        prob: Probability of mixing embeddings; otherwise input mixup.
        attention: 'gap', 'cam' or 'none', see :func:`timm_alignmix.functional.attention_map`.
        normalize: 'relu' (and l1) or 'softmax'. None takes 'relu' for maps, 'softmax' for tokens: their features have
            both signs, and ReLU would spread attention over nearly all of them.
        attention_grad: Let gradients pass through the attention.
        input_alpha: lam ~ Beta(input_alpha, input_alpha) of the input-mixup steps.
        per_example: One lam for each example of input-mixup steps instead of one for the batch.
        allow_class_token: Accept models that classify a class token, and train their patch tokens densely.

    Example:
        >>> import timm, torch
        >>> from timm_alignmix import MixTask
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> task = MixTask(model, 'densemultimix', dict(n=100, prob=1.0, attention='cam'), img_size=64)
        >>> task(torch.randn(4, 3, 64, 64), torch.arange(4))['mode']
        'dense'
    """
    closed_form = True

    def __init__(
            self,
            n: int = 1000,
            m: int | None = None,
            alpha: float | tuple[float, float] = (0.5, 2.0),
            prob: float = 0.5,
            attention: str = 'gap',
            normalize: str | None = None,
            attention_grad: bool = False,
            input_alpha: float = 2.0,
            per_example: bool = False,
            allow_class_token: bool = False,
    ) -> None:
        super().__init__(n, m, alpha, prob, input_alpha, per_example, mode='dense')
        if attention not in ('gap', 'cam', 'none') or normalize not in (None, 'relu', 'softmax'):
            raise ValueError(
                "attention must be 'gap', 'cam' or 'none' and normalize 'relu' or 'softmax', "
                f'got attention={attention!r}, normalize={normalize!r}')
        self.attention, self.normalize, self.attention_grad = attention, normalize, attention_grad
        self.allow_class_token = allow_class_token

    def bind(self, anatomy: Anatomy) -> None:
        self.head = anatomy.dense_head(self.allow_class_token)
        self.normalize = self.normalize or ('softmax' if self.head.layout.kind == 'NLC' else 'relu')

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        if mode == 'input':
            return dict(mode=mode, layer=None, **self.draw_pair(images, rng))
        positions = self.head.positions_at(images)
        return dict(
            mode=mode, layer=self.head.name, lam=None, weights=self.draw_weights(len(images), rng, positions))

    def _dense(self, feature_map, target):
        logits_BRC, embed_BDR = self.head(feature_map)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.attention_grad):
            attention_BR = attention_map(
                embed_BDR, self.attention, self.normalize,
                weight=self.head.weight() if self.attention == 'cam' else None, labels=target)
        return logits_BRC, attention_BR

    def loss(self, output, feature_map, target, draw, criterion):
        if draw['mode'] == 'input':
            return None
        logits_BRC, attention_BR = self._dense(feature_map, target)
        target, smoothing = criterion.closed_form_target(target, output)
        return dense_multimix_loss(
            logits_BRC, target, draw['weights'], attention_BR, smoothing, attention_grad=self.attention_grad,
            criterion=criterion.binary)

    def rows(self, output, feature_map, target, draw, smoothing):
        if draw['mode'] == 'input':
            return super().rows(output, feature_map, target, draw, smoothing)
        logits_BRC, attention_BR = self._dense(feature_map, target)
        return dense_multimix_rows(logits_BRC, target, draw['weights'], attention_BR, smoothing)
