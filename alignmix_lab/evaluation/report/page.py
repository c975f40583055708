"""The page: sections, tables and pictures, put into page.html by Jinja, which escapes every text."""
import base64
import io
import json
import math
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignmix_lab.runs.plotting import draw_by_epoch, figure, shared_legend
from timm_alignmix.version import __version__

from .. import published
from ..base import get_protocol, list_protocols
from .compare import Comparison, compare_result, compare_runs
from .sources import PICTURES, EvaluationResult, Sources, TrainingRun


@dataclass
class Table:
    """A table of texts; numbers are set to the right.

    Attributes:
        head: Headings.
        rows: Lines of cells.
        strong: Lines that stand out.
        caption: What it shows.
    """
    head: list[str]
    rows: list[list[str]]
    strong: set[int] = field(default_factory=set)
    caption: str = ''

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers and gaps only."""
        texts = {row[column] for row in self.rows} - {'-', ''}
        return bool(texts) and all(re.fullmatch(r'[-+]?\d+(\.\d+)?', text) for text in texts)


@dataclass
class Picture:
    """A picture with its data."""
    name: str
    uri: str


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Heading.
        facts: Pairs of a name and a text.
        tables: Tables.
        notes: Definitions and remarks.
        comparisons: Tables beside the published figures, each with a remark, and whether that is a warning.
        pictures: Pictures.
        commands: Commands, those of many runs folded.
        details: Pairs of a heading and text as it was written, folded.
        parts: Sections within.
        anchor: Name for links, given by :func:`render`.
    """
    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparisons: list[tuple[Table, str, bool]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    parts: list['Section'] = field(default_factory=list)
    anchor: str = ''


def render(found: Sources, title: str) -> str:
    """The whole page.

    Args:
        found: What it shows.
        title: Its heading.
    """
    sections = [section for section in (
        _origins(found),
        *_results(found.results),
        _trainings(found.runs),
        Section('Other pages', details=found.pages) if found.pages else None,
        Section('Other pictures', pictures=[embed(path, name) for name, path in found.pictures])
        if found.pictures else None,
    ) if section is not None]
    for number, section in enumerate(sections, 1):
        section.anchor = f's{number}'
        for inner, part in enumerate(section.parts, 1):
            part.anchor = f's{number}-{inner}'
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined)
    return environment.get_template('page.html').render(
        title=title, sections=sections, date=time.strftime('%Y-%m-%d'), version=__version__,
        papers=published.PAPERS)


def embed(path: Path, name: str) -> Picture:
    """A picture file as a data URI."""
    return _embed_bytes(path.read_bytes(), PICTURES[path.suffix.lower()], name)


def _embed_bytes(content: bytes, kind: str, name: str) -> Picture:
    return Picture(name, f'data:{kind};base64,{base64.b64encode(content).decode()}')


# Where figures come from


def _origins(found: Sources) -> Section:
    """Date, hardware, versions and data of every result and run."""
    said: dict[tuple[str, ...], list[str]] = {}
    for result in found.results:
        where = result.data.get('environment', {})
        versions = ', '.join(f'{key} {where[key]}' for key in ('timm_alignmix', 'timm', 'torch') if key in where)
        hardware = f'{where["processes"]} process(es) on {where["device"]}' if 'device' in where else 'not recorded'
        said.setdefault((hardware, versions or 'not recorded', where.get('date', '')), []).append(result.name)
    for run in found.runs:
        facts = _report_facts(run)
        key = (facts.get('Hardware', 'not recorded'), facts.get('Software', 'not recorded'), '')
        said.setdefault(key, []).append(run.name)
    rows = [[', '.join(names) if len(names) <= 6 else f'{len(names)} in ' + ', '.join(
        dict.fromkeys(name.partition('/')[0] for name in names)), *facts] for facts, names in said.items()]
    return Section('Where the figures come from', tables=[Table(['what', 'hardware', 'software', 'date'], rows)])


