"""Model and mixing method as one module, in whose forward all trainable compute happens.

DDP, torch.compile and autocast act on a module's forward only, so the method's part of the network (dense heads, mixed
features, closed-form losses) must run there too.
"""
import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.models import group_parameters

from .anatomy import Anatomy, ClassAttention, output_module
from .clean_pass import evaluating, gradient_saliency
from .mixes import Mix, create_mix
from .mixes.base import Draw, weighed
from .mixes.criterion import Criterion


class Step:
    """The step that a model runs, shared by the hooks on the model.

    Gradient checkpointing runs layers again in the backward pass, after the forward and possibly others. The gradient
    of the forward's output, which comes before those of its layers, brings the step back.

    A plain object, so that copies of the model (EMA) get an idle one of their own and a pickled model can be loaded.
    """

    def __init__(self) -> None:
        self.mix: Mix | None = None
        self.draw: Draw | None = None
        self.output: torch.Tensor | None = None
        self._grad_enabled, self._first = False, 0
        # By autograd's number of a backward pass: first and last node of a forward, its method and draw.
        self._again: dict[int, list[tuple[int, int, Mix, Draw]]] = {}

    def arm(self, mix: Mix, draw: Draw) -> None:
        self.mix, self.draw, self.output = mix, draw, None
        self._grad_enabled = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self._first = torch.autograd._get_sequence_nr()

    def disarm(self) -> torch.Tensor | None:
        """Go idle and return the recorded output."""
        output = self.output
        self.mix = self.draw = self.output = None
        return output

    def record(self, output: torch.Tensor) -> None:
        """Keep the output of the tapped layer.

        Raises:
            RuntimeError: Reentrant checkpointing, which makes an output without gradient.
        """
        if self._grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                f'module {self.draw["layer"]!r} ran without gradient in a training forward, as in reentrant gradient '
                'checkpointing, which cannot be mixed; call timm.layers.set_reentrant_ckpt(False), the default')
        self.output = output
        self.return_with(output)

    def __call__(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        """Forward hook of the model."""
        if self.draw is not None:
            self.return_with(output)

    def return_with(self, output: Any) -> None:
        """Bring the step back when the gradient of this output is known, if it replaces features.

        Others need no draw in the backward pass, which would hold their tensors till then.
        """
        if self.draw['layer'] not in self.mix.layers:
            return
        if torch.compiler.is_compiling() or getattr(output, 'grad_fn', None) is None:
            return  # the compiler computes layers again with the draw in its graph
        forward = (self._first, output.grad_fn._sequence_nr(), self.mix, self.draw)
        output.register_hook(lambda grad: self._bring_back(forward))

    def _bring_back(self, forward: tuple[int, int, Mix, Draw]) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._again:
            self._again[backward] = []
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._again.__delitem__, backward))
        self._again[backward].append(forward)

    def recomputed(self) -> tuple[Mix | None, Draw | None]:
        """Method and draw of the forward a layer of which the backward pass computes again, if it was mixed."""
        if self._again:
            for first, last, mix, draw in self._again.get(torch._C._current_graph_task_id(), ()):
                if first <= torch._C._current_autograd_node()._sequence_nr() <= last:
                    return mix, draw
        return None, None


class Tap:
    """Forward hook on a layer. In a step, it records the layer's output and lets the method replace it."""

    def __init__(self, name: str, step: Step) -> None:
        self.name, self.step = name, step

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        step = self.step
        mix, draw = step.recomputed() if step.draw is None else (step.mix, step.draw)
        if draw is None or draw['layer'] != self.name:
            return None
        if step.draw is not None:
            step.record(output)
        layer = mix.layers.get(self.name)
        return None if layer is None else mix.features(output, layer, draw)


class Watch:
    """Forward hook on a module. In a step that reads it, it records what the method reads of the call."""

    def __init__(self, watched: ClassAttention, step: Step) -> None:
        self.watched, self.step = watched, step

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        step = self.step
        # Of a layer that is computed again the first call counts: later ones find no draw.
        if step.draw is not None and step.draw['layer'] == self.watched.name:
            step.output = self.watched.read(args, kwargs, output)


