"""Measured figures beside the published ones, with what differs between the two."""
import inspect
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from timm_alignmix import create_mix

from .. import published
from .sources import EvaluationResult, TrainingRun

# The papers' names of OOD sets, by ours, and by those of the folders that ODIN's authors published.
OOD_SETS = {
    'uniform': 'uniform noise',
    'gaussian': 'Gaussian noise',
    'lsun': 'LSUN (crop)',
    'lsun_resize': 'LSUN (resize)',
    'isun': 'iSUN',
    'tinyimagenet_crop': 'TinyImageNet (crop)',
    'imagenet_resize': 'TinyImageNet (resize)',
}


@dataclass(frozen=True)
class Measure:
    """A quantity of a protocol that the papers have too.

    Attributes:
        protocol: Name of the protocol.
        key: Its column.
        title: Its name in comparisons.
        metrics: The published metrics.
        ours: Our value in the unit of the comparison.
        theirs: A published value in that unit, from its metric and value.
        data: Start of the name of the data that the published metric means this on.
        left_open: What the paper does not state and the figure depends on.
    """
    protocol: str
    key: str
    title: str
    metrics: tuple[str, ...]
    ours: Callable[[float], float] = float
    theirs: Callable[[str, float], float] = lambda metric, value: value
    data: str = ''
    left_open: str = ''


def _accuracy(metric: str, value: float) -> float:
    return round(100 - value, 10) if 'error' in metric else value


MEASURES = (
    Measure('accuracy', 'top1', 'top-1 accuracy (%)', ('top-1 accuracy %', 'top-1 error %'), theirs=_accuracy),
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
    Measure('embedding', 'alignment', 'alignment', ('alignment',), left_open='scale of the embeddings'),
    Measure('embedding', 'uniformity', 'uniformity', ('uniformity',), left_open='scale of the embeddings'),
    Measure('intrusion', 'intrusion', 'intrusion distance', ('intrusion distance',),
            left_open='scale of the embeddings'),
    Measure('cost', 'ms', 'ms per step', ('ms per batch, RTX 2080 Ti',)),
    Measure('cost', 'images_s', '1000 images/s', ('1000 images/s, V100',), ours=lambda value: value / 1000),
    Measure('detection', 'eval_voc07_11pt', 'mAP, VOC07 11-point (%)', ('mAP %',), data='VOC'),
    Measure('detection', 'eval_map', 'mAP, COCO (%)', ('mAP %',), data='COCO'),
)


@dataclass(frozen=True)
class Value:
    """One measured figure and the setting it belongs to.

    Attributes:
        measure: What was measured.
        method: The papers' name of the method, with the options that are not its defaults.
        value: The figure.
        dataset, network, epochs: The training.
        which: Which weights of it, such as 'last epoch'.
        ood: The papers' name of the OOD set.
    """
    measure: Measure
    method: str
    value: float
    dataset: str
    network: str
    epochs: int | None
    which: str = ''
    ood: str = ''

    @property
    def setting(self) -> tuple[str, str, int | None]:
        return self.dataset, self.network, self.epochs


@dataclass(frozen=True)
class Row:
    """A line of a comparison: figures of one setting.

    Attributes:
        quantity: What was measured.
        setting: Where: ours or the paper's, table, data and network.
        values: By method; None where there is none.
        ours: Whether it was measured here.
        differs: What the two settings differ in, as `published.differences` says it; empty in our own lines.
    """
    quantity: str
    setting: str
    values: list[float | None]
    ours: bool
    differs: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """Figures of one setting beside the published ones."""
    title: str
    methods: list[str]
    rows: list[Row]

    @property
    def reproduces(self) -> bool:
        """Whether a published line has the same data, network and epochs, as far as they are known."""
        return any(not row.ours and not row.differs for row in self.rows)


def method_name(mix: str, options: dict[str, Any]) -> str:
    """The papers' name of a method, with the options that are not its defaults."""
    try:
        defaults = inspect.signature(type(create_mix(mix))).parameters
    except ValueError:  # a method of somebody else's
        defaults = {}

    def same(name: str, value: Any) -> bool:
        default = defaults[name].default if name in defaults else None
        return value == (list(default) if isinstance(default, tuple) else default)

    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    own = ', '.join(f'{key}={value}' for key, value in options.items() if not same(key, value))
    name = published.METHODS.get(mix, mix)
    return f'{name} ({own})' if own else name


def compare_result(result: EvaluationResult) -> list[Comparison]:
    """An evaluation beside the published figures; models whose training is not known are left out."""
    models = {model['label']: model for model in result.data.get('models', ())}
    values = []
    for measure in (m for m in MEASURES if m.protocol == result.protocol):
        for row in result.data['rows']:
            values += _row_values(measure, row, models.get(row['model'], {}))
    return _compare(values)