def _report_facts(run: TrainingRun) -> dict[str, str]:
    """The list of a run's report.md."""
    return dict(re.findall(r'^- (\w+): (.+)$', run.report, re.MULTILINE))


# Evaluations


def _results(results: Sequence[EvaluationResult]) -> list[Section]:
    """A section for each protocol, in the order in which `all` runs them, then ablations and others."""
    order = list_protocols()
    by_protocol: dict[str, list[EvaluationResult]] = {}
    for result in results:
        by_protocol.setdefault(result.protocol, []).append(result)
    names = sorted(by_protocol, key=lambda name: (order.index(name) if name in order else len(order), name))
    sections = []
    for name in names:
        said = get_protocol(name).help.rstrip('.') if name in order else ''
        title = (name.upper() if name == 'ood' else name.replace('-', ': ', 1).capitalize()) + (said and f' - {said}')
        own = by_protocol[name]
        sections.append(_result(own[0], title) if len(own) == 1 else Section(
            title, parts=[_result(result, result.name) for result in own]))
    return sections


def _result(result: EvaluationResult, title: str) -> Section:
    data = result.data
    facts = [('File', result.name)]
    facts += [('Data', data['data'])] if data.get('data') else []
    options = data.get('options') or {}
    facts += [('Options', ', '.join(f'{key} {_plain(value)}' for key, value in options.items()))] if options else []
    runs = data.get('details', {}).get('runs') if isinstance(data.get('details'), dict) else None
    commands = [run['command'] for run in runs or () if isinstance(run, dict) and 'command' in run]
    return Section(
        title, facts, [value_table(data['columns'], data['rows'])], list(data.get('notes', ())),
        [_comparison(comparison) for comparison in compare_result(result)],
        [embed(path, f'{result.name.rpartition("/")[0]}/{path.name}') for path in result.pictures],
        [data['command']] if data.get('command') else [],
        [(f'Commands of the {len(commands)} trainings', '\n'.join(commands))] if commands else [])


