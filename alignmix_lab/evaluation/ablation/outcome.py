"""What the trainings of a study came to: figures over seeds, tables and pictures."""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignmix_lab.runs.plotting import GREY, bars, draw_by_epoch, figure, line, panels, shared_legend

from .. import published
from ..result import Column, Result
from .grid import Cell, Study, short, shown
from .jobs import Job
from .runs import Plan, run_name


@dataclass(frozen=True)
class Outcome:
    """A case and its finished trainings.

    Attributes:
        cell: The case.
        curves: Of each finished training, top-1 (%) by epoch, where it was measured.
        x: Place on the horizontal axis; None where the case has no number there.
    """
    cell: Cell
    curves: list[dict[int, float]]
    x: float | None = None

    @property
    def last(self) -> list[float]:
        """Top-1 of the last epoch of each training."""
        return [curve[max(curve)] for curve in self.curves]

    @property
    def best(self) -> list[float]:
        """Top-1 of the best epoch of each training."""
        return [max(curve.values()) for curve in self.curves]


def collect(study: Study, plan: Plan, jobs: dict[str, Job]) -> list[Outcome]:
    """The outcome of every case, from whatever is finished."""
    outcomes = []
    for cell in study.cells:
        own = [jobs[run_name(cell, seed)] for seed in plan.seeds]
        value = cell.settings.get(study.x, math.nan)
        if value is None:  # m of the whole batch
            value = plan.config(cell, plan.seeds[0]).batch_size
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        outcomes.append(Outcome(
            cell, [read_curve(job) for job in own if job.finished], float(value) if number else None))
    return outcomes


def read_curve(job: Job) -> dict[int, float]:
    """Top-1 (%) by epoch, of the epochs that were evaluated."""
    return {int(row['epoch']): float(row['eval_top1']) for row in job.rows() if row['eval_top1']}


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def make_result(study: Study, plan: Plan, jobs: dict[str, Job], failed: dict[str, str]) -> Result:
    """Table, notes and pictures of a study, from whatever is finished."""
    outcomes = collect(study, plan, jobs)
    config = plan.config(outcomes[0].cell, plan.seeds[0])
    labelled = any(outcome.cell.label for outcome in outcomes)
    keys = ['case'] if labelled else study.keys
    figures = {f.method: f for f in published.find(paper=study.paper, table=study.table)} if study.table else {}
    rows = []
    for outcome in outcomes:
        names = {'case': outcome.cell.name} if labelled else {
            key: shown(outcome.cell.settings[key]) if key in outcome.cell.settings else None for key in keys}
        row = {'model': config.model, **names, 'seeds': len(outcome.curves)}
        row['last'], row['last_std'] = spread(outcome.last)
        row['best'], row['best_std'] = spread(outcome.best)
        if figures:
            found = figures.get(outcome.cell.published)
            row['published'] = found.value if found else None
        rows.append(row)
    columns = {key: Column(short(key)) for key in keys}
    columns |= {
        'seeds': Column('seeds', 'd'),
        'last': Column('top-1, last epoch (%)', '.2f', 'higher'),
        'last_std': Column('std', '.2f'),
        'best': Column('top-1, best epoch (%)', '.2f', 'higher'),
        'best_std': Column('std', '.2f'),
    }
    if figures:
        columns['published'] = Column('published (%)', '.2f')
    runs = [
        {'run': run_name(outcome.cell, seed), 'settings': outcome.cell.settings, 'seed': seed,
         'command': ' '.join(jobs[run_name(outcome.cell, seed)].command),
         'top1': read_curve(jobs[run_name(outcome.cell, seed)])}
        for outcome in outcomes for seed in plan.seeds]
    pictures = {'': draw(study, outcomes), 'curves': draw_curves(study, outcomes)} \
        if any(outcome.curves for outcome in outcomes) else {}
    return Result(
        columns, rows, _notes(study, plan, jobs, failed, config, figures),
        {'study': study.name, 'source': study.source, 'recipe': plan.recipe, 'seeds': plan.seeds, 'runs': runs},
        pictures)


def _notes(
        study: Study,
        plan: Plan,
        jobs: dict[str, Job],
        failed: dict[str, str],
        config: Any,
        figures: dict[str, published.Figure],
) -> list[str]:
    notes = [
        'Mean over seeds; std: sample standard deviation. The best epoch is chosen on the images that it is measured '
        'on, so it is optimistic.',
        f'Trained: {config.model} on {data_name(config)}, {config.epochs} epochs, batch {config.batch_size}'
        + (f', recipe {plan.recipe}' if plan.recipe else '') + '.',
    ]
    if study.source:
        notes.append(f'After {study.source}.')
    if study.note:
        notes.append(study.note)
    if figures:
        one = next(iter(figures.values()))
        differ = published.differences(
            one, data_name(config), published.network_name(config.model), config.epochs)
        notes.append(
            f'Published: {published.PAPERS[one.paper]}, {one.table}, {one.dataset}, {one.network}, {one.metric}, best '
            'epoch on the test images, one run. '
            + ('Not a reproduction: these trainings differ in ' + ', '.join(
                f'{what} ({how})' for what, how in differ.items()) + '.' if differ else
               'These trainings have the same data, network and epochs.'))
    own = [run_name(cell, seed) for cell in study.cells for seed in plan.seeds]
    for name in own:
        if name in failed:
            notes.append(f'Failed: {name}: {failed[name].splitlines()[0]}.')
    missing = [name for name in own if not jobs[name].finished and name not in failed]
    if missing:
        notes.append(f'Not finished: {", ".join(missing)}.')
    return notes


