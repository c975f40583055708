"""Mixing methods as a timm training task."""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.loss import AsymmetricLossSingleLabel, JsdCrossEntropy
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .anatomy import count_classes
from .functional import check_target, check_values, target_mass
from .mix_module import MixModule
from .mixes import Mix
from .mixes.base import check_pairs, pair_target, weighed
from .mixes.criterion import Criterion, ignores
from .step_random import StepRandom


class MixTask(ClassificationTask):
    """Train a timm model with a mixing method: model + method -> {'loss', 'output', 'mode', 'lam', 'accuracy'}.

    EMA, compilation, DDP and checkpoints are timm's, and checkpoints have the keys of the plain model. Evaluation,
    export and fine-tuning use the model itself, which gets forward hooks that are idle outside a training step and is
    not changed otherwise.

    Args:
        model: A timm classification model; any network for methods that mix images only.
        mix: Name of a method (see :func:`timm_alignmix.list_mixes`), names and weights of several, of which each step
            draws one, or a method.
        mix_kwargs: Options of a method given by name; with several, 'method.option'.
        criterion: Loss of (logits, soft targets). Softmax cross-entropy, in timm's or torch's classes, is recognised
            with its label smoothing and computed in float32 or better. Any other is called as it is: by mix 'none'
            with the targets as they are, by the others with mixed rows, to which `smoothing` of the criterion is
            applied if the targets are classes, as in timm.data.Mixup. MultiMix and Dense MultiMix compute softmax and
            binary cross-entropy (timm's, or torch's BCEWithLogitsLoss) in closed form.
        criterion_kwargs: Arguments of timm.loss.create_classification_loss, instead of a criterion.
        seed: Seed of the draws; each is a function of (seed, step, rank).
        rank: Rank of this process; None asks torch.distributed. Ranks draw differently, but for the mode.
        img_size: Size of the images; None takes the size the model was built for.
        targets: 'soft', or 'pairs' for criteria that take classes: the loss is lam times that of the examples' targets
            plus 1 - lam times that of their partners'. The criterion is called as it is, with targets of any kind. With
            a lam for each example it must return a loss for each, as with reduction='none'.
        num_classes: Number of classes; None takes the model's.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: Log what is set up.

    Attributes:
        mix_enabled: False trains without mixing, as timm.data.Mixup's `mixup_enabled` does, for the last epochs. Steps
            count on, so that each draws the same whether those before it were mixed or not.

    Raises:
        ValueError: Unknown method or option; a model that the method cannot mix exactly; a criterion without a closed
            form for densemultimix, or one that mixing contradicts; pairs of a method that mixes more than two examples.

    Example:
        >>> import timm, torch
        >>> task = MixTask(timm.create_model('test_resnet', num_classes=10), mix='densemultimix', mix_kwargs=dict(n=16))
        >>> result = task(torch.randn(4, 3, 160, 160), torch.tensor([1, 2, 3, 4]))
        >>> result['loss'].backward()
        >>> sorted(result)
        ['accuracy', 'lam', 'loss', 'mode', 'output']
    """

    def __init__(
            self,
            model: nn.Module,
            mix: str | Mapping[str, float] | Mix = 'none',
            mix_kwargs: dict[str, Any] | None = None,
            criterion: nn.Module | Any | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            seed: int = 0,
            rank: int | None = None,
            img_size: int | tuple[int, int] | None = None,
            targets: str = 'soft',
            num_classes: int | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(
            model, criterion=criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self._random = StepRandom(seed, rank)
        self.trainable_module = MixModule(model, mix, mix_kwargs, img_size)
        self.num_classes = count_classes(model, num_classes)
        self.mix = self.trainable_module.mix
        self.targets = targets
        self.step, self._checked = 0, False
        self.mix_enabled = True
        try:
            self._check_criterion()
        except ValueError:
            self.remove_hooks()
            raise

    def _check_criterion(self) -> None:
        name, mix = type(self.criterion).__name__, self.mix.name
        check_pairs(self.mix, self.targets)
        if mix == 'none':
            return
        if isinstance(self.criterion, JsdCrossEntropy):
            raise ValueError(f'{name} compares augmented copies of an image, which mix {mix!r} would mix; use mix none')
        classes_only = isinstance(self.criterion, AsymmetricLossSingleLabel) or ignores(self.criterion)
        if self.targets == 'soft' and classes_only:
            raise ValueError(
                f'mix {mix!r} makes soft targets, which {name} does not take (with ignore_index, or at all); use '
                "targets='pairs' with a method that mixes pairs, another criterion, or mix none")
        if self.mix.closed_form and not Criterion.of(self.criterion).closed_form:
            raise ValueError(
                f'mix {mix!r} weighs examples by attention, so its loss must be softmax cross-entropy or binary '
                f"cross-entropy (timm.loss.BinaryCrossEntropy, nn.BCEWithLogitsLoss; reduction='mean'), not {name}; "
                'multimix and the methods that mix pairs take any criterion of soft targets')

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Run one step: draw, mix, run the model, compute the loss. In eval mode the loss is clean.

        Args:
            input: Images (B, C, H, W), normalised.
            target: Classes (B,) int64, or rows (B, num_classes): probabilities, or labels of any number of classes for
                criteria that take them.

        Returns:
            'loss', a scalar; 'output', logits (B, num_classes), of mixed examples if the step mixes images or an inner
            layer; 'mode', the mode drawn; 'lam', the weight of each example against its partner, () or (B,), or None;
            'accuracy', a scalar on the device from 0 to 1: the mean of :func:`timm_alignmix.functional.target_mass`
            over the rows of 'output', which are the clean examples where the loss is in closed form; None for targets
            that are neither classes nor rows.

        Raises:
            ValueError: Targets of the wrong shape; in the first step, classes that do not exist or, for softmax
                cross-entropy, rows that do not sum to 1.
            RuntimeError: The forward pass by-passes the mixed layer, or reentrant gradient checkpointing runs it.
        """
        draw = None
        if self.trainable_module.training:
            if not isinstance(input, torch.Tensor):
                raise ValueError(
                    f'images must be one tensor, got {type(input).__name__}; timm.task.ClassificationTask trains '
                    'without mixing on any input of the model')
            self._check(target, len(input))
            draw = self._draw(input)
        if draw is not None:
            draw = unwrap_model(self.trainable_module).complete(input, target, draw)
        if draw is None:
            output = self.trainable_module(input)
            return dict(
                loss=self._loss(output, target, None), output=output, mode='clean', lam=None,
                accuracy=self._accuracy(output, target, None))
        result = self.trainable_module(self.mix.images(input, draw), target, draw, Criterion.of(self.criterion))
        output, draw = result['output'], weighed(draw, result.get('lam'))
        if 'loss' not in result:
            result['loss'] = self._loss(output, target, draw)
        return dict(
            loss=result['loss'], output=output, mode=self.mix.mode_name(draw), lam=draw['lam'],
            accuracy=self._accuracy(output, target, draw))

    def _draw(self, images: torch.Tensor) -> dict[str, Any] | None:
        draw = self.mix.draw(images, self._random.at(self.step, images.device)) if self.mix_enabled else None
        self.step += 1
        return draw

    def _check(self, target: torch.Tensor, batch: int) -> None:
        softmax = Criterion.of(self.criterion).softmax
        if self.targets != 'soft' or not softmax and self.mix.name == 'none':  # what the criterion takes
            return
        check_target(target, batch, self.num_classes)
        if not self._checked:  # once: it waits for the device
            check_values(target, self.num_classes, sum_to_one=softmax)
            self._checked = True

    def _loss(self, output: torch.Tensor, target: torch.Tensor, draw: dict[str, Any] | None) -> torch.Tensor:
        mixed = draw is not None and draw['mode'] != 'clean'
        if self.targets == 'pairs':
            return self._pair_loss(output, target, draw) if mixed else self.criterion(output, target).mean()
        criterion = Criterion.of(self.criterion)
        if not mixed and not criterion.softmax:
            return self.criterion(output, target)
        target_BC = criterion.soft_target(target, output)
        return criterion(output, self.mix.target(target_BC, draw) if mixed else target_BC)

    @torch.no_grad()
    def _accuracy(
            self, output: torch.Tensor, target: torch.Tensor, draw: dict[str, Any] | None) -> torch.Tensor | None:
        is_rows = isinstance(output, torch.Tensor) and output.ndim == 2
        if not is_rows or not isinstance(target, torch.Tensor) or not (
                target.ndim == 1 and not target.is_floating_point() or target.shape[1:] == output.shape[1:]):
            return None
        if draw is None or draw['mode'] == 'clean':
            return target_mass(output, target).mean()
        return self.mix.mass(output, target, draw).mean()

    def _pair_loss(self, output: torch.Tensor, target: torch.Tensor, draw: dict[str, Any]) -> torch.Tensor:
        target, partner, lam = pair_target(target, draw)
        loss, partner_loss = self.criterion(output, target), self.criterion(output, partner)
        if lam.ndim and loss.shape != lam.shape:
            raise ValueError(
                f"mix {self.mix.name!r} draws a lam for each example, so with targets='pairs' the criterion must "
                f"return a loss for each, ({len(lam)},), got {tuple(loss.shape)}; create "
                f"{type(self.criterion).__name__} with reduction='none', or leave per_example out")
        return (lam * loss + (1 - lam) * partner_loss).mean()

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training step and, separately, the plain model for evaluation.

        Sets an option of torch.compile for the process: the tap of a layer that gradient checkpointing computes again
        is read once, in the forward pass.
        """
        option = 'skip_fwd_side_effects_in_bwd_under_checkpoint'
        if hasattr(torch._dynamo.config, option):  # older releases of torch refuse such layers themselves
            setattr(torch._dynamo.config, option, True)
        options = dict(backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = torch.compile(self.trainable_module.model, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Plain timm model, its EMA copy, or its compiled form."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(resolved) if resolved is not None else None
        return inner.model if isinstance(inner, MixModule) else resolved

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and its EMA copy and so end mixing, for torch.jit.script or pickle."""
        for module in self.modules():
            if isinstance(module, MixModule):
                module.remove_hooks()

    @property
    def seed(self) -> int:
        """Seed of the draws."""
        return self._random.seed

    def get_extra_state(self) -> torch.Tensor:
        """Step and seed of the draws, for frameworks that save `state_dict()` of the task."""
        return torch.tensor([self.step, self.seed])  # a tensor, since some file formats hold nothing else

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Continue the draws of a checkpoint."""
        self.step, self._random.seed = state.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f'{prefix}_extra_state', self.get_extra_state())  # files without it begin anew
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State for checkpoints: step and seed of the draws, and the weights of the method's own layers, if any."""
        extra = self._extra(ema)
        layers = {} if extra is None else dict(extra=extra.state_dict())
        return dict(step=self.step, seed=self.seed, **layers)

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Continue the draws of a checkpoint and load the method's own layers.

        Raises:
            ValueError: The method has layers of its own and the checkpoint has none.
        """
        extra = self._extra(ema)
        if not state:
            if ema and extra is not None:  # no average in the checkpoint: start from the layers just loaded
                extra.load_state_dict(self._extra(False).state_dict())
            return
        if not ema:
            self.step, self._random.seed = state['step'], state['seed']
        if extra is None:
            return
        if 'extra' not in state:
            raise ValueError(
                f'the checkpoint is of another method: it has no weights for the layers of mix {self.mix.name!r}; '
                'start from its model alone (train_imagenet.py: --initial-checkpoint)')
        extra.load_state_dict(state['extra'], strict=strict)

    def _extra(self, ema: bool) -> nn.Module | None:
        return unwrap_model(self.get_trainable_module(ema=ema)).extra
