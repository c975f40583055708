"""Several methods in one run: each step is a step of one of them, as timm.data.Mixup does with mixup and CutMix."""
import inspect
from collections.abc import Sequence

import torch
import torch.nn as nn

from ..anatomy import Anatomy, FeatureLayer
from ..step_random import StepRandom
from .base import Draw, Mix, draw_mode


class MixChoice(Mix):
    """One of several methods, drawn at each step; made by :func:`create_mix` of a mapping.

    The choice is the same on all ranks. It takes no number of the generators of a rank, so a step draws what the method
    alone would draw there, but for the mode of methods that have several.

    Args:
        mixes: Methods by name, in the order in which they are drawn from.
        chances: Probability of each; they sum to 1.
    """

    def __init__(self, mixes: dict[str, Mix], chances: dict[str, float]) -> None:
        super().__init__()
        self.mixes, self.chances = mixes, chances
        self.name = '+'.join(mixes)
        self.closed_form = any(mix.closed_form for mix in mixes.values())
        self.pairs = all(mix.pairs for mix in mixes.values())
        self.clean_pass = next((mix.clean_pass for mix in mixes.values() if mix.clean_pass), None)
        self.options = {f'{name}.{key}': value for name, mix in mixes.items() for key, value in mix.options.items()}

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{self.chances[k]:g} * {mix!r}" for k, mix in self.mixes.items())})'

    def signature(self) -> dict[str, inspect.Parameter]:
        return {f'{name}.{key}': p for name, mix in self.mixes.items() for key, p in mix.signature().items()}

    @property
    def binds(self) -> bool:
        return any(mix.binds for mix in self.mixes.values())

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().set_normalization(mean, std)
        for mix in self.mixes.values():
            mix.set_normalization(mean, std)

    def bind(self, anatomy: Anatomy) -> None:
        for mix in self.mixes.values():
            if mix.binds:
                mix.bind(anatomy)
                self.layers.update(mix.layers)
                self.watched.update(mix.watched)
        extras = [mix.extra for mix in self.mixes.values() if mix.extra is not None]
        self.extra = nn.ModuleList(extras) if len(extras) > 1 else next(iter(extras), None)

    @property
    def tapped(self) -> list[str]:
        return list(dict.fromkeys(name for mix in self.mixes.values() for name in mix.tapped))

    @property
    def modes(self) -> dict[str, float]:
        return {
            self._named(name, mode): self.chances[name] * p
            for name, mix in self.mixes.items() for mode, p in mix.modes.items()}

    def mode_name(self, draw: Draw) -> str:
        return self._named(draw['method'], self.mixes[draw['method']].mode_name(draw))

    def _named(self, method: str, mode: str) -> str:
        if len(self.mixes[method].modes) > 1:
            return f'{method}/{mode}'
        return 'clean' if method == 'none' else method

    def remark(self, batch: int, num_classes: int) -> str:
        return '. '.join(filter(None, (mix.remark(batch, num_classes) for mix in self.mixes.values())))

    def draw(self, images: torch.Tensor, rng: StepRandom) -> Draw:
        method = draw_mode(self.chances, rng)
        return dict(method=method, **self.mixes[method].draw(images, rng))

    def complete(self, images: torch.Tensor, draw: Draw, seen: torch.Tensor | None, target: torch.Tensor) -> Draw:
        method = draw['method']
        return dict(self.mixes[method].complete(images, draw, seen, target), method=method)

    def images(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.mixes[draw['method']].images(images, draw)

    def features(self, x: torch.Tensor, layer: FeatureLayer, draw: Draw) -> torch.Tensor:
        # Another method may only look at a layer whose output this one would replace.
        mix = self.mixes[draw['method']]
        return mix.features(x, mix.layers[layer.name], draw) if layer.name in mix.layers else x

    def output(self, output: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.mixes[draw['method']].output(output, draw)

    def lam(self, record: torch.Tensor | None, draw: Draw) -> torch.Tensor | None:
        return self.mixes[draw['method']].lam(record, draw)

    def target(self, target_BC: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.mixes[draw['method']].target(target_BC, draw)

    def mass(self, output: torch.Tensor, target: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.mixes[draw['method']].mass(output, target, draw)

    def loss(self, output, feature_map, target, draw, *args):
        return self.mixes[draw['method']].loss(output, feature_map, target, draw, *args)

    def rows(self, output, feature_map, target, draw, *args):
        return self.mixes[draw['method']].rows(output, feature_map, target, draw, *args)

    def num_rows(self, batch: int, draw: Draw) -> int:
        return self.mixes[draw['method']].num_rows(batch, draw)