def data_name(config: Any) -> str:
    """What the data is called."""
    if config.dataset:
        return published.dataset_name(config.dataset)
    return config.data_dir.rstrip('/').rpartition('/')[2] if config.data_dir else 'digits of scikit-learn'


def draw(study: Study, outcomes: list[Outcome]) -> Figure:
    """The picture of a study: lines over its axis, or bars."""
    if study.x is None:
        known = [outcome for outcome in outcomes if outcome.curves]
        fig, axes = figure(size=(6.4, 1.0 + 0.32 * len(known)))
        spreads = [(mean, std or 0) for mean, std in (spread(outcome.last) for outcome in known)]
        means, stds = zip(*spreads, strict=True)
        bars(axes[0, 0], [outcome.cell.name for outcome in known], means, '.2f', stds if any(stds) else None)
        low, high = (edge(mean + sign * std for mean, std in spreads) for edge, sign in ((min, -1), (max, 1)))
        room = max(high - low, 1)
        axes[0, 0].set_xlim(max(0, low - 0.5 * room), high + 0.3 * room)
        axes[0, 0].set_xlabel('top-1, last epoch (%): mean, std over seeds (axis not from 0)', fontsize='small')
        axes[0, 0].set_title(study.title)
        return fig
    fig, axes = figure(size=(6.4, 4.2))
    draw_axis(axes[0, 0], study, outcomes)
    axes[0, 0].legend(fontsize='small')
    return fig


def draw_together(studies: Sequence[Study], plan: Plan, jobs: dict[str, Job]) -> Figure:
    """The lines of several studies, a panel for each, such as the MultiMix paper's Figure 4."""
    fig, axes = panels(len(studies), most_columns=2, size=(5.6, 4.0))
    for ax, study in zip(axes, studies, strict=True):
        draw_axis(ax, study, collect(study, plan, jobs))
        ax.legend(fontsize='x-small')
    return fig


def draw_axis(ax: Axes, study: Study, outcomes: list[Outcome]) -> None:
    """Mean and standard deviation of the last epoch over a study's axis, a line for each of its other settings."""
    places: dict[str, float] = {}
    if study.scale == 'categories':
        for outcome in outcomes:
            if study.x in outcome.cell.settings:
                places.setdefault(shown(outcome.cell.settings[study.x]), len(places))
    index = 0
    for name, group in groups(study, outcomes).items():
        points, flat = [], []
        for outcome in (o for o in group if o.curves):
            x = places.get(shown(outcome.cell.settings.get(study.x, ''))) if places else outcome.x
            (flat if x is None else points).append((x, outcome))
        style = line(index)
        if points:
            points.sort(key=lambda point: point[0])
            spreads = [spread(outcome.last) for _, outcome in points]
            ax.errorbar([x for x, _ in points], [mean for mean, _ in spreads], [std or 0 for _, std in spreads],
                        label=name, capsize=3, **style)
            index += 1
        for _, outcome in flat:
            value = outcome.cell.settings.get(study.x)
            own = f'{name}, {short(study.x)} {shown(value)}' if points else outcome.cell.name
            ax.axhline(spread(outcome.last)[0], label=own, linewidth=1.2, alpha=0.8,
                       color=style['color'] if points else GREY, linestyle=':')
    if places:
        ax.set_xticks(list(places.values()), list(places))
    elif study.scale == 'log':
        ax.set_xscale('log')
        ticks = sorted({outcome.x for outcome in outcomes if outcome.x is not None})
        ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
        ax.minorticks_off()
    ax.set(xlabel=short(study.x), ylabel='top-1, last epoch (%), mean and std over seeds', title=study.title)


def groups(study: Study, outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """Cases by their settings other than the horizontal axis."""
    keys = [key for key in study.keys if key != study.x]
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        settings = {key: outcome.cell.settings[key] for key in keys if key in outcome.cell.settings}
        name = Cell(settings).name or str(outcome.cell.settings.get('mix', 'top-1'))
        found.setdefault(name, []).append(outcome)
    return found


def draw_curves(study: Study, outcomes: list[Outcome]) -> Figure:
    """Top-1 by epoch: a panel for each line of the study, a curve for each of its cases."""
    by_panel = groups(study, outcomes) if study.x else {study.title: outcomes}
    by_panel = {name: [o for o in group if o.curves] for name, group in by_panel.items()}
    by_panel = {name: group for name, group in by_panel.items() if group}
    fig, axes = panels(len(by_panel), most_columns=2, size=(4.6, 3.6), sharey=True)
    for ax, (name, group) in zip(axes, by_panel.items(), strict=True):
        curves = {
            outcome.cell.name if study.x is None or study.x not in outcome.cell.settings
            else f'{short(study.x)}={shown(outcome.cell.settings[study.x])}': outcome.curves for outcome in group}
        draw_by_epoch(ax, curves)
        ax.set_title(name)
        if len(by_panel) > 1:
            ax.legend(fontsize='x-small')
    axes[0].set_ylabel('top-1 (%), mean and range over seeds')
    if len(by_panel) == 1:
        shared_legend(fig, axes[0])
    return fig
