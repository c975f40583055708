"""Manifold intrusion: distance of mixed embeddings to clean embeddings of classes that were not mixed.

The term is from Guo et al., "MixUp as Locally Linear Out-Of-Manifold Regularization", AAAI 2019, arXiv 1809.02499. The
distance is that of the MultiMix paper, arXiv 2311.05538, but searched over the training set instead of a batch.

Shape suffixes: B batch, M mixed embeddings, N clean embeddings of the bank, D channels, R positions.
"""
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import color, panels
from timm_alignmix import create_mix, list_mixes
from timm_alignmix.anatomy import DenseHead
from timm_alignmix.functional import attention_map, dense_multimix_rows
from timm_alignmix.mix_module import MixModule
from timm_alignmix.mixes.base import Draw, weighed
from timm_alignmix.step_random import StepRandom

from ..base import register_protocol
from ..context import Evaluation
from ..data import Batch
from ..models import EvalModel
from ..result import Column, Result
from .cost import modes_in_proportion
from .embedding import ClassifierInput, squared_distances

_logger = logging.getLogger(__name__)

CLEAN = 'none'
DENSE = 'densemultimix'
CLEAN_MODE = 'clean'
CHUNK = 8192  # embeddings of the bank that are compared at a time


@dataclass(frozen=True)
class Bank:
    """Clean embeddings to search, and their classes (N,)."""
    embed_ND: torch.Tensor
    labels: torch.Tensor

    @property
    def squared_norm(self) -> float:
        """Mean over embeddings: the scale for squared distances."""
        return self.embed_ND.double().square().sum(1).mean().item()


@dataclass(frozen=True)
class Intrusion:
    """Distances for one mix."""
    distance: float | None  # mean over the mixed embeddings; None if one of them contains every class of the bank
    undefined: float  # share of mixed embeddings that contain every class
    count: int  # mixed embeddings


def nearest_other_class(embed_MD: torch.Tensor, mixed_MC: torch.Tensor, bank: Bank) -> torch.Tensor:
    """Squared distance of each mixed embedding to the nearest clean embedding of a class that was not mixed.

    `mixed_MC` is whether a class was mixed. The result is (M,) float64, inf if the bank has no other class.
    """
    nearest_M = embed_MD.new_full((len(embed_MD),), torch.inf, dtype=torch.float64)
    for bank_ND, labels in zip(bank.embed_ND.split(CHUNK), bank.labels.split(CHUNK), strict=True):
        distance_MN = squared_distances(embed_MD.double(), bank_ND.double())
        nearest_M = nearest_M.minimum(distance_MN.masked_fill(mixed_MC[:, labels], torch.inf).amin(dim=1))
    return nearest_M


def summarize(distance_M: torch.Tensor) -> Intrusion:
    """Average distances; undefined if some are infinite, because the mean of the rest would be of a biased subset."""
    defined = distance_M.isfinite()
    share = 1 - defined.double().mean().item()
    return Intrusion(distance_M.mean().item() if defined.all() else None, share, len(distance_M))