class MixModule(nn.Module):
    """timm model that can also run a step of a mixing method. Called without a draw, it is the model.

    Args:
        model: A timm classification model, kept as `.model`. The layers that the method taps get forward hooks here,
            because torch.compile ignores later ones; they are idle outside a mixed step. Layers of the method's own,
            if it has any, are `.extra`.
        mix: Name of a method, names and weights of several, or a method, which is copied because it is bound to one
            model.
        mix_kwargs: Options of methods given by name.
        img_size: Size of the images; None takes the size the model was built for.

    Raises:
        ValueError: Unknown method or option, or a model that the method cannot mix exactly.
    """

    def __init__(
            self,
            model: nn.Module,
            mix: str | Mapping[str, float] | Mix,
            mix_kwargs: dict[str, Any] | None = None,
            img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(mix, Mix) and mix_kwargs:
            raise ValueError(f'mix_kwargs {sorted(mix_kwargs)} need the name of a mix: {mix!r} has its options')
        if not isinstance(model, nn.Module) or hasattr(model, '_orig_mod') or hasattr(model, 'module'):
            raise ValueError(
                f'pass the timm model itself, before DDP or torch.compile wrap it; got {type(model).__name__}')
        if getattr(model, 'distilled_training', False):
            raise ValueError(
                f'{type(model).__name__} returns two outputs in training; call model.set_distilled_training(False)')
        self.mix = copy.deepcopy(mix) if isinstance(mix, Mix) else create_mix(mix, **(mix_kwargs or {}))
        cfg, (mean, std) = getattr(model, 'pretrained_cfg', None) or {}, self.mix.normalization
        self.mix.set_normalization(cfg.get('mean', mean), cfg.get('std', std))
        if self.mix.binds:
            self.mix.bind(Anatomy(model, img_size))
        # Before the model: timm's clipping takes the last two parameters for the classifier.
        self.extra = self.mix.extra
        self.model = model
        self.step = Step()
        self._handles = [
            output_module(model, name).register_forward_hook(Tap(name, self.step)) for name in self.mix.tapped]
        self._handles += [
            model.get_submodule(name).register_forward_hook(Watch(watched, self.step), with_kwargs=True)
            for name, watched in self.mix.watched.items()]
        if self._handles:
            self._handles.append(model.register_forward_hook(self.step))

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and so end mixing."""
        for handle in self._handles:
            handle.remove()

    def complete(self, images: torch.Tensor, target: torch.Tensor, draw: Draw) -> Draw:
        """Complete a draw by the clean batch, and a pass of the model over it, if it asks for that.

        It runs the model itself, whose taps are idle: not DDP's wrapper, which would wait for gradients of parameters,
        and not a compiled form, which would compute them.

        Args:
            images: (B, C, H, W), not mixed.
            target: (B,) classes or (B, C) probabilities.
            draw: The step.
        """
        if 'clean_pass' not in draw:
            return draw
        kind, seen = draw['clean_pass'], None
        # A head that the method applies to what it has read must not drop channels or normalise by the batch either.
        with torch.no_grad(), evaluating(self.model) if kind == 'forward' else nullcontext():
            if kind == 'forward':
                _, seen = self._run(images, {**draw, 'layer': draw['clean_layer']})
            elif kind != 'target':
                seen = gradient_saliency(self.model, images, target, kind)
            return self.mix.complete(images, draw, seen, target)

    def _run(self, images: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model for a step and return its output, and what the step reads of draw['layer']."""
        self.arm(draw)
        try:
            output = self.model(images)
        finally:
            seen = self.disarm()
        self.check_ran(draw, output, seen)
        return output, seen

    def arm(self, draw: Draw) -> None:
        """Make the next forward of the model the step that was drawn."""
        self.step.arm(self.mix, draw)

    def disarm(self) -> torch.Tensor | None:
        """Return the model to its own forward; returns the tapped layer's output."""
        return self.step.disarm()

    def check_ran(self, draw: Draw, output: Any, feature_map: torch.Tensor | None) -> None:
        """Raise RuntimeError if the tapped layer was by-passed, or the output is not one tensor of logits."""
        if not isinstance(output, torch.Tensor):
            raise RuntimeError(
                f'the model returned a {type(output).__name__} in training, and one tensor of logits is needed; call '
                'model.set_distilled_training(False), or turn its auxiliary outputs off')
        if draw['layer'] is not None and feature_map is None:
            raise RuntimeError(
                f'module {draw["layer"]!r} was not called in this forward pass, so nothing was mixed; its hook was '
                'removed, or the model by-passes it in training')

    def forward(
            self,
            images: torch.Tensor,
            target: torch.Tensor | None = None,
            draw: Draw | None = None,
            criterion: Criterion | None = None,
    ) -> Any:
        """Run the model, or a step.

        Args:
            images: (B, C, H, W), already mixed if the step mixes its input.
            target: (B,) classes or (B, C) probabilities of the clean examples.
            draw: The step; None runs the model alone.
            criterion: For methods that compute their loss.

        Returns:
            The model's output; with a draw, a dict of 'output' and, if the method computes them, 'lam' and 'loss'.
        """
        if draw is None:
            return self._reaching_extra(self.model(images))
        output, feature_map = self._run(images, draw)
        lam = self.mix.lam(feature_map, draw)
        draw = weighed(draw, lam)
        output = self._reaching_extra(self.mix.output(output, draw))
        loss = self.mix.loss(output, feature_map, target, draw, criterion)
        result = dict(output=output, lam=lam, loss=loss)
        return {key: value for key, value in result.items() if value is not None}

    def _reaching_extra(self, output: torch.Tensor) -> torch.Tensor:
        """Let the output depend on the method's own layers, so that each gets a gradient, even if it is 0."""
        if self.extra is None or not self.training:
            return output
        return output + 0 * sum(p.float().sum() for p in self.extra.parameters())

    def no_weight_decay(self) -> set[str]:
        """Names of the inner model's parameters without weight decay, for timm's optimizer factory."""
        names = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else ()
        return {f'model.{name}' for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer groups of the inner model, for timm's optimizer factory; the method's own layers join the last."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: last if name.startswith('extra.') else layers[name.removeprefix('model.')]
