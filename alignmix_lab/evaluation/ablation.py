"""Ablations: train a recipe with every value of a grid and several seeds, and compare what comes out."""
import itertools
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import setup_default_logging

from alignmix_lab.classification.config import TrainConfig, resolve_config
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.jobs import Job, describe_jobs, run_jobs
from alignmix_lab.runs.options import (
    Options,
    changed_options,
    config_option,
    create_parser,
    find_recipe,
    near_names,
    option_words,
    parse_flags,
    read_yaml,
)
from alignmix_lab.runs.plotting import as_png, bars, color, draw_by_epoch, figure, line, panels, shared_legend, spread
from alignmix_lab.runs.timing import hardware

from . import published
from .result import Column, Result, environment, table, write_result
from .studies import STUDIES, Cell, Study, grid_study, load_studies, parse_words, short, shown

_logger = logging.getLogger(__name__)
_what = partial(config_option, 'What to compare')
_how = partial(config_option, 'How to train')
_run = partial(config_option, 'Run, logs and checkpoints')

SCRIPT = Path(__file__).resolve().parents[2] / 'train_imagenet.py'  # of a clone
HELP = """Train a recipe with every value of a grid and several seeds, and compare.

    alignmix ablate --recipe RECIPE --grid mix_kwargs.n=1,10,100,1000 --seeds 0 1 2
    alignmix ablate --recipe RECIPE --study n m alpha --jobs 4
    alignmix ablate --recipe RECIPE --study iterations --launch 'accelerate launch --num_processes 8'
    alignmix ablate --recipe RECIPE --study mixes --queue jobs.txt, and --collect after they ran

Studies of the papers: {studies}.
Finished runs are kept, interrupted ones resumed; those that fail are reported while the rest goes on. Without a recipe
and data the runs are on the built-in sample."""


@dataclass
class AblationOptions(Options):
    """Options of `alignmix ablate`."""

    recipe: str = _what('', 'recipe that all runs start from: a YAML file, or a name such as imagenet/resnet50_300ep')
    study: list[str] | None = _what(None, 'studies of the papers, or YAML files of studies', nargs='+')
    grid: list[str] | None = _what(
        None, 'values of options, all combinations: mix_kwargs.n=1,10,100 mix=multimix,densemultimix', nargs='+')
    set: list[str] | None = _what(None, 'options of every run, over the recipe: data_dir=DIR epochs=10', nargs='+')
    seeds: list[int] = _what([0, 1, 2], 'seeds of every case', int, nargs='+', low=0)
    launch: str = _how('python', "what starts the training, e.g. 'accelerate launch --num_processes 8'")
    jobs: int = _how(1, 'runs at a time, each with its share of the GPUs; several launchers of several processes need '
                     '--main_process_port 0 in --launch', int, low=1)
    queue: str = _how('', 'train nothing, write the commands of what is not finished to this file, one a line')
    collect: bool = _how(False, 'train nothing, show what is finished', bool)
    dry_run: bool = _how(False, 'train nothing, list the runs and how long they will take', bool)
    output: str = _run('./output/ablation', 'folder of the results')
    runs: str = _run('', "folder of the runs' folders; default: runs in --output")
    progress: bool = _run(False, 'progress bar even where the output is no terminal', bool)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.study) == bool(self.grid):
            raise ValueError('say what to compare: either --study or --grid')
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f'--seeds must be different, got {self.seeds}')
        if bool(self.queue) + self.collect + self.dry_run > 1:
            raise ValueError('--queue, --collect and --dry-run each replace the training: one at a time')
        try:
            if self.recipe:
                find_recipe(self.recipe)
        except ValueError as e:
            raise ValueError(str(e).replace('--config', '--recipe')) from e


