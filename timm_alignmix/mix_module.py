"""Model and mixing method as one module, in whose forward all trainable compute happens.

DDP, torch.compile and autocast act on a module's forward only, so the method's part of the network (dense heads, mixed
features, closed-form losses) must run there too.
"""
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.models import group_parameters

from .anatomy import Anatomy
from .mixes import Mix, create_mix
from .mixes.base import Draw
from .mixes.criterion import Criterion


def is_checkpointed(model: nn.Module, name: str) -> bool:
    """Check whether timm's gradient checkpointing, of the model or of a stage, runs a module again."""
    parents = name.split('.')[:-1]
    return any(
        getattr(model.get_submodule('.'.join(parents[:depth])), 'grad_checkpointing', False)
        for depth in range(len(parents) + 1))


class Tap:
    """Forward hook on a layer. When armed, it records the layer's output and lets the method replace it.

    A plain object, so that copies of the model (EMA) get idle taps of their own and a pickled model can be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.mix: Mix | None = None
        self.draw: Draw | None = None
        self.output: torch.Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if self.draw is None:
            return None
        self.output = output
        layer = self.mix.layers.get(self.name)
        return None if layer is None else self.mix.features(output, layer, self.draw)

    def arm(self, mix: Mix, draw: Draw) -> None:
        self.mix, self.draw = mix, draw

    def disarm(self) -> torch.Tensor | None:
        """Go idle and return the recorded output."""
        output = self.output
        self.mix = self.draw = self.output = None
        return output


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
        if self.mix.replaces_features and getattr(model, 'grad_checkpointing', False):
            raise ValueError(self._recomputed())
        cfg, (mean, std) = getattr(model, 'pretrained_cfg', None) or {}, self.mix.normalization
        self.mix.set_normalization(cfg.get('mean', mean), cfg.get('std', std))
        if self.mix.binds:
            self.mix.bind(Anatomy(model, img_size))
        if any(is_checkpointed(model, name) for name in self.mix.layers):
            raise ValueError(self._recomputed())
        # Before the model: timm's clipping takes the last two parameters for the classifier.
        self.extra = self.mix.extra
        self.model = model
        self.taps = {name: Tap(name) for name in self.mix.tapped}
        self._handles = [model.get_submodule(name).register_forward_hook(tap) for name, tap in self.taps.items()]

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and so end mixing."""
        for handle in self._handles:
            handle.remove()

    def arm(self, draw: Draw) -> None:
        """Make the next forward of the model the step that was drawn.

        Raises:
            RuntimeError: Gradient checkpointing would recompute the layer without the mix.
        """
        if draw['layer'] is not None:
            if draw['layer'] in self.mix.layers and is_checkpointed(self.model, draw['layer']):
                raise RuntimeError(self._recomputed())
            self.taps[draw['layer']].arm(self.mix, draw)

    def _recomputed(self) -> str:
        return (
            'gradient checkpointing would compute the layers again without the features that mix '
            f'{self.mix.name!r} replaces; turn it off, or use mix none, mixup, cutmix, multimix or densemultimix')

    def disarm(self, draw: Draw) -> torch.Tensor | None:
        """Return the model to its own forward; returns the tapped layer's output."""
        return None if draw['layer'] is None else self.taps[draw['layer']].disarm()

    def check_ran(self, draw: Draw, output: Any, feature_map: torch.Tensor | None) -> None:
        """Raise RuntimeError if the tapped layer was by-passed, or the output is not one tensor of logits."""
        if not isinstance(output, torch.Tensor):
            raise RuntimeError(
                f'the model returned a {type(output).__name__} in training, and one tensor of logits is needed; call '
                'model.set_distilled_training(False), or turn its auxiliary outputs off')
        if draw['layer'] is not None and feature_map is None:
            raise RuntimeError(
                f'module {draw["layer"]!r} was not called in this forward pass, so nothing was mixed; gradient '
                'checkpointing calls the blocks of a stage one by one: turn it off for this mix')

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
            The model's output; with a draw, a dict of 'output' and, if the method computes it, 'loss'.
        """
        if draw is None:
            return self._reaching_extra(self.model(images))
        self.arm(draw)
        try:
            output = self.model(images)
        finally:
            feature_map = self.disarm(draw)
        self.check_ran(draw, output, feature_map)
        output = self._reaching_extra(self.mix.output(output, draw))
        loss = self.mix.loss(output, feature_map, target, draw, criterion)
        return dict(output=output) if loss is None else dict(output=output, loss=loss)

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