def _row_values(measure: Measure, row: dict[str, Any], model: dict[str, Any]) -> list[Value]:
    training = model.get('training', {})
    if measure.protocol == 'intrusion':  # a column for each method of mixing the embeddings of one model
        found = {method: row.get(mix) for mix, method in published.METHODS.items()}
    elif measure.protocol == 'cost':
        found = {published.METHODS.get(row['mix'], row['mix']): row.get(measure.key)}
    elif training.get('mix'):
        found = {method_name(training['mix'], training.get('mix_options', {})): row.get(measure.key)}
    else:
        return []
    ood = OOD_SETS.get(str(row.get('set')).lower(), '')
    if measure.protocol == 'ood' and not ood:
        return []
    exported = training.get('accuracy', {}).get('exported')
    which = [f'{exported} epoch'] if exported else []
    if measure.protocol == 'intrusion' and training.get('mix'):
        which.append(f'trained with {training["mix"]}')
    return [
        Value(
            measure, method, measure.ours(value), published.dataset_name(training.get('dataset', 'unknown data')),
            published.network_name(model.get('arch') or row['model']), training.get('epochs'),
            ', '.join(which), ood)
        for method, value in found.items() if isinstance(value, (int, float))]


def compare_runs(runs: Iterable[TrainingRun]) -> list[Comparison]:
    """Finished training runs beside the published figures: the last and the best epoch."""
    values = []
    for run in (run for run in runs if run.finished):
        if run.is_detector:
            measures, method = [m for m in MEASURES if m.protocol == 'detection'], _backbone_method(run)
        else:
            measures = [MEASURES[0]]
            method = method_name(run.args.get('mix', 'none'), run.args.get('mix_kwargs') or {})
        for measure in measures:
            for which, row in (('last', run.last), ('best', run.best)):
                value = row and row.get(measure.key if run.is_detector else 'eval_top1')
                if value is not None:
                    values.append(Value(
                        measure, method, value, run.dataset, run.network, run.args.get('epochs'), f'{which} epoch'))
    return _compare(values)


def _backbone_method(run: TrainingRun) -> str:
    """The method that a detector's backbone was trained with, as far as the name of its weights tells."""
    weights = run.args.get('weights')
    if not weights:
        return 'random weights'
    names = '|'.join(sorted(published.METHODS, key=len, reverse=True))  # alignmix_ae before alignmix
    found = re.findall(rf'(?<![a-z0-9])({names})(?![a-z0-9])', weights.lower())
    return published.METHODS[found[-1]] if found else weights.rstrip('/').rpartition('/')[2]


def _compare(values: Sequence[Value]) -> list[Comparison]:
    """A comparison for each setting that something was measured in."""
    by_setting: dict[tuple, list[Value]] = {}
    for value in values:
        by_setting.setdefault(value.setting, []).append(value)
    return [comparison for own in by_setting.values() if (comparison := _comparison(own)) is not None]


def _comparison(values: list[Value]) -> Comparison | None:
    order = list(published.METHODS.values())
    methods = sorted(dict.fromkeys(value.method for value in values), key=lambda name: next(
        (place for place, known in enumerate(order) if name == known or name.startswith(f'{known} (')), len(order)))
    rows, first = [], values[0]
    for measure, ood in dict.fromkeys((value.measure, value.ood) for value in values):
        own = [value for value in values if (value.measure, value.ood) == (measure, ood)]
        theirs = _published_rows(measure, ood, first, methods)
        if theirs:
            rows += [_own_row(own, which, methods) for which in dict.fromkeys(value.which for value in own)] + theirs
    epochs = f'{first.epochs} epochs' if first.epochs else 'unknown epochs'
    title = first.network if first.measure.protocol == 'cost' else f'{first.dataset}, {first.network}, {epochs}'
    return Comparison(title, methods, rows) if rows else None


def _own_row(values: list[Value], which: str, methods: list[str]) -> Row:
    """Our line of a quantity, means where a method was measured several times."""
    found = [[v.value for v in values if v.which == which and v.method == method] for method in methods]
    most = max(map(len, found))
    words = ['here', which, f'means of up to {most}' if most > 1 else '']
    return Row(_quantity(values[0].measure, values[0].ood), ', '.join(filter(None, words)),
               [statistics.mean(entry) if entry else None for entry in found], True, {})


def _quantity(measure: Measure, ood: str) -> str:
    return measure.title + (f', {ood}' if ood else '')


def _published_rows(measure: Measure, ood: str, here: Value, methods: list[str]) -> list[Row]:
    """Published lines of a quantity; where some share data or network with ours, only those."""
    settings: dict[tuple, list[published.Figure]] = {}
    for figure in published.find(metrics=measure.metrics, methods=methods):
        if figure.dataset.startswith(measure.data) and (not ood or figure.dataset.endswith(f' vs {ood}')):
            settings.setdefault((*figure.setting, figure.metric), []).append(figure)
    rows = []
    for own in settings.values():
        one = own[0]
        by_method = {figure.method: measure.theirs(figure.metric, figure.value) for figure in own}
        printed = ' (100 - error)' if measure.theirs(one.metric, one.value) != one.value else ''
        hardware = f' on {one.metric.rpartition(", ")[2]}' if ', ' in one.metric else ''
        differs = published.differences(one, here.dataset, here.network, here.epochs)
        if measure.protocol == 'cost':  # the same steps, whatever the images show and however often
            differs = {'hardware': ''} | {key: how for key, how in differs.items() if key == 'network'}
        if measure.left_open:
            differs[measure.left_open] = 'not stated'
        rows.append(Row(
            _quantity(measure, ood),
            f'{published.PAPERS[one.paper].partition(" (")[0]}, {one.table}: {one.dataset}, {one.network}{hardware}'
            f'{printed}',
            [by_method.get(method) for method in methods], False, differs))
    return [row for row in rows if len({'data', 'network'} & row.differs.keys()) < 2] or rows
