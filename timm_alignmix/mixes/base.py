"""Interface of mixing methods, and the parts they share.

A step runs straight through: `draw` (random numbers, on the device, outside any compiled graph) -> `images` (mix the
input) -> the model, in whose forward a tap hands the features of one layer to `features` -> `loss`. Methods that mix by
what the model looks at have a pass over the clean images in between: `draw` -> pass -> `complete` -> `images`. A method
holds its options and what `bind` found in the model; everything that belongs to one step is in the `Draw` dictionary.
"""
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..anatomy import Anatomy, ClassAttention, DenseHead, FeatureLayer
from ..functional import soft_target, target_mass
from ..step_random import StepRandom, sample_beta
from .criterion import Criterion

# One step: 'mode' (str; 'clean' and 'input' leave features alone), 'layer' (name of the tapped layer or None), 'lam'
# (tensor or None), and tensors of the method. One with 'clean_pass' waits for `Mix.complete`: for the gradient of the
# clean loss, of the model in mode 'eval' or 'train'; for what it reads of module 'clean_layer' in evaluation mode,
# 'forward'; or for the targets alone, 'target'.
Draw = dict[str, Any]


class Mix:
    """Base class of all methods. Subclasses register with :func:`register_mix` and take keyword options.

    Attributes:
        name: Name in the registry.
        closed_form: The loss weighs mixed examples, so the criterion must have a closed form: softmax or binary
            cross-entropy.
        pairs: Targets are those of pairs, draw['perm'] being the partners and draw['lam'] the weights.
        clean_pass: What steps of the method need of the clean batch: 'eval', 'train', 'forward' or 'target', see
            :meth:`complete`; None if they need nothing.
        options: Options the method was created with, for logs.
        layers: Feature layers to tap, by name, set by :meth:`bind`.
        head: Dense head, for methods that need one, set by :meth:`bind`.
        watched: Layers to read and leave alone, by the name of the module whose calls tell, set by :meth:`bind`. A step
            with such a name as its 'layer' has what is read as its record.
        extra: Trainable layers of the method, set by :meth:`bind`. They are trained, averaged and saved with the model
            but are not part of it. In steps that do not use them their gradient is 0.
        normalization: Mean and deviation of the images, per channel, for pixels in [0, 1]: those of the model's
            pretrained_cfg, or ImageNet's, until :meth:`set_normalization` says otherwise.

    Example:
        >>> import torch
        >>> class Darker(Mix):
        ...     def draw(self, images, rng):
        ...         return dict(mode='input', layer=None, lam=torch.rand((), generator=rng.device))
        ...     def images(self, images, draw):
        ...         return images * draw['lam']
        >>> from timm_alignmix.step_random import StepRandom
        >>> mix, images = Darker(), torch.ones(2, 3, 8, 8)
        >>> mix.images(images, mix.draw(images, StepRandom(seed=0).at(0, images.device))).shape
        torch.Size([2, 3, 8, 8])
    """
    name = ''
    closed_form = False
    pairs = False
    clean_pass: str | None = None

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.layers: dict[str, FeatureLayer] = {}
        self.head: DenseHead | None = None
        self.watched: dict[str, ClassAttention] = {}
        self.extra: nn.Module | None = None
        self.normalization: tuple[Sequence[float], Sequence[float]] = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{k}={v!r}" for k, v in self.options.items())})'

    def signature(self) -> dict[str, inspect.Parameter]:
        """Options that the method takes, with their types and defaults."""
        return dict(inspect.signature(type(self)).parameters)

    @property
    def modes(self) -> dict[str, float]:
        """Probability of each mode, by its name in logs; complete after :meth:`bind`."""
        return getattr(self, 'probs', None) or {'clean' if self.name == 'none' else 'input': 1.0}

    def mode_name(self, draw: Draw) -> str:
        """Name of a step's mode in logs."""
        return draw['mode']

    @property
    def binds(self) -> bool:
        """The method looks into the model; others mix the images of any network."""
        return type(self).bind is not Mix.bind

    @property
    def tapped(self) -> list[str]:
        """Names of the modules whose output a step may need, each once."""
        return list(dict.fromkeys([*self.layers, *([self.head.name] if self.head else [])]))

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say how a program normalises its images."""
        self.normalization = mean, std

    def bind(self, anatomy: Anatomy) -> None:
        """Find out where to mix in a model.

        Raises:
            UnsupportedModel: The method cannot mix this model exactly.
        """

    def remark(self, batch: int, num_classes: int) -> str:
        """What a user should know who trains so many classes in batches of this size; '' for nothing."""
        return ''

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        """Draw a step for a batch of images."""
        raise NotImplementedError

    def complete(self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        """Complete a draw that has 'clean_pass'.

        Args:
            images: (B, C, H, W), not mixed.
            draw: The step.
            seen: (B, H, W) root mean square of the gradient of the clean loss over the channels; for 'forward', what
                was read of draw['clean_layer']: class attention (B, R), or features; None for 'target'.
            target: (B,) classes or (B, C) probabilities.
        """
        raise NotImplementedError

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Images for the model, (B, C, H, W)."""
        return images

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        """Features that replace `x`, the output of draw['layer']."""
        raise NotImplementedError

    def output(self, output: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Logits made from the model's output, (B, C)."""
        return output

    def lam(self, record: torch.Tensor | None, draw: Draw) -> torch.Tensor | None:
        """Weight of each example, (B,), if the forward of mixed images tells it; None if draw['lam'] holds.

        Args:
            record: What was read of draw['layer'].
            draw: The step.
        """
        return None

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Soft targets for the rows of logits."""
        return target_BC

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mass of each row's target, without label smoothing, on the class that the row predicts: its accuracy.

        Args:
            output: (rows, C) logits, as :meth:`output` returns them.
            target: (B,) classes or (B, C) rows.
            draw: The step, of another mode than 'clean'.

        Returns:
            (rows,) float32.
        """
        return target_mass(output, self.target(soft_target(target, output.shape[1]), draw))

    def loss(
            self,
            output: torch.Tensor,
            feature_map: torch.Tensor | None,
            target: torch.Tensor,
            draw: Draw,
            criterion: Criterion,
    ) -> torch.Tensor | None:
        """Loss of the step, or None for the criterion of the output with :meth:`target`.

        Args:
            output: (B, C) logits.
            feature_map: Output of draw['layer'], or what was read of it.
            target: (B,) classes or (B, C) probabilities, as the loader gave them.
            draw: The step.
            criterion: What to take the mean of.
        """
        return None

    def rows(
            self,
            output: torch.Tensor,
            feature_map: torch.Tensor | None,
            target: torch.Tensor,
            draw: Draw,
            smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and soft targets, (rows, C), whose mean softmax cross-entropy with label smoothing is the loss.

        Other arguments as of :meth:`loss`.
        """
        return output, self.target(soft_target(target, output.shape[1], smoothing), draw)

    def num_rows(self, batch: int, draw: Draw) -> int:
        """Number of rows that :meth:`rows` returns for a batch of this size."""
        return batch


class PairMix(Mix):
    """Base class of methods that mix pairs: lam weighs the example and 1 - lam its partner, in input and target.

    Args:
        alpha: lam ~ Beta(alpha, alpha).
        per_example: One lam for each example (AlignMixup's Algorithm 1) instead of one for the batch (its release,
            and timm's default).
    """
    pairs = True

    def __init__(self, alpha: float = 1.0, per_example: bool = False) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f'alpha must be > 0, got {alpha}')
        self.alpha, self.per_example = float(alpha), per_example

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_pairs(images, draw) if draw['mode'] == 'input' else images

    def draw_pair(self, images: torch.Tensor, rng: StepRandom, alpha: float | None = None) -> Draw:
        """Draw lam, a scalar or (B,), and the partner of each example, a permutation (B,)."""
        B = len(images)
        return dict(
            lam=sample_beta(alpha or self.alpha, (B,) if self.per_example else (), rng.device),
            perm=torch.randperm(B, generator=rng.device, device=rng.device.device),
        )

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return mix_pairs(target_BC, draw) if 'perm' in draw else target_BC

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        if 'perm' not in draw:
            return super().mass(output, target, draw)
        target, partner, lam = pair_target(target, draw)  # of any kind, and without rows of all classes
        return lam * target_mass(output, target) + (1 - lam) * target_mass(output, partner)


class MaskPair(PairMix):
    """Base class of methods that mix pairs by a mask z: it weighs pixels of the example, and 1 - z its partner's.

    A method draws partners and masks in :meth:`draw_mask`; the mean of z is the example's weight in the target. One
    that looks at the clean batch draws there what is random, and finds the rest in :meth:`complete_mask`.

    Args:
        prob: Probability of mixing by a mask, the same on all ranks.
        alpha: As :class:`PairMix`, for methods that draw lam.
        per_example: As :class:`PairMix`.
        clean_pass: 'eval' or 'train', for methods that take the gradient of the clean loss.
        input_alpha: The other steps are input mixup with lam ~ Beta(input_alpha, input_alpha); None: they are clean.
        mode: Name of the mode that mixes by a mask, where the other is input mixup.
    """

    def __init__(
            self,
            prob: float = 1.0,
            alpha: float = 1.0,
            per_example: bool = False,
            clean_pass: str | None = None,
            input_alpha: float | None = None,
            mode: str = 'input',
    ) -> None:
        super().__init__(alpha, per_example)
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be 0 to 1, got {prob}')
        if clean_pass not in (None, 'eval', 'train'):
            raise ValueError(f"saliency_mode must be 'eval' or 'train', got {clean_pass!r}")
        if input_alpha is not None and input_alpha <= 0:
            raise ValueError(f'input_alpha must be > 0, got {input_alpha}')
        self.clean_pass, self.input_alpha, self.mode = clean_pass, input_alpha, mode
        other = 'clean' if input_alpha is None else 'input'
        self.probs = {name: p for name, p in ((mode, float(prob)), (other, 1 - float(prob))) if p > 0}

    def mode_name(self, draw: Draw) -> str:
        return self.mode if 'mask' in draw else draw['mode']

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        mode = draw_mode(self.probs, rng)
        if mode == 'clean':
            return dict(mode=mode, layer=None, lam=None)
        if mode != self.mode:
            return dict(mode=mode, layer=None, **self.draw_pair(images, rng, self.input_alpha))
        draw = self.draw_mask(images, rng)
        if self.clean_pass:
            return dict(dict(mode='input', layer=None, lam=None, clean_pass=self.clean_pass), **draw)
        return _with_lam(dict(dict(mode='input', layer=None), **draw))

    def complete(self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        draw = {key: value for key, value in draw.items() if key not in ('clean_pass', 'lam')} | dict(
            self.complete_mask(images, draw, seen, target))
        return _with_lam(draw)

    def draw_mask(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        """Draw 'perm', the partner of each example (B,), and 'mask', its z: (B, 1, H, W), or (1, 1, H, W) for all.

        Masks are bool, or floats in [0, 1]. A method whose target does not have the mean of z adds its 'lam'.
        """
        raise NotImplementedError

    def complete_mask(
            self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        """What a draw needs besides, of a method that looks at the clean batch; arguments as of :meth:`complete`."""
        raise NotImplementedError

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        check_completed(self, draw)
        return self.mix_images(images, draw) if 'mask' in draw else super().images(images, draw)

    def mix_images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mix images by the mask of a draw."""
        return mix_masked(images, partners_of(images, draw['perm']), draw['mask'])


class WeighedPair(MaskPair):
    """Base class of methods whose weights need not sum to 1: draw['lam'] is that of the example's target, and
    draw['partner_lam'], where there is one, that of its partner's instead of 1 - lam.
    """
    pairs = False

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        if 'partner_lam' not in draw:
            return super().target(target_BC, draw)
        lam, partner_lam = (draw[key].to(target_BC.dtype).unsqueeze(1) for key in ('lam', 'partner_lam'))
        return lam * target_BC + partner_lam * partners_of(target_BC, draw['perm'])

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        if 'partner_lam' in draw:  # shares of the target, as accuracy is at most 1
            total = draw['lam'] + draw['partner_lam']
            draw = {**draw, 'lam': torch.where(total > 0, draw['lam'] / total, 0.5)}
        return super().mass(output, target, draw)


def _with_lam(draw: Draw) -> Draw:
    """Draw with the mean of its mask as lam, if it has none."""
    return draw if 'lam' in draw else {**draw, 'lam': mean_of(draw['mask'])}


def weighed(draw: Draw, lam: torch.Tensor | None) -> Draw:
    """Draw with the weights that the forward of mixed images told, if it told any."""
    return draw if lam is None else {**draw, 'lam': lam}


def check_completed(mix: Mix, draw: Draw) -> None:
    """Raise RuntimeError if a draw still waits for the clean batch."""
    if 'clean_pass' in draw:
        raise RuntimeError(
            f'mix {mix.name!r} looks at the clean batch before it mixes, and this draw is from before that; call '
            'complete() first, as MixModule.complete does')


def mix_masked(x: torch.Tensor, partner: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mix pixels: mask * x + (1 - mask) * partner."""
    return torch.where(mask, x, partner) if mask.dtype == torch.bool else torch.lerp(partner, x, mask.to(x.dtype))


def mean_of(mask: torch.Tensor) -> torch.Tensor:
    """Mean of masks (K, 1, H, W), float32 or better: (K,), or a scalar for one mask. Of bool masks pixels are counted.
    """
    if mask.dtype == torch.bool:
        lam = 1 - (~mask).sum(dim=(1, 2, 3)) / mask[0].numel()
    else:
        lam = mask.mean(dim=(1, 2, 3))
    return lam if len(lam) > 1 else lam[0]


def pair_target(target: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets of the examples and of their partners, and the weight of the former, () or (B,)."""
    if 'perm' not in draw:
        return target, target, torch.ones((), device=target.device)
    return target, target.index_select(0, draw['perm']), draw['lam']


def check_pairs(mix: Mix, targets: str) -> None:
    """Raise ValueError if targets are neither 'soft' nor 'pairs', or pairs of a method that has none."""
    if targets not in ('soft', 'pairs'):
        raise ValueError(f"targets must be 'soft' or 'pairs', got {targets!r}")
    if targets == 'pairs' and not mix.pairs:
        raise ValueError(
            f"mix {mix.name!r} mixes more than two examples, has weights that do not sum to 1, or computes its loss "
            "itself: targets='pairs' is for methods such as mixup, cutmix, manifold and alignmix; use targets='soft'")


def mix_pairs(x: torch.Tensor, draw: Draw, partner: torch.Tensor | None = None) -> torch.Tensor:
    """Mix pairs: lam * x + (1 - lam) * partner, by default the partners of x."""
    lam = draw['lam'].to(x.dtype)
    if lam.ndim:
        lam = lam.view(-1, *[1] * (x.ndim - 1))
    return torch.lerp(partners_of(x, draw['perm']) if partner is None else partner, x, lam)


def partners_of(x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Permute the batch: x[perm] in x's memory layout.

    This takes one copy, and one in the backward pass, where that of x[perm] sorts indices and accumulates into zeros.
    """
    return _Permute.apply(x, perm)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, perm):
        ctx.save_for_backward(perm)
        return _take(x, perm)

    @staticmethod
    def backward(ctx, grad):
        perm, = ctx.saved_tensors
        return _take(grad, perm.argsort()), None


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take examples of a batch. index_select is faster than indexing, but would make any layout contiguous."""
    if torch.compiler.is_compiling():  # the compiler chooses layouts
        return x.index_select(0, index)
    order, back = _memory_order(x)
    return x.permute(order).index_select(0, index).permute(back)


def mix_examples(x: torch.Tensor, weights_NB: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the examples of a batch, (N, ...), in x's dtype, whatever autocast says, and memory layout."""
    order, back = _memory_order(x)
    ordered = x.permute(order)
    with torch.autocast(x.device.type, enabled=False):
        mixed = weights_NB.to(x.dtype) @ ordered.flatten(1)
    return mixed.view(-1, *ordered.shape[1:]).permute(back)


def _memory_order(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """Permutation of the dimensions into their order in memory, the batch first, and the one back."""
    order = [0, *sorted(range(1, x.ndim), key=lambda dim: -x.stride()[dim])]
    return order, sorted(range(x.ndim), key=order.__getitem__)


def draw_mode(probs: dict[str, float], rng: StepRandom) -> str:
    """Draw one of the modes, the same on all ranks."""
    u = torch.rand((), generator=rng.shared, dtype=torch.float64).item()
    for mode, p in probs.items():
        u -= p
        if u < 0:
            return mode
    return next(mode for mode, p in reversed(probs.items()) if p > 0)


def mode_probabilities(probs: Any, modes: tuple[str, ...]) -> dict[str, float]:
    """Check and normalise an option `mode_probs`: a number for each mode, in order or by name.

    Raises:
        ValueError: Unknown modes, a wrong count, a negative number, or zeros only.
    """
    if isinstance(probs, dict):
        unknown = sorted(set(probs) - set(modes))
        values = [float(probs.get(mode, 0)) for mode in modes]
    else:
        unknown, values = [], [float(p) for p in probs]
    if unknown or len(values) != len(modes) or min(values) < 0 or sum(values) <= 0:
        raise ValueError(f'mode_probs must give a probability to each of {", ".join(modes)}, got {probs}')
    return {mode: value / sum(values) for mode, value in zip(modes, values, strict=True)}