def value_table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of a result as texts: numbers of a column with the same digits."""
    keys = {'model': 'model', **columns}
    formats = {key: _digits([row.get(key) for row in rows]) for key in keys}
    return Table(list(keys.values()), [[_cell(row.get(key), formats[key]) for key in keys] for row in rows])


def _digits(values: Iterable[Any]) -> str:
    """A format that shows about four digits of the largest number."""
    numbers = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(numbers, default=1.0)
    return next(form for size, form in ((1000, '.1f'), (10, '.2f'), (1, '.3f'), (0, '.4f')) if largest >= size)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return '-'
    return format(value, form) if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _comparison(comparison: Comparison) -> tuple[Table, str, bool]:
    """A comparison as a table, with a remark that nobody can overlook."""
    rows, above = [], ''
    for row in comparison.rows:
        # Both data and networks can be read in the table.
        notes = [what if what in ('data', 'network') or not how else f'{what} ({how})'
                 for what, how in row.differs.items()]
        rows.append([
            row.quantity if row.quantity != above else '', row.setting, *(_cell(v, '.2f') for v in row.values),
            '' if row.ours else ', '.join(notes) or 'nothing known'])
        above = row.quantity
    table = Table(
        ['quantity', 'where', *comparison.methods, 'ours differs in'], rows,
        {i for i, row in enumerate(comparison.rows) if row.ours}, f'Beside the published figures: {comparison.title}')
    if comparison.reproduces:
        return table, ('Lines with "nothing known" have the data, network and epochs of the published figure; other '
                       'settings may differ. Published accuracies are of the best epoch on the test images.'), False
    return table, ('Not a reproduction. No published figure has these data, network and epochs: the lines of the papers'
                   ' show what they found in their settings, not what was to be expected here.'), True


# Trainings


def _trainings(runs: Sequence[TrainingRun]) -> Section | None:
    if not runs:
        return None
    kinds = [[run for run in runs if not run.is_detector], [run for run in runs if run.is_detector]]
    section = Section(
        'Training runs', notes=[
            'The best epoch is chosen on the images that it is measured on, so it is optimistic; the last one is not '
            'chosen.'],
        tables=[_run_table(own) for own in kinds if own],
        comparisons=[_comparison(comparison) for comparison in compare_runs(runs)],
        pictures=[picture for own in kinds for picture in _overlays(own)])
    for run in runs:
        said = list(_report_facts(run).items())
        part = Section(run.name, facts=said, commands=[_run_command(run)], pictures=[
            embed(path, f'{run.name}/{path.name}') for path in run.pictures])
        part.details = [('report.md', run.report)] if run.report else []
        section.parts.append(part)
    return section


def _run_table(runs: Sequence[TrainingRun]) -> Table:
    detectors = runs[0].is_detector
    rows = []
    for run in runs:
        last, best, args = run.last or {}, run.best or {}, run.args
        rows.append([
            run.name, _run_method(run), run.dataset, run.network, f'{run.done}/{args["epochs"]}',
            str(args.get('seed')),
            run.metric.removeprefix('eval_'), _cell(last.get(run.metric), '.2f'), _cell(best.get(run.metric), '.2f'),
            str(int(best['epoch']) + 1) if best else '-'])
    return Table(
        ['run', 'weights' if detectors else 'mix', 'data', 'network', 'epochs', 'seed', 'metric', 'last epoch',
         'best epoch', 'its number'], rows, caption='Detectors' if detectors else 'Classifiers')


def _run_method(run: TrainingRun) -> str:
    """What runs are told apart by: the mix and its options, or the weights of a detector's backbone."""
    if run.is_detector:
        parts = str(run.args.get('weights') or 'random').rstrip('/').split('/')
        return '/'.join(parts[-2:])  # the file is called last.pth.tar in every run
    options = run.args.get('mix_kwargs') or {}
    return ' '.join([str(run.args.get('mix')), *(f'{key}={_plain(value)}' for key, value in options.items())])


def _run_command(run: TrainingRun) -> str:
    """The command of a run's report.md, or one that repeats it from its args.yaml."""
    said = re.search(r'^    (\S.*)$', run.report, re.MULTILINE)
    if said:
        return said[1]
    script = ['-m', 'detection.train'] if run.is_detector else ['train_imagenet.py']
    return shlex.join(['python', *script, '--config', f'{run.name}/args.yaml', '--experiment', f'{run.name}-again'])


def _overlays(runs: Sequence[TrainingRun]) -> list[Picture]:
    """One picture for each setting with several runs: the metric by epoch, runs that differ in their seed together."""
    settings: dict[tuple, dict[str, list[dict[int, float]]]] = {}
    for run in runs:
        curve = {int(row['epoch']): row[run.metric] for row in run.epochs if run.metric in row}
        if curve:
            by_method = settings.setdefault((run.dataset, run.network, run.args.get('epochs'), run.metric), {})
            by_method.setdefault(_run_method(run), []).append(curve)
    pictures = []
    for (dataset, network, epochs, metric), by_method in settings.items():
        if sum(map(len, by_method.values())) < 2:
            continue
        fig, axes = figure(size=(7.2, 4.2))
        draw_by_epoch(axes[0, 0], by_method)
        axes[0, 0].set_ylabel(metric.removeprefix('eval_') + ('' if metric == 'eval_loss' else ' (%)'))
        title = f'{dataset}, {network}, {epochs} epochs'
        axes[0, 0].set_title(f'{title}; mean and range over seeds')
        shared_legend(fig, axes[0, 0])
        buffer = io.BytesIO()
        fig.savefig(buffer, format='png', dpi=130)
        pictures.append(_embed_bytes(buffer.getvalue(), 'image/png', f'{metric.removeprefix("eval_")}: {title}'))
    return pictures
