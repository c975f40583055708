"""Mixing methods for frameworks that call the model and the loss themselves, such as Hugging Face's Trainer."""
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from .mixes import Mix
from .mixes.base import weighed
from .mixes.criterion import Criterion
from .task import MixTask


class AttachedMix:
    """Mixing method of a model, made by :func:`attach`."""

    def __init__(self, model: nn.Module, mix: str | Mapping[str, float] | Mix, **kwargs: Any) -> None:
        self._model, self._task = model, MixTask(model, mix, verbose=False, **kwargs)
        self._module, self.mix = self._task.trainable_module, self._task.mix
        if self.mix.extra is not None:
            self._task.remove_hooks()
            raise ValueError(
                f'mix {self.mix.name!r} trains layers of its own, which the model does not hold; use '
                'timm_alignmix.MixTask')
        if self.mix.clean_pass:
            self._task.remove_hooks()
            raise ValueError(
                f'mix {self.mix.name!r} looks at the clean images and their labels before the step, and a forward of '
                'the model does not get labels; use timm_alignmix.MixTask or timm_alignmix.create_mixup')
        self.mode: str | None = None
        self.lam: torch.Tensor | None = None
        self._armed: tuple[dict[str, Any] | None, int] | None = None
        self._ran: tuple[Any, ...] | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def loss(
            self,
            output: Any,
            target: torch.Tensor,
            num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Compute the loss of the last training forward; in eval mode the clean loss.

        Args:
            output: The model's logits (B, num_classes), or an object that has them as `.logits`.
            target: Classes (B,) int64, or probabilities (B, num_classes), of the batch as loaded.
            num_items_in_batch: Elements of the targets of all batches whose losses are added up, as Hugging Face's
                Trainer gives it; None: the loss is the mean over this batch.

        Returns:
            A scalar, the loss of :class:`timm_alignmix.MixTask` for the same draw.

        Raises:
            ValueError: As of :meth:`timm_alignmix.MixTask.forward`.
            RuntimeError: The model has not run in train mode since the loss was computed last.
        """
        output = getattr(output, 'logits', output)
        if not self._model.training:
            loss = self._task._loss(output, target, None)
        elif self._ran is None:
            raise RuntimeError(
                'the model has not run in train mode since the loss was computed last; call loss(model(images), '
                'target) once for each batch')
        else:
            draw, batch, feature_map, autocast = self._ran
            self._ran = None
            self._task._check(target, batch)
            loss = None
            if draw is not None:
                with autocast:  # some frameworks leave it with the model's forward
                    loss = self.mix.loss(output, feature_map, target, draw, Criterion.of(self._task.criterion))
            loss = self._task._loss(output, target, draw) if loss is None else loss
        return loss if num_items_in_batch is None else loss * (target.numel() / num_items_in_batch)

    @property
    def mix_enabled(self) -> bool:
        """False trains without mixing, as of :class:`timm_alignmix.MixTask`."""
        return self._task.mix_enabled

    @mix_enabled.setter
    def mix_enabled(self, enabled: bool) -> None:
        self._task.mix_enabled = enabled

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and so end mixing."""
        self._task.remove_hooks()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, int]:
        """State for checkpoints: step and seed of the draws."""
        return self._task.get_task_state()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the draws of a checkpoint."""
        self._task.load_task_state(state)

    def _before_forward(self, model: nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not model.training:
            return None
        if self._ran is not None:
            raise RuntimeError(
                'the model ran in train mode twice without a call of loss in between; call loss(model(images), target) '
                'once for each batch, and model.eval() for forwards that are not trained on')
        if self._armed is not None:  # the forward before ended with an error
            self._module.disarm()
        images, *rest = (*inputs, *kwargs.values())
        draw = self._task._draw(images)
        self._armed = draw, len(images)
        if draw is None:
            self.mode, self.lam = 'clean', None
            return None
        self.mode, self.lam = self.mix.mode_name(draw), draw['lam']
        self._module.arm(draw)
        mixed = (self.mix.images(images, draw), *rest)
        return mixed[:len(inputs)], dict(zip(kwargs, mixed[len(inputs):], strict=True))

    def _after_forward(self, model: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not model.training:
            return None
        (draw, batch), self._armed = self._armed, None
        feature_map = self._module.disarm()
        if draw is not None:
            self._module.check_ran(draw, output, feature_map)
            draw = weighed(draw, self.mix.lam(feature_map, draw))
            self.lam = draw['lam']
        device = output.device.type
        autocast = torch.autocast(
            device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        self._ran = draw, batch, feature_map, autocast
        return None if draw is None else self.mix.output(output, draw)


def attach(
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
) -> AttachedMix:
    """Mix in the model's own training forward, and settle in a loss: `loss = attached.loss(model(images), labels)`.

    For frameworks that call the model and the loss themselves. Arguments and losses are those of
    :class:`timm_alignmix.MixTask`. Hooks of the model draw a step and mix whenever it runs in train mode; pass images
    and labels as they were loaded. Evaluation is never mixed.

    With Hugging Face's Trainer, whose models hold timm's as `.timm_model`::

        attached = timm_alignmix.attach(model.timm_model, 'multimix')
        Trainer(model, args, train_dataset=data, compute_loss_func=attached.loss).train()

    Args:
        model: The timm model, before DDP or torch.compile wrap it.
        mix: Name of a method (see :func:`timm_alignmix.list_mixes`), names and weights of several, or a method.
        mix_kwargs: Options of a method given by name; with several, 'method.option'.
        criterion: Loss of (logits, soft targets), as :class:`timm_alignmix.MixTask` takes it.
        criterion_kwargs: Arguments of timm.loss.create_classification_loss, instead of a criterion.
        seed: Seed of the draws; each is a function of (seed, step, rank).
        rank: Rank of this process; None asks torch.distributed.
        img_size: Size of the images; None takes the size the model was built for.
        targets: 'soft' or 'pairs', as :class:`timm_alignmix.MixTask` takes it.
        num_classes: Number of classes; None takes the model's.

    Returns:
        An object with `loss(output, target)`, the switch `mix_enabled`, `mode` and `lam` of the last training forward,
        `remove_hooks()`, and `state_dict` and `load_state_dict`, with which a resumed run continues its draws.

    Raises:
        ValueError: As of :class:`timm_alignmix.MixTask`, or a method that trains layers of its own or looks
            at the clean batch before the step, such as puzzlemix.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model('test_resnet', num_classes=10)
        >>> attached = attach(model, 'densemultimix', dict(n=16))
        >>> attached.loss(model(torch.randn(4, 3, 160, 160)), torch.tensor([1, 2, 3, 4])).backward()
    """
    return AttachedMix(
        model, mix, mix_kwargs=mix_kwargs, criterion=criterion, criterion_kwargs=criterion_kwargs, seed=seed, rank=rank,
        img_size=img_size, targets=targets, num_classes=num_classes)