def main(argv: list[str] | None = None, prog: str = 'alignmix ablate') -> None:
    """Run, plan or collect an ablation; the exit code is 1 where a run failed."""
    setup_default_logging()
    logging.getLogger('alignmix_lab.classification.config').setLevel(logging.WARNING)  # one line a run on its defaults
    usage = '%(prog)s (--study NAME ... | --grid OPTION=VALUES ...) [options]'
    names = ', '.join(study.name for study in load_studies([str(STUDIES)]))
    options = parse_flags(
        create_parser(AblationOptions, usage, HELP.format(studies=names), prog), AblationOptions,
        lambda flags, file: AblationOptions(**{**(read_yaml(file, AblationOptions) if file else {}), **flags}), argv)
    try:
        failed = ablate(options, f'{prog} {shlex.join(sys.argv[1:] if argv is None else argv)}')
    except (ValueError, OSError) as e:
        sys.exit(f'{prog}: error: {e}')
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command continues.')
    if failed:
        sys.exit(1)


def ablate(options: AblationOptions, command: str) -> dict[str, str]:
    """Train what is missing, and write the results of every study, with the command that asked for them.

    Returns why runs failed, by name.

    Raises:
        ValueError: A wrong option, or a folder with a run of other options; nothing has been trained then.
    """
    studies = load_studies(options.study) if options.study else [grid_study(parse_words(options.grid, '--grid'))]
    jobs = plan(options, studies)
    _logger.info(describe_jobs([*jobs.values()], options.jobs))
    if options.dry_run:
        print('\n'.join(f'{name}: {job.done} of {job.epochs} epochs' for name, job in jobs.items()))
        return {}
    if options.queue:
        commands = [shlex.join(job.command) + '\n' for job in jobs.values() if not job.finished]
        write_whole(Path(options.queue), ''.join(commands))
        _logger.info(f'{options.queue}: {len(commands)} commands, to be run in {Path.cwd()}; after them --collect')
        return {}
    failed = {} if options.collect else run_jobs([*jobs.values()], options.jobs, options.progress)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    facts = {
        'command': command,
        'environment': {**environment(device, 1), 'device': hardware(device).partition(', torch')[0]},
        'options': {name: getattr(options, name) for name in ('recipe', 'set', 'seeds', 'launch')},
    }
    for study in studies:
        result = make_result(study, options, jobs, failed)
        name = 'ablation' if study.name == 'grid' else f'ablation-{study.name}'
        files = write_result(Path(options.output), name, study.title, result, facts)
        print(f'\n{study.title}\n\n{table(result)}\n', flush=True)
        _logger.info('Written: ' + ', '.join(map(str, files)))
    with_axis = [study for study in studies if study.x and study.lines()]
    if len(with_axis) > 1:
        fig, axes = panels(len(with_axis), most_columns=2, size=(5.6, 4.0))
        for ax, study in zip(axes, with_axis, strict=True):
            draw_axis(ax, study)
        write_whole(Path(options.output) / 'ablation-together.png', as_png(fig))
    return failed


# Runs

def plan(options: AblationOptions, studies: Sequence[Study]) -> dict[str, Job]:
    """Plan the runs of studies, by name, shared ones once; seed by seed, so that unfinished studies still compare.

    Raises:
        ValueError: A wrong option, or a folder with a run of other options.
    """
    jobs, settings = {}, {}
    for seed, study in itertools.product(options.seeds, studies):
        for cell in study.cells:
            name = run_name(cell, seed)
            try:
                if settings.setdefault(name, cell.settings) != cell.settings:
                    raise ValueError(f'another case has the same name in files, {name}')
                jobs[name] = make_job(options, cell, seed)
            except ValueError as e:
                raise ValueError(f'study {study.name}, {cell.name}: {e}') from e
    return jobs


def run_name(cell: Cell, seed: int) -> str:
    """Name of a run's folder, the same in every study that has the same case."""
    words = [str(cell.settings['mix'])] if 'mix' in cell.settings else []
    for key, value in sorted(cell.settings.items()):
        text = '_'.join(map(str, value)) if isinstance(value, list) else shown(value)
        if key != 'mix':
            words.append(short(key) + re.sub(r'[^A-Za-z0-9.]+', '_', text))
    return '-'.join([*words, f'seed{seed}'])


