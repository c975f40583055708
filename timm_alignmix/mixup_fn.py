"""Mixing methods with the call of timm.data.Mixup, for loops that were written for it."""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import get_worker_info

from .anatomy import count_classes
from .functional import check_values, soft_target
from .mix_module import MixModule
from .mixes import Mix
from .mixes.base import check_pairs, pair_target, weighed
from .step_random import StepRandom


class MixupFn:
    """Mixup function of a model, made by :func:`create_mixup`."""

    def __init__(
            self,
            mix: str | Mapping[str, float] | Mix,
            model: nn.Module,
            mix_kwargs: dict[str, Any] | None = None,
            num_classes: int | None = None,
            label_smoothing: float = 0.0,
            seed: int = 0,
            rank: int | None = None,
            img_size: int | tuple[int, int] | None = None,
            targets: str = 'soft',
    ) -> None:
        self._random = StepRandom(seed, rank)
        self._module = MixModule(model, mix, mix_kwargs, img_size)
        self.mix = self._module.mix
        try:
            if self.mix.extra is not None:
                raise ValueError(
                    f'mix {self.mix.name!r} trains layers of its own, which a mixup function has no place for; use '
                    'timm_alignmix.MixTask')
            check_pairs(self.mix, targets)
            if targets == 'pairs' and label_smoothing:
                raise ValueError("with targets='pairs' label smoothing is the criterion's; leave label_smoothing out")
        except ValueError:
            self._module.remove_hooks()
            raise
        self.targets = targets
        self.num_classes = count_classes(model, num_classes)
        self.label_smoothing = label_smoothing
        self.step, self._checked = 0, False
        self.mixup_enabled = True
        self.mode: str | None = None
        self.lam: torch.Tensor | None = None
        self._pending: tuple[Any, ...] | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Draw a step and arm the model for its next training forward.

        Args:
            x: Images (B, C, H, W), normalised. Not changed in place.
            target: Classes (B,) int64, or rows (B, num_classes); of any kind with targets='pairs'.

        Returns:
            Images for the model, and float32 soft targets (rows, num_classes) for its output: B rows, n for multimix or
            n * R for densemultimix. When features are mixed, the model's forward fills the targets in, since dense ones
            depend on its attention. Pass on this very tensor; a copy taken before the forward holds NaN.
            With targets='pairs', instead, (target, targets of the partners, lam), of which the forward fills in lam if
            it depends on the model's attention.

        Raises:
            RuntimeError: The step before was not followed by a training forward of the model, or the call is in a
                worker of a data loader.
            ValueError: Targets of the wrong shape or, in the first step, with wrong values.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                'mixup_fn was called in a worker of a data loader, whose copy draws the same in each worker and epoch; '
                'call it in the training loop, on the batch')
        if self._pending is not None:
            raise RuntimeError(
                'mixup_fn was called again before the model ran a training forward on what it returned; call model(x) '
                'in train mode once after each call, or disarm() to drop a step')
        if self.targets == 'soft':
            if not self._checked:
                check_values(target, self.num_classes, sum_to_one=self.mix.closed_form)
                self._checked = True
            clean = soft_target(target, self.num_classes, self.label_smoothing)
        if not self.mixup_enabled:
            self.step += 1
            self.mode, self.lam = 'clean', None
            return x, pair_target(target, {}) if self.targets == 'pairs' else clean
        draw = self.mix.draw(x, self._random.at(self.step, x.device))
        self.step += 1
        draw = self._module.complete(x, target, draw)
        if draw['layer'] in self.mix.watched:
            draw = weighed(draw, x.new_full((len(x),), float('nan'), dtype=torch.promote_types(x.dtype, torch.float32)))
        self.mode, self.lam = self.mix.mode_name(draw), draw['lam']
        x = self.mix.images(x, draw)
        is_done = draw['mode'] in ('clean', 'input') and draw['layer'] is None  # the model's forward adds nothing
        if self.targets == 'pairs':
            if not is_done:
                self._pending = (draw, x.shape, target, None)
            return x, pair_target(target, draw)
        if is_done:
            return x, self.mix.target(clean, draw)
        rows = self.mix.num_rows(len(x), draw)
        soft = clean.new_full((rows, self.num_classes), float('nan'))
        self._pending = (draw, x.shape, target, soft)
        return x, soft

    def disarm(self) -> None:
        """Drop a step that was drawn and not run."""
        self._pending = None

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and so end mixing."""
        self._module.remove_hooks()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, int]:
        """State for checkpoints: step and seed of the draws."""
        return dict(step=self.step, seed=self._random.seed)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the draws of a checkpoint."""
        self.step, self._random.seed = state['step'], state['seed']

    def _before_forward(self, model: nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> None:
        if self._pending is None or not model.training:
            return
        draw, shape, *_ = self._pending
        images = next(iter((*inputs, *kwargs.values())))
        if images.shape != shape:
            self._pending = None
            raise RuntimeError(
                f'mixup_fn returned images of shape {tuple(shape)}, the model was called with '
                f'{tuple(images.shape)}; call it with what mixup_fn returned')
        self._module.arm(draw)

    def _after_forward(self, model: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self._pending is None or not model.training:
            return None
        draw, _, target, soft = self._pending
        self._pending = None
        feature_map = self._module.disarm()
        self._module.check_ran(draw, output, feature_map)
        lam = self.mix.lam(feature_map, draw)
        if lam is not None:
            with torch.no_grad():
                draw['lam'].copy_(lam)
        output = self.mix.output(output, draw)
        if soft is None:
            return output
        output, rows = self.mix.rows(output, feature_map, target, draw, self.label_smoothing)
        with torch.no_grad():
            soft.copy_(rows)
        return output


def create_mixup(
        name: str | Mapping[str, float] | Mix,
        model: nn.Module,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
        rank: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        targets: str = 'soft',
        **options: Any,
) -> MixupFn:
    """Create a mixup function: `x, target = mixup_fn(x, target)`, as with timm.data.Mixup.

    Feature methods arm the model for exactly one training forward; evaluation is never mixed, and a step that was drawn
    but not run raises at the next call. For the same draws the loss is that of :class:`timm_alignmix.MixTask`, which
    takes less memory: here multimix returns n rows of logits and densemultimix n * R, all kept for the backward pass.

    Args:
        name: Name of a method (see :func:`timm_alignmix.list_mixes`), names and weights of several, of which each step
            draws one, or a method.
        model: The model, before DDP or torch.compile wrap it: a timm model, or any network for methods that mix images
            only. It gets forward hooks.
        num_classes: Number of classes; None takes the model's.
        label_smoothing: timm's convention; the loss must not smooth again.
        seed: Seed of the draws; each is a function of (seed, step, rank).
        rank: Rank of this process; None asks torch.distributed.
        img_size: Size of the images; None takes the size the model was built for.
        targets: 'soft', or 'pairs' for `x, (y_a, y_b, lam) = mixup_fn(x, y)` and criteria that take classes:
            `(lam * criterion(output, y_a) + (1 - lam) * criterion(output, y_b)).mean()`. With per_example=True, lam is
            (B,) and the criterion needs reduction='none'.
        **options: Options of the method; with several, 'method.option'.

    Returns:
        A callable with timm's switch `mixup_enabled`, `mode` and `lam` of the last step, and `state_dict` and
        `load_state_dict`, with which a resumed run continues its draws.

    Raises:
        ValueError: Unknown method or option; a model that the method cannot mix exactly, or that is wrapped; a method
            that trains layers of its own; pairs of one that mixes more than two examples.

    Example:
        >>> import timm, torch
        >>> from timm.loss import SoftTargetCrossEntropy
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> mixup_fn = create_mixup('alignmix', model, img_size=64)
        >>> x, target = mixup_fn(torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4]))
        >>> loss = SoftTargetCrossEntropy()(model(x), target)
        >>> loss.backward()
    """
    return MixupFn(name, model, options, num_classes, label_smoothing, seed, rank, img_size, targets)