@torch.inference_mode()
def mix_embeddings(
        module: MixModule, tap: ClassifierInput, images: torch.Tensor, target: torch.Tensor,
        draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mixed embeddings of one step and the weights of the examples in them.

    The module is in evaluation mode, the images (B, C, H, W) are normalised, and the target is for attention by class.

    Returns:
        embed_MD and weights_MB >= 0. For dense mixing, M counts the positions of the generated examples.
    """
    mix = module.mix
    module.arm(draw)
    try:
        output = module.model(mix.images(images, draw))
    finally:
        feature_map = module.disarm()
    module.check_ran(draw, output, feature_map)
    draw = weighed(draw, mix.lam(feature_map, draw))
    embed_BD = tap.take()
    eye_BB = torch.eye(len(images), device=images.device)
    if draw['mode'] == 'dense':
        _, embed_BDR = mix.head(feature_map)
        attention_BR = attention_map(
            embed_BDR, mix.attention, mix.normalize, mix.head.weight() if mix.attention == 'cam' else None, target)
        embed_BRD = embed_BDR.transpose(1, 2).float()
        both_BRX = torch.cat([embed_BRD, eye_BB[:, None].expand(-1, embed_BRD.shape[1], -1)], dim=2)
        both_MX, share_MX = dense_multimix_rows(both_BRX, target, draw['weights'], attention_BR)
        both_MX = both_MX[share_MX.sum(1) > 0]  # positions without attention are not part of the loss
        return both_MX[:, :-len(images)], both_MX[:, -len(images):]
    weights_MB = mix.target(eye_BB, draw)
    if draw['mode'] not in ('input', CLEAN_MODE) and draw['layer'] not in mix.layers:
        embed_BD = weights_MB @ embed_BD  # not mixed inside the network: the method mixes the classifier's input
    return embed_BD, weights_MB


@dataclass
class IntrusionOptions(Options):
    """Options of the intrusion protocol."""
    intrusion_mixes: list[str] | None = config_option(
        'Intrusion', None, 'mixes to evaluate; default: all', nargs='+')
    intrusion_split: str = config_option('Intrusion', 'train', 'split of the clean embeddings and of the images to mix')
    intrusion_bank: int = config_option(
        'Intrusion', 50000, 'maximum number of clean embeddings, chosen at random', int, low=2)
    intrusion_batch: int = config_option('Intrusion', 128, 'images per batch to mix', int, low=2)
    intrusion_batches: int = config_option('Intrusion', 8, 'number of batches to mix, of different images', int, low=1)
    intrusion_normalize: bool = config_option(
        'Intrusion', False, 'scale clean and mixed embeddings to length 1', bool)


@register_protocol('intrusion', IntrusionOptions)
def intrusion(ev: Evaluation) -> Result:
    """Distance of mixed embeddings to the nearest clean embedding of a class that was not mixed, for every mix."""
    config = ev.config
    mixes = [CLEAN, *(name for name in config.intrusion_mixes or list_mixes() if name != CLEAN)]
    rows, details, reasons = [], {}, {}
    for model in ev.models:
        found, scales = _of_model(ev, model, mixes, reasons)
        rows.append({
            'model': model.label,
            'trained': model.training.get('mix'),
            'squared_norm': scales[CLEAN],
            'position_squared_norm': scales.get(DENSE),
            **{mix: 'undefined' if value.distance is None else value.distance for mix, value in found.items()},
        })
        details[model.label] = {
            mix: dict(vars(value), bank_squared_norm=scales[mix]) for mix, value in found.items()}
    length = 'have length 1' if config.intrusion_normalize else (
        'are not normalised: compare distances with the squared norm, the mean over the clean embeddings of the model')
    return Result(
        columns={
            'trained': Column('trained with'),
            'squared_norm': Column('squared norm', '.4g'),
            **({'position_squared_norm': Column('squared norm of positions', '.4g')} if DENSE in mixes else {}),
            **{mix: Column(mix, '.4g') for mix in mixes},
        },
        rows=rows,
        notes=[
            'Mean over mixed embeddings of the smallest squared distance to a clean embedding of a class that was not '
            f'mixed; larger means less intrusion. Embeddings {length}.',
            f'Clean: at most {config.intrusion_bank} embeddings of split {config.intrusion_split}, chosen at random. '
            f'Mixed: {config.intrusion_batches} batches of {config.intrusion_batch} images of the split, by every mix '
            'with its default options; the network is in evaluation mode.',
            'none: the clean images themselves. Methods that mix features: only their feature modes, as their input '
            'mode is input mixup. alignmix_ae: input of its plain classifier. densemultimix: embeddings of single '
            'positions, mixed and clean; compare with the squared norm of positions. regmixup: half of the embeddings '
            'are of clean images.',
            'undefined: some mixed embedding contains every class, so it cannot intrude on another one. multimix, '
            'densemultimix and zeta mix a whole batch: use a smaller --intrusion-batch if there are few classes.',
            *(f'{mix}: left out. {reason}' for mix, reason in reasons.items()),
        ],
        details={'mixes': details},
        figures={'': _draw(details, config.intrusion_normalize)},
    )


def _of_model(
        ev: Evaluation,
        model: EvalModel,
        mixes: list[str],
        reasons: dict[str, str],
) -> tuple[dict[str, Intrusion], dict[str, float]]:
    """Intrusion and squared norm of the bank for each mix that the model supports; adds to `reasons` for the others."""
    network, sides = model.network.network, model.data_config['input_size'][1:]
    modules = {}
    for name in mixes:
        try:
            modules[name] = MixModule(network, name, _options(name, ev.config.intrusion_batch), img_size=sides)
        except ValueError as e:
            reasons[name] = str(e)
            _logger.warning(f'intrusion of {name} is left out: {e}')
    tap = ClassifierInput(network, sides)
    head = modules[DENSE].mix.head if DENSE in modules else None
    try:
        with tap:
            pooled, dense, batches = collect(ev, model, tap, head)
            banks = {name: dense if name == DENSE else pooled for name in modules}
            found = {name: _of_mix(ev, model, modules[name], tap, banks[name], batches) for name in modules}
    finally:
        for module in modules.values():
            module.remove_hooks()
    return found, {name: bank.squared_norm for name, bank in banks.items()}


def _options(name: str, batch: int) -> dict[str, Any]:
    """Generate about as many examples as mixed pairs have; they are independent, so fewer do not change the mean."""
    return {'multimix': {'n': batch}, DENSE: {'n': max(batch // 16, 1)}}.get(create_mix(name).name, {})


def _of_mix(
        ev: Evaluation, model: EvalModel, module: MixModule, tap: ClassifierInput, bank: Bank,
        batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Intrusion:
    mix, random, distances = module.mix, StepRandom(ev.config.seed), []
    modes = {mode: p for mode, p in getattr(mix, 'probs', {}).items() if mode != CLEAN_MODE and p > 0}
    features = {mode: p for mode, p in modes.items() if mode != 'input'} or modes
    shares = {mode: p / sum(features.values()) for mode, p in features.items()}
    with ev.progress(f'intrusion {model.label} {mix.name}', len(batches)) as bar:
        for step, (mode, (pixels, labels)) in enumerate(
                zip(modes_in_proportion(shares, len(batches)), batches, strict=True)):
            if mode is not None:
                mix.probs = {mode: 1.0}
            images, labels = model.network.normalize(pixels.to(ev.device).float() / 255), labels.to(ev.device)
            draw = module.complete(images, labels, mix.draw(images, random.at(step, ev.device)))
            embed_MD, weights_MB = mix_embeddings(module, tap, images, labels, draw)
            if ev.config.intrusion_normalize:
                embed_MD = F.normalize(embed_MD, dim=1)
            mixed_MC = (weights_MB > 0).float() @ F.one_hot(labels, model.num_classes).float() > 0
            distances.append(nearest_other_class(embed_MD, mixed_MC, bank))
            bar.update()
    return summarize(torch.cat(distances))


class _Kept:
    """Values of selected images, collected batch by batch."""

    def __init__(self, wanted: np.ndarray) -> None:
        self._wanted = wanted
        self._parts: tuple[list[torch.Tensor], ...] = ([], [], [])

    def add(self, batch: Batch, values: torch.Tensor) -> None:
        """Keep the values of the selected images of a batch."""
        keep = torch.from_numpy(np.isin(batch.indices.numpy(), self._wanted))
        for part, value in zip(self._parts, (batch.indices, values, batch.labels), strict=True):
            part.append(value.cpu()[keep])

    def gather(self, ev: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gather sorted positions in the dataset, values and labels from all processes."""
        index, values, labels = self._parts
        found = ev.gather(index, values=values, labels=labels)
        return found['index'], found['values'], found['labels']


@torch.inference_mode()
def collect(
        ev: Evaluation,
        model: EvalModel,
        tap: ClassifierInput,
        head: DenseHead | None,
) -> tuple[Bank, Bank | None, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect banks of embeddings and (with a dense head) of positions, and batches of (uint8 images, labels) to mix.

    Raises:
        ValueError: The split has fewer images than a batch, or only one class.
    """
    config, loader = ev.config, ev.loader(model, ev.config.intrusion_split)
    count, batch = loader.num_samples, config.intrusion_batch
    if count < batch:
        raise ValueError(
            f'split {config.intrusion_split} has {count} images, fewer than a batch to mix; pass --intrusion-batch '
            f'{count} or less')
    random = np.random.default_rng(config.seed)
    order, mixed = random.permutation(count), random.permutation(count)
    mixed = mixed[:min(config.intrusion_batches, count // batch) * batch]
    pooled, pixels = _Kept(order[:config.intrusion_bank]), _Kept(mixed)
    positions = head.positions_at(torch.zeros(1, *model.data_config['input_size'], device=ev.device)) if head else 1
    dense = _Kept(order[:max(config.intrusion_bank // positions, 1)])
    maps: list[torch.Tensor] = []
    watched = model.network.network.get_submodule(head.name) if head else nn.Identity()
    handle = watched.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        with ev.progress(f'embed {model.label}', len(loader)) as bar:
            for item in loader:
                model.network(item.images)
                pooled.add(item, tap.take())
                pixels.add(item, (item.images * 255).round().byte())
                if head:
                    dense.add(item, head(maps.pop())[1].float())
                bar.update()
    finally:
        handle.remove()
    index, values, labels = pixels.gather(ev)
    places = np.searchsorted(index, mixed).reshape(-1, batch)  # in random order, not in dataset order
    batches = [(torch.from_numpy(values[p]), torch.from_numpy(labels[p])) for p in places]
    return make_bank(ev, pooled), make_bank(ev, dense) if head else None, batches


def make_bank(ev: Evaluation, kept: _Kept) -> Bank:
    """Make a bank from embeddings (N, D), or from positions (N, D, R), in float32 on the device."""
    _, values, labels = kept.gather(ev)
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f'split {ev.config.intrusion_split} shows only one class, so there is no other one to intrude on; '
            'pass another --intrusion-split')
    if values.ndim == 3:
        labels = np.repeat(labels, values.shape[2])
        values = values.transpose(0, 2, 1).reshape(len(labels), -1)
    embed_ND = torch.from_numpy(values).to(ev.device)
    if ev.config.intrusion_normalize:
        embed_ND = F.normalize(embed_ND, dim=1)
    return Bank(embed_ND, torch.from_numpy(labels).to(ev.device))


def _draw(details: dict[str, dict[str, dict[str, Any]]], normalized: bool) -> Figure:
    """Plot distances relative to the squared norm of the clean embeddings, a panel per model."""
    most = max(map(len, details.values()))
    fig, axes = panels(len(details), size=(3.6, 0.9 + 0.3 * most), sharex=True)
    for ax, (label, found) in zip(axes, details.items(), strict=True):
        relative = [(value['distance'] or 0) / value['bank_squared_norm'] for value in found.values()]
        drawn = ax.barh(range(len(found)), relative, height=0.7, color=[color(i) for i in range(len(found))])
        shown = [
            'undefined: contains every class' if value['distance'] is None else f'{share:.3f}'
            for value, share in zip(found.values(), relative, strict=True)]
        ax.bar_label(drawn, labels=shown, padding=3)
        ax.set_yticks(range(len(found)), found)
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.margins(x=0.28)
        ax.grid(visible=False, axis='y')
        ax.set_title(f'network {label}')
    fig.supxlabel(
        'squared distance to the nearest clean embedding of a class not mixed'
        + ('' if normalized else ', over the mean squared norm'), fontsize=9)
    return fig
