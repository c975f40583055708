"""Embedding space: alignment within classes, uniformity over all images, and a 2-D map.

Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
ICML 2020, arXiv 2005.10242, as section 4.4 of the MultiMix paper (arXiv 2311.05538) and section 4.3 of the AlignMixup
paper (arXiv 2103.15375) use them.

Shape suffixes: N images, D channels.
"""
import logging
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import MARKERS, panels
from timm_alignmix.anatomy import Anatomy

from ..base import register_protocol
from ..context import Evaluation
from ..data import Batch
from ..models import EvalModel
from ..predictions import check_finite
from ..result import Column, Result

_logger = logging.getLogger(__name__)

CHUNK = 2048  # rows of the distance matrix at a time
NO_UMAP = 'No 2-D map: umap-learn is not installed (pip install umap-learn).'


class ClassifierInput:
    """Context manager that records the embedding: the input of a model's linear classifier.

    For a model with two averaged classifiers (distilled ones), the embedding is the concatenation of both inputs.

    Raises:
        ValueError: The logits are not an affine function of an embedding.
    """

    def __init__(self, network: nn.Module, img_size: tuple[int, int]) -> None:
        heads = Anatomy(network, img_size).linear_heads()
        self._modules = [network.get_submodule(head.name) for head in heads]
        self._kept: dict[nn.Module, torch.Tensor] = {}

    def __enter__(self) -> 'ClassifierInput':
        self._handles = [module.register_forward_pre_hook(self._keep) for module in self._modules]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._kept[module] = inputs[0].flatten(1).float()

    def take(self) -> torch.Tensor:
        """Return the embeddings (N, D) float32 of the last forward pass."""
        return torch.cat([self._kept.pop(module) for module in self._modules], dim=1)


