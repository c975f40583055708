"""One HTML page from the results of evaluations, training runs, detectors and ablations.

    alignmix report results runs -o report.html

Results are found by their content: JSON files with a "protocol", and folders with args.yaml and summary.csv. Their
tables, notes, pictures and commands stand side by side, with the published figures and what differs from the papers'
settings. The page, made from report.html, is one file that needs neither a network nor scripts.
"""
import argparse
import base64
import csv
import json
import logging
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.plotting import as_png, draw_by_epoch, figure, shared_legend
from timm_alignmix.version import __version__

from . import published
from .base import get_protocol, list_protocols
from .result import Column, cells, is_number

_logger = logging.getLogger(__name__)

PICTURES = {'.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.svg': 'svg+xml', '.webp': 'webp', '.gif': 'gif'}
MOST_PICTURES = 30  # that belong to no result, in one folder; more are taken for a data set


def group(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by a key, in the order in which the keys appear."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# Measured figures beside the published ones


class Value(NamedTuple):
    """A measured figure: where (such as 'here, last epoch'), by which method, in which setting."""
    measure: published.Measure
    ood: str
    where: str
    method: str
    setting: tuple[str, str, int | None]  # data, network, epochs
    value: float


@dataclass
class Row:
    """Figures of one quantity in one place; means where a method has several."""
    quantity: str
    where: str
    values: dict[str, float]  # by method
    differs: dict[str, str] | None = None  # what ours differ in from these published figures; None in our own rows
    near: bool = False  # no published figures of the quantity differ in less


class Comparison(NamedTuple):
    """Measured and published figures of one setting."""
    title: str
    methods: list[str]
    rows: list[Row]

    @property
    def reproduces(self) -> bool:
        """Whether published figures have the same data, network and epochs, as far as they are known."""
        return any(row.differs == {} for row in self.rows)

    def select(self, near: bool) -> list[Row]:
        """The nearest published rows, or the others, with our rows of the same quantities."""
        theirs = {row.quantity for row in self.rows if row.differs is not None and row.near == near}
        return [row for row in self.rows if row.quantity in theirs and (row.differs is None or row.near == near)]


def compare(values: Iterable[Value]) -> list[Comparison]:
    """Set published figures beside measured ones, in a comparison for each setting of these."""
    comparisons = []
    for setting, own in group(values, lambda value: value.setting).items():
        methods = sorted({value.method for value in own}, key=published.method_order)
        rows = []
        for (measure, ood), same in group(own, lambda value: (value.measure, value.ood)).items():
            figures = published.find_measure(measure, ood, methods)
            quantity = f'{measure.title}, {ood}' if ood else measure.title
            if figures:
                rows += [make_row(quantity, part) for part in group(same, lambda value: value.where).values()]
                rows += published_rows(quantity, figures, measure.depends, setting)
        if rows:
            data, network, epochs = setting
            title = ', '.join(filter(None, (data, network, epochs and f'{epochs} epochs')))
            comparisons.append(Comparison(title, methods, rows))
    return comparisons


def make_row(quantity: str, figures: list[Value | published.Figure], differs: dict[str, str] | None = None) -> Row:
    """Figures of one quantity and place in a row."""
    by_method = {name: [one.value for one in same] for name, same in group(figures, lambda one: one.method).items()}
    most = max(map(len, by_method.values()))
    where = figures[0].where + (f', means of up to {most}' if most > 1 else '')
    return Row(quantity, where, {name: statistics.mean(values) for name, values in by_method.items()}, differs)


def published_rows(quantity: str, figures: list[published.Figure], depends: Sequence[str], setting: tuple) -> list[Row]:
    """Published figures of a quantity in rows; marks those that differ least from a setting in what it depends on."""
    rows, distances = [], []
    for own in group(figures, lambda one: one.where).values():
        known = published.differences(own[0], *setting)
        differs = {what: known.get(what, '') for what in depends if what in known or what not in published.SETTING}
        shared = {'data', 'network'} & set(depends) - differs.keys()
        distances.append(len(differs) if shared else math.inf)
        rows.append(make_row(quantity, own, differs))
    for row, distance in zip(rows, distances, strict=True):
        row.near = distance == min(distances) < math.inf
    return rows


# What evaluations and training runs wrote


class EvaluationResult:
    """The JSON file of an evaluation or ablation."""

    def __init__(self, path: Path, name: str, data: dict[str, Any]):
        self.name, self.protocol, rows = name, str(data['protocol']), data['rows']
        columns = {'model': Column('model')}
        columns |= {key: read_column(stored, [row.get(key) for row in rows]) for key, stored in data['columns'].items()}
        self.head, self.cells = [column.title for column in columns.values()], cells(columns, rows)
        self.notes, self.command = list(data.get('notes', [])), data.get('command')
        self.facts = {key: data[key] if key == 'data' else ', '.join(f'{k} {v}' for k, v in data[key].items())
                      for key in ('data', 'options', 'environment') if data.get(key)}
        self.commands = [run['command'] for run in data.get('details', {}).get('runs', [])]
        files = [path.with_name(Path(file).name) for file in data.get('pictures', [])]
        self.pictures = [file for file in files if file.suffix.lower() in PICTURES and file.is_file()]
        models = {model['label']: model for model in data.get('models', [])}
        self.comparisons = compare(
            value for measure in published.MEASURES if measure.protocol == self.protocol
            for row in rows for value in read_values(measure, row, models.get(row.get('model'), {})))


def read_column(stored: dict[str, Any] | str, values: list[Any]) -> Column:
    """A column of a result; older files have only its title, and its format is guessed from the largest number."""
    if isinstance(stored, dict):
        return Column(**stored)
    largest = max((abs(value) for value in values if isinstance(value, float) and math.isfinite(value)), default=0)
    return Column(stored, f'.{min(max(3 - math.floor(math.log10(largest)), 1), 4)}f' if largest else '')


def read_values(measure: published.Measure, row: dict[str, Any], model: dict[str, Any]) -> Iterable[Value]:
    """The figures of a row that can be compared; none where the training of its model is not known."""
    training, ood = model.get('training', {}), published.OOD_SETS.get(str(row.get('set')).lower(), '')
    mix, where = training.get('mix'), training.get('accuracy', {}).get('exported', '')
    where = ', '.join(filter(None, ('here', f'{where} epoch' if where in ('last', 'best') else where)))
    found = {}
    if measure.protocol == 'intrusion':  # a column for each way of mixing the embeddings of one model
        found = {method: row.get(key) for key, method in published.METHODS.items()}
        where += f', trained with {mix}' if mix else ''
    elif measure.protocol == 'cost':
        found = {published.METHODS.get(row['mix'], row['mix']): row.get(measure.key)}
    elif mix and (ood or measure.protocol != 'ood'):
        method = published.method_name(training.get('mix_weights') or mix, training.get('mix_options'), training)
        found = {method: row.get(measure.key)}
    data = training.get('dataset')
    arch = model.get('arch') or row['model'].partition(' ')[0]  # of cost 'resnet50 224 px'
    setting = data and published.dataset_name(data), published.network_name(arch), training.get('epochs')
    for method, value in found.items():
        if is_number(value):
            yield Value(measure, ood, where, method, setting, value * measure.scale)


class TrainingRun:
    """The folder of a training run, of a classifier or a detector."""

    def __init__(self, folder: Path, name: str, files: Iterable[Path]):
        args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
        with (folder / 'summary.csv').open(newline='', encoding='utf-8') as file:
            rows = [read_numbers(row) for row in csv.DictReader(file)]
        report = folder / 'report.md'
        self.report = report.read_text(encoding='utf-8', errors='replace') if report.is_file() else ''
        self.name, self.args, epochs = name, args, [row for row in rows if 'epoch' in row]
        self.pictures = [path for path in files if path.suffix.lower() in PICTURES]
        self.facts = dict(re.findall(r'^- (\w+): (.+)$', self.report, re.MULTILINE))
        self.is_detector = 'detector' in args
        if self.is_detector:
            self.method = published.backbone_method(args.get('weights'))
            data = published.DETECTION_DATA.get(args.get('train_split'), args.get('data_dir'))
            network, command = f'{args["detector"]} {args["backbone"]}', 'detect train'
        else:
            self.method = 'unknown'
            if 'mix' in args:
                self.method = published.method_name(args['mix'], args.get('mix_kwargs'), args)
            data, network, command = args.get('dataset') or args.get('data_dir'), args['model'], 'train'
        self.setting = published.dataset_name(data), published.network_name(network), args['epochs']
        said = re.search(r'^    (\S.*)$', self.report, re.MULTILINE)
        self.command = said[1] if said else f'alignmix {command} --config {name}/args.yaml'
        self.metric = args.get('eval_metric') or 'top1'
        measured, sign = [row for row in epochs if self.metric in row], -1 if self.metric == 'loss' else 1
        self.curve = {int(row['epoch']): row[self.metric] for row in measured}
        self.last = measured[-1] if measured else {}
        self.best = max(measured, key=lambda row: sign * row[self.metric], default={})
        self.done = int(epochs[-1]['epoch']) + 1 if epochs else 0
        self.finished = self.done >= args['epochs']

    @property
    def values(self) -> list[Value]:
        """Figures that can be compared."""
        protocol = 'detection' if self.is_detector else 'accuracy'
        return [
            Value(measure, '', f'here, {which} epoch', self.method, self.setting, row[measure.key])
            for measure in published.MEASURES if measure.protocol == protocol and self.finished
            for which, row in (('last', self.last), ('best', self.best)) if measure.key in row]


def read_numbers(row: dict[str, str | None]) -> dict[str, float]:
    """The cells of a line of summary.csv that hold finite numbers, eval_ left out of their names."""
    number = re.compile(r'[-+]?\d+(\.\d*)?(e[-+]?\d+)?')
    return {key.removeprefix('eval_'): float(text) for key, text in row.items() if text and number.fullmatch(text)}


@dataclass
class Sources:
    """All that was found, by its path for the reader."""
    evaluations: list[EvaluationResult] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # sentences on what is not shown


def find_sources(folders: Sequence[Path]) -> Sources:
    """Search folders and all folders in them.

    Raises:
        ValueError: A folder does not exist, or there is nothing in any of them.
    """
    found, seen = Sources(), set()
    for top in folders:
        if not top.is_dir():
            raise ValueError(f'{top} is not a folder')
        paths = [path for path in sorted(top.rglob('*')) if path.is_file() and path.resolve() not in seen]
        seen.update(path.resolve() for path in paths)  # one folder may lie in another
        names = {path: (Path(top.resolve().name) / path.relative_to(top)).as_posix() for path in paths}
        search({path: name for path, name in names.items() if '/.' not in name}, found)
    for folder, loose in group(found.pictures, lambda name: name.rpartition('/')[0]).items():
        if len(loose) > MOST_PICTURES:
            found.pictures = {name: path for name, path in found.pictures.items() if name not in loose}
            found.left_out.append(f'{folder}: {len(loose)} pictures that belong to no result, taken for a data set.')
    if not (found.evaluations or found.runs or found.pictures or found.pages):
        raise ValueError(f'nothing to report in {", ".join(map(str, folders))}: no results, training runs or pictures')
    return found


def search(names: dict[Path, str], found: Sources) -> None:
    """Sort files, given with their names for the reader, into results, runs and others."""
    used = set()
    for path, name in names.items():
        try:
            if path.suffix == '.json' and b'"protocol"' in (content := path.read_bytes()):
                found.evaluations.append(EvaluationResult(path, name, json.loads(content)))
                used.update((path.with_suffix('.md'), *found.evaluations[-1].pictures))
            elif path.name == 'summary.csv':
                own = [file for file in names if file.parent == path.parent or (
                    file.parent.parent == path.parent and file.parent.name.startswith(('export', 'pictures')))]
                found.runs.append(TrainingRun(path.parent, Path(name).parent.as_posix(), own))
                used.update(own)
        except Exception as e:  # a file of another program may hold anything
            found.left_out.append(f'{name} is left out: it is not a result of this package ({type(e).__name__}: {e}).')
    for path, name in names.items():
        if path not in used and path.suffix.lower() in PICTURES:
            found.pictures[name] = path
        elif path not in used and path.suffix == '.md':
            found.pages[name] = path.read_text(encoding='utf-8', errors='replace')


# The page


def data_uri(picture: Path | bytes) -> str:
    """A picture file, or the content of a PNG file, as text."""
    kind, content = ('png', picture) if isinstance(picture, bytes) else (
        PICTURES[picture.suffix.lower()], picture.read_bytes())
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def draw_together(runs: Iterable[TrainingRun]) -> dict[str, bytes]:
    """Pictures of the metric by epoch, one for each setting with several runs."""
    pictures = {}
    for (data, network, epochs, metric), own in group(runs, lambda run: (*run.setting, run.metric)).items():
        if len(own) > 1:
            by_method = group(own, lambda run: run.method).items()
            fig, ((ax,),) = figure(size=(7.2, 4.2))
            draw_by_epoch(ax, {method: [run.curve for run in same] for method, same in by_method})
            title = f'{data}, {network}, {epochs} epochs'
            ax.set(ylabel=metric + ('' if metric == 'loss' else ' (%)'), title=f'{title}: mean and range over seeds')
            shared_legend(fig, ax)
            pictures[f'{metric}: {title}'] = as_png(fig, dpi=130)
    return pictures


def render(found: Sources, title: str) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined)
    environment.filters['uri'] = data_uri
    by_protocol = group(found.evaluations, lambda evaluation: evaluation.protocol)
    helps = {name: get_protocol(name).help.rstrip('.') for name in list_protocols()}
    names = [*(name for name in helps if name in by_protocol), *sorted(by_protocol.keys() - helps.keys())]
    return environment.get_template('report.html').render(
        found=found, title=title, date=time.strftime('%Y-%m-%d'), version=__version__, papers=published.PAPERS,
        protocols={name + (f': {helps[name]}' if name in helps else ''): by_protocol[name] for name in names},
        comparisons=compare(value for run in found.runs for value in run.values),
        together=draw_together(run for run in found.runs if len(run.curve) > 1))


def main(argv: list[str] | None = None, prog: str = 'alignmix report') -> None:
    """Write a report."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path, metavar='DIR', help='folders of results, searched to the end')
    parser.add_argument('-o', '--output', type=Path, default=Path('report.html'), help='file (default: report.html)')
    parser.add_argument('--title', default='timm-alignmix report', help='heading of the page')
    args = parser.parse_args(argv)
    try:
        found = find_sources(args.folders)
        write_whole(args.output, render(found, args.title))
    except (ValueError, OSError) as e:
        sys.exit(f'{prog}: error: {e}')
    for sentence in found.left_out:
        _logger.warning(sentence)
    print(f'{args.output}: {len(found.evaluations)} results, {len(found.runs)} training runs')