def make_job(options: AblationOptions, cell: Cell, seed: int) -> Job:
    """Plan the run of a case with a seed, and give the case all its options."""
    flags, nested = {}, {}
    kinds = {option.name: option.metadata['type'] for option in fields(TrainConfig)}
    for key, value in {**parse_words(options.set or (), '--set'), **cell.settings, 'seed': seed}.items():
        name, dot, entry = key.partition('.')
        if name not in kinds or (dot and kinds[name] is not dict):
            raise ValueError(f'no option {key}{near_names(name, kinds)} (those of a method are mix_kwargs.NAME)')
        if dot:
            nested.setdefault(name, {})[entry] = value
        else:
            flags[name] = value
    base = resolve_config(flags, options.recipe)
    flags |= {name: {**getattr(base, name), **entries} for name, entries in nested.items()}
    cell.config = config = resolve_config(flags, options.recipe)
    folder = Path(options.runs or f'{options.output}/runs') / run_name(cell, seed)
    args = folder / 'args.yaml'
    changed = changed_options(config, yaml.safe_load(args.read_text(encoding='utf-8'))) if args.is_file() else []
    if changed:
        raise ValueError(
            f'{folder} holds a run with other options ({", ".join(changed)}); name another --output or remove it')
    script = SCRIPT.relative_to(Path.cwd()) if SCRIPT.is_relative_to(Path.cwd()) else SCRIPT
    command = [
        *shlex.split(options.launch),
        *([str(script)] if SCRIPT.is_file() else ['-m', 'alignmix_lab', 'train']),
        *(['-c', options.recipe] if options.recipe else []),
        *(word for key, value in {'checkpoint_hist': 1, **flags}.items() for word in option_words(key, value)),
        '--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto',
    ]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)  # the schedule knows how many epochs it has
    _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=1)
    return Job(command, folder, min(epochs, config.stop_epoch or epochs))


# Results

def make_result(study: Study, options: AblationOptions, jobs: dict[str, Job], failed: dict[str, str]) -> Result:
    """Table, notes and pictures of a study, from whatever is finished."""
    keys = ['case'] if any('label' in case for case in study.cases) else study.keys
    figures = {f.method: f for f in published.find(paper=study.paper, table=study.table)} if study.table else {}
    rows, runs = [], []
    for cell in study.cells:
        own = [jobs[run_name(cell, seed)] for seed in options.seeds]
        cell.curves = [job.curve() for job in own if job.finished]
        values = {'case': cell.name, **{key: shown(value) for key, value in cell.settings.items()}}
        row = {'model': cell.config.model, **{key: values.get(key) for key in keys}, 'seeds': len(cell.curves)}
        row['last'], row['last_std'] = cell.last
        row['best'], row['best_std'] = spread([max(curve.values()) for curve in cell.curves])
        if figures:
            row['published'] = figures[cell.published].value if cell.published in figures else None
        rows.append(row)
        runs += [{'run': job.name, 'settings': cell.settings, 'seed': seed, 'command': ' '.join(job.command),
                  'top1': job.curve()} for seed, job in zip(options.seeds, own, strict=True)]
    columns = {
        **{key: Column(short(key)) for key in keys},
        'seeds': Column('seeds', 'd'),
        'last': Column('top-1, last epoch (%)', '.2f', 'higher'),
        'last_std': Column('std', '.2f'),
        'best': Column('top-1, best epoch (%)', '.2f', 'higher'),
        'best_std': Column('std', '.2f'),
        **({'published': Column('published (%)', '.2f')} if figures else {}),
    }
    notes = list_notes(study, options.recipe, next(iter(figures.values()), None))
    names = [run['run'] for run in runs]
    notes += [f'Failed: {name}: {failed[name].splitlines()[0]}.' for name in names if name in failed]
    missing = [name for name in names if name not in failed and not jobs[name].finished]
    notes += [f'Not finished: {", ".join(missing)}.'] if missing else []
    return Result(
        columns, rows, notes,
        {'study': study.name, 'source': study.source, 'recipe': options.recipe, 'seeds': options.seeds, 'runs': runs},
        {'': draw(study), 'curves': draw_curves(study)} if study.lines() else {})


