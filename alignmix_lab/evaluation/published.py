"""The figures of the two papers, their settings, and their names for what we measure.

`published.csv` holds every figure of the tables of [A] AlignMixup, arXiv 2103.15375 (CVPR 2022), and [M] MultiMix,
arXiv 2311.05538 (NeurIPS 2023), as printed, one a line: paper, table, dataset, network, metric, method, value. Rows of
other methods are those papers' figures for them.
"""
import csv
import re
from collections.abc import Container
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from timm_alignmix import create_mix

from .result import plain

SOURCE = Path(__file__).with_name('published.csv')
PAPERS = {'A': 'AlignMixup (arXiv 2103.15375)', 'M': 'MultiMix (arXiv 2311.05538)'}
# Methods of list_mixes() by the papers' names.
METHODS = {
    'none': 'baseline',
    'mixup': 'input mixup',
    'cutmix': 'CutMix',
    'saliencymix': 'SaliencyMix',
    'puzzlemix': 'PuzzleMix',
    'comixup': 'Co-Mixup',
    'zeta': 'ζ-Mixup',
    'transmix': 'TransMix',
    'tokenmix': 'TokenMix',
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
# Data sets by the letters and digits of the last part of timm's name or of a folder. A folder may be called anything:
# only these are recognised.
SAMPLE = 'digits of scikit-learn'
DATASETS = {
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'tinyimagenet': 'TinyImageNet',
    'tinyimagenet200': 'TinyImageNet',
    'imagenet': 'ImageNet',
    'imagenet1k': 'ImageNet',
    'in1k': 'ImageNet',
    'ilsvrc2012': 'ImageNet',
    'cub2002011': 'CUB-200-2011',
    'coco': 'COCO',
    'digits': SAMPLE,
    'digitsofscikitlearn': SAMPLE,
    'digitsimagesv1': SAMPLE,  # the folders that it is written to
    'digitsffcvv1': SAMPLE,
}
# Data of detectors by training split.
DETECTION_DATA = {'2007_trainval+2012_trainval': 'VOC07+12', 'train2017': 'COCO'}
# OOD sets by our names of noise and those of the folders that ODIN's authors published, in lower case.
OOD_SETS = {
    'uniform noise': 'uniform noise',
    'gaussian noise': 'Gaussian noise',
    'lsun': 'LSUN (crop)',
    'lsun_resize': 'LSUN (resize)',
    'isun': 'iSUN',
    'tinyimagenet_crop': 'TinyImageNet (crop)',
    'imagenet_resize': 'TinyImageNet (resize)',
}
# Epochs of training, by start of the data set's name; [M] does not print its own for CIFAR and TinyImageNet, where
# it sets its figures beside those of [A].
EPOCHS = {
    'CIFAR-100 300 epochs': 300, 'CIFAR': 2000, 'TinyImageNet': 1200, 'ImageNet 100 epochs': 100, 'ImageNet': 300,
    'CUB-200-2011': 600}
SETTING = ('data', 'network', 'epochs')


class Measure(NamedTuple):
    """A quantity that the papers report too."""
    protocol: str
    key: str  # its column, of runs without eval_
    title: str
    metrics: tuple[str, ...]  # their names for it
    data: str = ''  # start of the names of the data sets on which the metric means this
    scale: float = 1  # from our unit to theirs
    depends: tuple[str, ...] = SETTING  # what must be the same; anything beyond SETTING never is, as far as one knows


EMBEDDING = (*SETTING, 'scale of the embeddings (not stated)')
SPEED = ('network', 'hardware')
TOP1_ERROR = 'top-1 error %'
MEASURES = (
    Measure('accuracy', 'top1', 'top-1 accuracy (%)', ('top-1 accuracy %', TOP1_ERROR)),
    Measure('robustness', 'fgsm_8', 'FGSM 8/255 error (%)', ('FGSM 8/255 top-1 error %',)),
    Measure('robustness', 'pgd_4', 'PGD 4/255 error (%)', ('PGD 4/255 top-1 error %',)),
    Measure('calibration', 'ece', 'ECE (%)', ('ECE %',)),
    Measure('calibration', 'oe', 'OE (%)', ('OE %',)),
    Measure('ood', 'accuracy', 'detection accuracy (%)', ('detection accuracy %',)),
    Measure('ood', 'auroc', 'AUROC (%)', ('AUROC %',)),
    Measure('ood', 'aupr_in', 'AUPR, ID positive (%)', ('AUPR (ID) %',)),
    Measure('ood', 'aupr_out', 'AUPR, OOD positive (%)', ('AUPR (OOD) %',)),
    Measure('localization', 'top1_loc', 'Top-1 Loc (%)', ('Top-1 localization %',)),
    Measure('localization', 'maxboxacc_v2', 'MaxBoxAccV2 (%)', ('MaxBoxAccV2 %',)),
    Measure('embedding', 'alignment', 'alignment', ('alignment',), depends=EMBEDDING),
    Measure('embedding', 'uniformity', 'uniformity', ('uniformity',), depends=EMBEDDING),
    Measure('intrusion', 'intrusion', 'intrusion distance', ('intrusion distance',), depends=EMBEDDING),
    Measure('cost', 'ms', 'ms per step', ('ms per batch, RTX 2080 Ti',), depends=SPEED),
    Measure('cost', 'images_s', '1000 images/s', ('1000 images/s, V100',), scale=1e-3, depends=SPEED),
    Measure('detection', 'voc07_11pt', 'mAP, VOC07 11-point (%)', ('mAP %',), data='VOC'),
    Measure('detection', 'map', 'mAP, COCO (%)', ('mAP %',), data='COCO'),
)


class Figure(NamedTuple):
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
    def where(self) -> str:
        """Where it stands, for comparisons."""
        remark = self.metric.partition(', ')[2]
        place = f'{PAPERS[self.paper].partition(" (")[0]}, {self.table}: {self.dataset}, {self.network}'
        return place + (f' ({remark})' if remark else '')

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
        metrics: Container[str] | None = None, paper: str | None = None, table: str | None = None,
        methods: Container[str] | None = None) -> list[Figure]:
    """Published figures of some metrics, of a paper, of a table and of some methods; None takes all of them."""
    return [
        figure for figure in figures()
        if (metrics is None or figure.metric in metrics)
        and (paper is None or figure.paper == paper)
        and (table is None or figure.table == table)
        and (methods is None or figure.method in methods)
    ]


