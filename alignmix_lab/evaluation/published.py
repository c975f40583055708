"""The figures of the two papers, and what their settings were, to stand beside measured ones.

`published.csv` holds every figure of the tables of [A] AlignMixup, arXiv 2103.15375 (CVPR 2022), and [M] MultiMix,
arXiv 2311.05538 (NeurIPS 2023), as printed, one a line: paper, table, dataset, network, metric, method, value. Rows of
other methods are those papers' figures for them.
"""
import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name('published.csv')
PAPERS = {'A': 'AlignMixup (arXiv 2103.15375)', 'M': 'MultiMix (arXiv 2311.05538)'}
# Methods of list_mixes() by the papers' names.
METHODS = {
    'none': 'baseline',
    'mixup': 'input mixup',
    'cutmix': 'CutMix',
    'manifold': 'manifold mixup',
    'alignmix': 'AlignMixup',
    'alignmix_ae': 'AlignMixup/AE',
    'multimix': 'MultiMix',
    'densemultimix': 'Dense MultiMix',
}
# Networks by timm's name, without the tag of the weights.
NETWORKS = {
    'preactresnet18': 'PreActResNet-18',
    'wrn16_8': 'WRN-16-8',
    'resnet18': 'ResNet-18',
    'resnet50': 'ResNet-50',
    'vit_small_patch16_224': 'ViT-S/16',
    'levit_128s': 'LeViT-128S',
    'vgg16_gap': 'VGG-GAP',
    'ssd resnet50': 'SSD ResNet-50',
    'fasterrcnn resnet50': 'Faster R-CNN ResNet-50',
}
# Data by the last part of timm's data set name. A folder may be called anything, so that only these are recognised.
DATASETS = {
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'imagenet': 'ImageNet',
    'imagenet-1k': 'ImageNet',
    'in1k': 'ImageNet',
    'digits': 'digits of scikit-learn',
}
# Epochs of the trainings, by start of the data set's name; [M] does not print its own for CIFAR and TinyImageNet, where
# it sets its figures beside those of [A].
EPOCHS = {
    'CIFAR-100 300 epochs': 300,
    'CIFAR': 2000,
    'TinyImageNet': 1200,
    'ImageNet 100 epochs': 100,
    'ImageNet': 300,
    'CUB-200-2011': 600,
}


@dataclass(frozen=True)
class Figure:
    """One published figure."""
    paper: str
    table: str
    dataset: str
    network: str
    metric: str
    method: str
    value: float

    @property
    def setting(self) -> tuple[str, str, str, str]:
        """Paper, table, data and network."""
        return self.paper, self.table, self.dataset, self.network

    @property
    def epochs(self) -> int | None:
        """Epochs of the training, None where they are not known."""
        return next((epochs for start, epochs in EPOCHS.items() if self.dataset.startswith(start)), None)


@cache
def figures() -> tuple[Figure, ...]:
    """All published figures, in the order of the file."""
    with SOURCE.open(encoding='utf-8', newline='') as file:
        return tuple(Figure(**{**row, 'value': float(row['value'])}) for row in csv.DictReader(file))


def find(
        metrics: Iterable[str] | None = None,
        paper: str | None = None,
        table: str | None = None,
        methods: Iterable[str] | None = None,
) -> list[Figure]:
    """Published figures of some metrics, of a paper, of a table and of some methods; None takes all of them."""
    metrics, methods = (None if names is None else set(names) for names in (metrics, methods))
    return [
        figure for figure in figures()
        if (metrics is None or figure.metric in metrics)
        and (paper is None or figure.paper == paper)
        and (table is None or figure.table == table)
        and (methods is None or figure.method in methods)
    ]


def dataset_name(name: str) -> str:
    """The papers' name of a data set, or the name as it is where it is none of theirs."""
    return DATASETS.get(name.rstrip('/').rsplit('/', 1)[-1].lower(), name)


def data_name(dataset: str, data_dir: str) -> str:
    """The papers' name of a run's data: of a data set, else the last part of a folder, else the built-in sample's."""
    if dataset or not data_dir:
        return dataset_name(dataset or 'digits')
    return Path(data_dir).name


def network_name(arch: str) -> str:
    """The papers' name of a network, or timm's where it is none of theirs."""
    return NETWORKS.get(arch.partition('.')[0], arch)


def differences(figure: Figure, dataset: str, network: str, epochs: int | None) -> dict[str, str]:
    """What a measurement differs in from the published setting; empty where nothing is known to differ.

    Args:
        figure: The published one.
        dataset: Data of the measurement, by :func:`dataset_name`.
        network: Its network, by :func:`network_name`.
        epochs: Epochs of its training, None where they are not known.

    Returns:
        For 'data', 'network' and 'epochs', as far as they differ, both sides in words.
    """
    found = {}
    data = re.sub(r' \d+ epochs$', '', figure.dataset.partition(' vs ')[0])
    if dataset != data:
        found['data'] = f'{dataset}, not {data}'
    if network != figure.network:
        found['network'] = f'{network}, not {figure.network}'
    if figure.epochs is not None and epochs != figure.epochs:
        found['epochs'] = f'{"unknown" if epochs is None else epochs}, not {figure.epochs}'
    return found