def embed(ev: Evaluation, model: EvalModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the embeddings of all images, on every process and its device.

    Returns:
        embed_ND float32 and labels (N,) int64, in dataset order.

    Raises:
        ValueError: Some embeddings are not finite.
    """
    def run(batch: Batch) -> dict[str, torch.Tensor]:
        model.network(batch.images)
        return {'embed': tap.take(), 'label': batch.labels}

    loader = ev.loader(model)
    with ClassifierInput(model.network.network, model.data_config['input_size'][1:]) as tap:
        found = ev.measure(f'embed {model.label}', loader, len(loader), run)
    embed_ND, labels = (torch.from_numpy(found[name]).to(ev.device) for name in ('embed', 'label'))
    check_finite(embed_ND, model.label)
    return embed_ND, labels


def squared_distances(a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (N, M); pass float64, because float32 is inaccurate for close neighbours."""
    dot_NM = a_ND @ b_MD.T
    return (a_ND.square().sum(1)[:, None] + b_MD.square().sum(1) - 2 * dot_NM).clamp(min=0)


def alignment(embed_ND: torch.Tensor, labels: torch.Tensor, power: float = 1.0, normalize: bool = True) -> float:
    """Mean of distance ** power over all pairs of images of the same class.

    A power of 1 gives the mean distance, 2 the mean squared distance (Wang and Isola's default).

    Raises:
        ValueError: No class has two images.
    """
    embed_ND = _prepare(embed_ND, normalize)
    total = pairs = 0.0
    for label in labels.unique():
        mine_ND = embed_ND[labels == label]
        count = len(mine_ND)
        pairs += count * (count - 1) / 2
        for start in range(0, count, CHUNK):
            rows_ND = mine_ND[start:start + CHUNK]
            distance_NM = squared_distances(rows_ND, mine_ND[start:]) ** (power / 2)
            total += distance_NM.triu(diagonal=1).sum().item()
    if not pairs:
        raise ValueError(
            f'no class has two images among {len(labels)}, so there are no distances within a class; evaluate more '
            'images')
    return total / pairs


def uniformity(embed_ND: torch.Tensor, t: float = 2.0, normalize: bool = True) -> float:
    """Logarithm of the mean Gaussian kernel exp(-t * squared distance) over all pairs of images.

    Raises:
        ValueError: Fewer than two images.
    """
    count = len(embed_ND)
    if count < 2:
        raise ValueError(f'uniformity needs two images, got {count}')
    embed_ND = _prepare(embed_ND, normalize)
    logs = []
    for start in range(0, count, CHUNK):
        exponent_NM = -t * squared_distances(embed_ND[start:start + CHUNK], embed_ND[start:])
        upper = torch.ones_like(exponent_NM, dtype=torch.bool).triu(diagonal=1)
        logs.append(exponent_NM[upper].logsumexp(0))
    # In the log domain: without normalisation, the kernel of distant embeddings underflows.
    return torch.stack(logs).logsumexp(0).item() - float(np.log(count * (count - 1) / 2))


def _prepare(embed_ND: torch.Tensor, normalize: bool) -> torch.Tensor:
    embed_ND = embed_ND.double()
    return F.normalize(embed_ND, dim=1) if normalize else embed_ND


@dataclass
class EmbeddingOptions(Options):
    """Options of the embedding protocol."""
    embedding_normalize: bool = config_option(
        'Embedding', True, 'scale embeddings to length 1; --no-embedding-normalize keeps their length', bool)
    embedding_power: float = config_option(
        'Embedding', 1.0, 'alignment is the mean of distance ** POWER', float, low=0)
    embedding_t: float = config_option('Embedding', 2.0, 'uniformity uses the kernel exp(-T * distance ** 2)', float)
    umap: bool = config_option('Embedding', True, '2-D map of each model (needs umap-learn)', bool)
    umap_images: int = config_option('Embedding', 2000, 'images on the map, the same for all models', int, low=16)
    umap_classes: int = config_option(
        'Embedding', 10, 'number of classes on the map, the first ones in the data', int, low=1)


@register_protocol('embedding', EmbeddingOptions)
def embedding(ev: Evaluation) -> Result:
    """Alignment and uniformity of the embeddings before the classifier, and a 2-D UMAP of each model."""
    config = ev.config
    rows, found = [], {}
    for model in ev.models:
        embed_ND, labels = embed(ev, model)
        rows.append({
            'model': model.label,
            'alignment': alignment(embed_ND, labels, config.embedding_power, config.embedding_normalize),
            'uniformity': uniformity(embed_ND, config.embedding_t, config.embedding_normalize),
            'squared_norm': embed_ND.double().square().sum(1).mean().item(),
            'dimensions': embed_ND.shape[1],
            'images': len(labels),
        })
        found[model.label] = embed_ND.cpu().numpy(), labels.cpu().numpy()
    length = 'embeddings of length 1' if config.embedding_normalize else 'unnormalised embeddings'
    notes = [
        f'Alignment: mean of distance ** {config.embedding_power:g} over all pairs of images of the same class. '
        f'Uniformity: log of the mean of exp(-{config.embedding_t:g} * distance ** 2) over all pairs. Both use '
        f'{length}; lower is better. Embedding: input of the linear classifier.',
        'At length 1, distances are at most 2, and uniformity with t = 2 hardly falls below -4. The MultiMix paper '
        'reports alignments up to 3.02 and uniformities down to -5.68 (CIFAR-100), which this definition cannot reach; '
        'it does not state its scale, so the figures are not comparable.',
        'Squared norm: mean over images, before normalisation.',
    ]
    fig = draw_maps(ev, found) if config.umap and ev.is_main else None
    if config.umap and ev.is_main and fig is None:
        _logger.warning(NO_UMAP)
        notes.append(NO_UMAP)
    return Result(
        columns={
            'alignment': Column('alignment', '.4f', 'lower'),
            'uniformity': Column('uniformity', '.4f', 'lower'),
            'squared_norm': Column('squared norm', '.3g'),
            'dimensions': Column('dimensions', 'd'),
            'images': Column('images', 'd'),
        },
        rows=rows,
        notes=notes,
        figures={'': fig} if fig else {},
    )


def draw_maps(ev: Evaluation, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure | None:
    """Draw UMAPs of the same images for all models; None if umap-learn is not installed."""
    try:
        import umap
    except ImportError:
        return None

    labels = next(iter(found.values()))[1]
    shown = choose(labels, ev.config.umap_classes, ev.config.umap_images, ev.config.seed)
    classes = np.unique(labels[shown])
    names = ev.loader(ev.models[0]).class_names or ev.models[0].class_names
    metric = 'cosine' if ev.config.embedding_normalize else 'euclidean'
    fig, axes = panels(
        len(found), size=(3.4, 3.3), title=f'UMAP of {len(shown)} images ({metric} distance, seed {ev.config.seed})')
    for ax, (label, (embed_ND, _)) in zip(axes, found.items(), strict=True):
        with ev.progress(f'umap {label}', 1):
            places = umap.UMAP(random_state=ev.config.seed, metric=metric, n_jobs=1).fit_transform(embed_ND[shown])
        palette = matplotlib.colormaps['tab10' if len(classes) <= 10 else 'tab20']
        for i, which in enumerate(classes):
            mine = places[labels[shown] == which]
            ax.scatter(
                *mine.T, s=9, alpha=0.7, linewidths=0, color=palette(i % palette.N),
                marker=MARKERS[i // palette.N % len(MARKERS)],
                label=str(names[which]) if names else f'class {which}')
        ax.set(title=label, xticks=[], yticks=[])
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=5, markerscale=2, frameon=False)
    return fig


def choose(labels: np.ndarray, num_classes: int, num_images: int, seed: int) -> np.ndarray:
    """Choose at most `num_images` random images of the first `num_classes` classes; returns their positions."""
    places = np.flatnonzero(np.isin(labels, np.unique(labels)[:num_classes]))
    if len(places) > num_images:
        places = np.sort(np.random.default_rng(seed).choice(places, num_images, replace=False))
    return places