def list_notes(study: Study, recipe: str, figure: published.Figure | None) -> list[str]:
    """Notes on the table; `figure` is one of the published ones that it holds."""
    config = study.cells[0].config
    data = published.data_name(config.dataset, config.data_dir)
    notes = [
        'Mean over seeds; std: sample standard deviation. The best epoch is chosen on the images that it is measured '
        'on, so it is optimistic.',
        f'Trained: {config.model} on {data}, {config.epochs} epochs, batch {config.batch_size}'
        + (f', recipe {recipe}' if recipe else '') + '.',
        f'After {study.source}.' if study.source else '',
        study.note,
    ]
    if figure:
        found = published.differences(figure, data, published.network_name(config.model), config.epochs)
        differ = ', '.join(f'{what} ({how})' for what, how in found.items())
        notes.append(
            f'Published: {published.PAPERS[figure.paper]}, {figure.table}, {figure.dataset}, {figure.network}, '
            f'{figure.metric}, best epoch on the test images, one run. '
            + (f'Not a reproduction: these runs differ in {differ}.' if differ else
               'These runs have the same data, network and epochs.'))
    return [note for note in notes if note]


def draw(study: Study) -> Figure:
    """Lines over the axis of a study, or bars where it has none."""
    if study.x:
        fig, axes = figure(size=(6.4, 4.2))
        draw_axis(axes[0, 0], study)
        return fig
    cells = [cell for cell in study.cells if cell.curves]
    fig, axes = figure(size=(6.4, 1.0 + 0.32 * len(cells)))
    values = [(mean, std or 0) for mean, std in (cell.last for cell in cells)]
    means, stds = zip(*values, strict=True)
    bars(axes[0, 0], [cell.name for cell in cells], means, '.2f', stds if any(stds) else None)
    low, high = min(mean - std for mean, std in values), max(mean + std for mean, std in values)
    room = max(high - low, 1)
    axes[0, 0].set(xlim=(max(0, low - 0.5 * room), high + 0.3 * room), title=study.title)
    axes[0, 0].set_xlabel('top-1, last epoch (%): mean, std over seeds (axis not from 0)', fontsize='small')
    return fig


def draw_axis(ax: Axes, study: Study) -> None:
    """Mean and standard deviation of the last epoch over a study's axis; a case without a place there is a level."""
    places = {place for cells in study.lines().values() for place in map(study.place, cells)} - {None}
    for index, (name, cells) in enumerate(study.lines().items()):
        points = [(study.place(cell), *cell.last) for cell in cells if study.place(cell) is not None]
        if study.scale != 'categories':
            points.sort(key=lambda point: point[0])
        if points:
            at, means, stds = zip(*points, strict=True)
            ax.errorbar(at, means, [std or 0 for std in stds], label=name, capsize=3, **line(index))
        for cell in cells:
            if study.place(cell) is None:
                own = f', {shown({study.x: cell.settings[study.x]})}' if study.x in cell.settings else ''
                ax.axhline(cell.last[0], label=name + own, color=color(index), linestyle=':', linewidth=1.2)
    if study.scale == 'log':
        ax.set_xscale('log')
        ax.set_xticks(sorted(places), [f'{place:g}' for place in sorted(places)])
        ax.minorticks_off()
    ax.set(xlabel=short(study.x), ylabel='top-1, last epoch (%), mean and std over seeds', title=study.title)
    ax.legend(fontsize='small')


def draw_curves(study: Study) -> Figure:
    """Top-1 by epoch: a panel for each line of a study, a curve for each of its cases."""
    lines = study.lines() if study.x else {study.title: [cell for cell in study.cells if cell.curves]}
    fig, axes = panels(len(lines), most_columns=2, size=(4.6, 3.6), sharey=True)
    for ax, (name, cells) in zip(axes, lines.items(), strict=True):
        draw_by_epoch(ax, {
            shown({study.x: cell.settings[study.x]}) if study.x in cell.settings else cell.name: cell.curves
            for cell in cells})
        ax.set_title(name)
        if len(lines) > 1:
            ax.legend(fontsize='x-small')
    axes[0].set_ylabel('top-1 (%), mean and range over seeds')
    if len(lines) == 1:
        shared_legend(fig, axes[0])
    return fig