def find_measure(measure: Measure, ood: str, methods: Container[str]) -> list[Figure]:
    """Published figures of a quantity, against an OOD set if there is one; top-1 errors as accuracies."""
    return [
        figure._replace(metric='top-1 accuracy %, 100 - error', value=round(100 - figure.value, 10))
        if figure.metric == TOP1_ERROR else figure
        for figure in find(measure.metrics, methods=methods)
        if figure.dataset.startswith(measure.data) and (not ood or figure.dataset.endswith(f' vs {ood}'))
    ]


def dataset_name(name: str | None) -> str:
    """The papers' name of a data set, from timm's name of it or its folder; of others the last part of theirs.

    Nothing is the built-in sample, as it is for training.
    """
    last = (name or 'digits').rstrip('/').rpartition('/')[2]
    return DATASETS.get(re.sub('[^a-z0-9]', '', last.lower()), last)


def data_name(dataset: str, data_dir: str) -> str:
    """The papers' name of a run's data: of a data set, else the last part of a folder, else the built-in sample's."""
    if dataset or not data_dir:
        return dataset_name(dataset or 'digits')
    return Path(data_dir).name


def network_name(arch: str) -> str:
    """The papers' name of a network, or timm's where it is none of theirs."""
    return NETWORKS.get(arch.partition('.')[0], arch)


def method_name(
        mix: str | dict[str, float], options: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> str:
    """The papers' name of a method, or of several with their weights, and the options that are not their defaults.

    `run` has the options of a training run, of which two say when it mixes.
    """
    try:
        defaults = {key: plain(p.default) for key, p in create_mix(mix).signature().items()}
    except ValueError:  # a method of somebody else's
        defaults = {}
    options = plain(options or {})
    own = [f'{key}={value}' for key, value in options.items() if key not in defaults or value != defaults[key]]
    own += [f'{key}={run[key]}' for key, usual in (('mix_prob', 1), ('mix_off_epoch', 0))
            if run and run.get(key, usual) != usual]
    if isinstance(mix, dict):
        name = ' + '.join(f'{weight:g} {METHODS.get(method, method)}' for method, weight in mix.items())
    else:
        name = METHODS.get(mix, mix)
    return name + (f' ({", ".join(own)})' if own else '')


def backbone_method(weights: str | None) -> str:
    """The method that a detector's backbone was trained with, as far as the name of its weights tells."""
    if not weights:
        return 'random weights'
    names = '|'.join(sorted(METHODS, key=len, reverse=True))  # alignmix_ae before alignmix
    found = re.findall(rf'(?<![a-z0-9])({names})(?![a-z0-9])', weights.lower())
    return METHODS[found[-1]] if found else '/'.join(weights.rstrip('/').split('/')[-2:])


def method_order(name: str) -> tuple[int, str]:
    """Sorts names of methods as the papers do, others behind them."""
    known, method = list(METHODS.values()), name.partition(' (')[0]
    return known.index(method) if method in known else len(known), name


def differences(figure: Figure, dataset: str, network: str, epochs: int | None) -> dict[str, str]:
    """Return which of 'data', 'network' and 'epochs' differ from the published setting; both sides in words.

    The names are those of :func:`dataset_name` and :func:`network_name`; epochs are None where they are not known.
    """
    data = re.sub(r' \d+ epochs$', '', figure.dataset.partition(' vs ')[0])
    ours, theirs = (dataset, network, epochs or 'unknown'), (data, figure.network, figure.epochs or epochs or 'unknown')
    return {what: f'{a}, not {b}' for what, a, b in zip(SETTING, ours, theirs, strict=True) if a != b}
