"""Train a recipe with every value of a grid and several seeds, and compare.

    alignmix ablate --recipe RECIPE --grid mix_kwargs.n=1,10,100,1000 --seeds 0 1 2
    alignmix ablate --recipe RECIPE --study n m alpha --jobs 4
    alignmix ablate --recipe RECIPE --study iterations --launch 'accelerate launch --num_processes 8'
    alignmix ablate --recipe RECIPE --study mixes --queue jobs.txt, and --collect after they ran

Finished runs are kept, interrupted ones resumed; those that fail are reported while the rest goes on. Without a recipe
and data the runs are on the built-in sample.
"""
import itertools
import logging
import re
import shlex
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import setup_default_logging

from alignmix_lab.classification.config import TrainConfig, resolve_config
from alignmix_lab.runs import options as opts
from alignmix_lab.runs import plotting
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.jobs import Job, describe_jobs, run_jobs
from alignmix_lab.runs.timing import hardware

from . import published
from .over_seeds import evaluated, paired_difference
from .result import Column, Result, environment, table, write_result
from .studies import STUDIES, Cell, Study, grid_study, load_studies, parse_words, short, shown

_logger = logging.getLogger(__name__)
_what = partial(opts.config_option, 'What to compare')
_how = partial(opts.config_option, 'How to train')
_run = partial(opts.config_option, 'Run, logs and checkpoints')

SCRIPT = Path(__file__).resolve().parents[2] / 'train_imagenet.py'  # of a clone


@dataclass
class AblationOptions(opts.Options):
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
    evaluated: str = _run(
        '', "folder of results of `alignmix evaluate` on the runs' last.pth.tar, which the tables add up over seeds")
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


def main(argv: list[str] | None = None, prog: str = 'alignmix ablate') -> None:
    """Run, plan or collect an ablation; the exit code is 1 where a run failed."""
    setup_default_logging()
    logging.getLogger('alignmix_lab.classification.config').setLevel(logging.WARNING)  # one line a run on its defaults
    text = f'{__doc__}\nStudies of the papers: {", ".join(study.name for study in load_studies([str(STUDIES)]))}.'
    usage = '%(prog)s (--study NAME ... | --grid OPTION=VALUES ...) [options]'
    options = opts.parse_flags(
        opts.create_parser(AblationOptions, usage, text, prog), AblationOptions, lambda flags, file: AblationOptions(
            **{**(opts.read_yaml(file, AblationOptions) if file else {}), **flags}), argv)
    try:
        with opts.exit_with_message(prog):
            failed = ablate(options, f'{prog} {shlex.join(sys.argv[1:] if argv is None else argv)}')
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command continues.')
    if failed:
        sys.exit(1)


def ablate(options: AblationOptions, command: str) -> dict[str, str]:
    """Train what is missing and write the results of every study; returns why runs failed, by name.

    A ValueError says that an option is wrong, or a folder has a run of other options; nothing has been trained then.
    """
    studies = load_studies(options.study) if options.study else [grid_study(parse_words(options.grid, '--grid'))]
    jobs = plan(options, studies)
    _logger.info(describe_jobs(jobs, options.jobs))
    if options.dry_run:
        print('\n'.join(f'{job.name}: {job.done} of {job.epochs} epochs' for job in jobs))
        return {}
    if options.queue:
        commands = [shlex.join(job.command) + '\n' for job in jobs if not job.finished]
        write_whole(Path(options.queue), ''.join(commands))
        _logger.info(f'{options.queue}: {len(commands)} commands, to be run in {Path.cwd()}; after them --collect')
        return {}
    failed = {} if options.collect else run_jobs(jobs, options.jobs, options.progress)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    facts = {
        'command': command,
        'environment': {**environment(device, 1), 'device': hardware(device).partition(', torch')[0]},
        'options': {name: getattr(options, name) for name in ('recipe', 'set', 'seeds', 'launch')}}
    for study in studies:
        name = 'ablation' if study.name == 'grid' else f'ablation-{study.name}'
        results = {name: make_result(study, options, failed)}
        if options.evaluated:
            results[f'{name}-evaluated'] = evaluated(study, Path(options.evaluated))
        for file, result in results.items():
            files = write_result(Path(options.output), file, study.title, result, facts)
            print(f'\n{study.title}\n\n{table(result)}\n', flush=True)
            _logger.info('Written: ' + ', '.join(map(str, files)))
    return failed


# Runs

def plan(options: AblationOptions, studies: list[Study]) -> list[Job]:
    """Plan the runs, shared ones once; seed by seed, so that unfinished studies still compare. May raise ValueError."""
    jobs: dict[Path, Job] = {}
    for seed, study in itertools.product(options.seeds, studies):
        for cell in study.cells:
            try:
                job = cell.jobs[seed] = make_job(options, cell, seed)
                if jobs.setdefault(job.folder, job) != job:
                    raise ValueError(f'another case has the same name in files, {job.folder.name}')
            except ValueError as e:
                said = str(e).replace('--config', '--recipe')
                raise ValueError(f'study {study.name}, {cell.name}: {said}') from e
    return [*jobs.values()]


def make_job(options: AblationOptions, cell: Cell, seed: int) -> Job:
    """Plan the run of a case with a seed, and give the case all its options. Every study has the same name for it."""
    settings = dict(sorted(cell.settings.items()))  # in any order the run is the same
    name = [str(settings['mix'])] if 'mix' in settings else []
    for key, value in settings.items():
        text = '_'.join(map(str, value)) if isinstance(value, list) else shown(value)
        name += [short(key) + re.sub(r'[^A-Za-z0-9.]+', '_', text)] if key != 'mix' else []
    folder = Path(options.runs or f'{options.output}/runs') / '-'.join([*name, f'seed{seed}'])
    kinds = {option.name: option.metadata['type'] for option in fields(TrainConfig)}
    flags, nested = {}, {}
    for key, value in {**parse_words(options.set or (), '--set'), **settings, 'seed': seed}.items():
        option, dot, entry = key.partition('.')
        if option not in kinds or (dot and kinds[option] is not dict):
            raise ValueError(f'no option {key}{opts.near_names(option, kinds)} (those of a method: mix_kwargs.NAME)')
        (nested.setdefault(option, {}) if dot else flags)[entry or option] = value
    base = resolve_config(flags, options.recipe)
    flags |= {option: {**getattr(base, option), **entries} for option, entries in nested.items()}
    cell.config = config = resolve_config(flags, options.recipe)
    args = folder / 'args.yaml'
    earlier = yaml.safe_load(args.read_text(encoding='utf-8')) if args.is_file() else {}
    if changed := ', '.join(opts.changed_options(config, earlier)):
        raise ValueError(f'{folder} holds a run with other options ({changed}); name another --output or remove it')
    script = SCRIPT.relative_to(Path.cwd()) if SCRIPT.is_relative_to(Path.cwd()) else SCRIPT
    command = [
        *shlex.split(options.launch),
        *([str(script)] if SCRIPT.is_file() else ['-m', 'alignmix_lab', 'train']),
        *(['-c', options.recipe] if options.recipe else []),
        *(word for key, value in {'checkpoint_hist': 1, **flags}.items() for word in opts.option_words(key, value)),
        '--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)  # the schedule knows how many epochs it has
    _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=1)
    return Job(command, folder, min(epochs, config.stop_epoch or epochs))


# Results

def make_result(study: Study, options: AblationOptions, failed: dict[str, str]) -> Result:
    """Table, notes and pictures of a study, from whatever is finished."""
    figures = {f.method: f for f in published.find(paper=study.paper, table=study.table)} if study.table else {}
    columns = {
        **{key: Column(short(key)) for key in study.columns},
        'seeds': Column('seeds', 'd'),
        'last': Column('top-1, last epoch (%)', '.2f', 'higher'),
        'last_std': Column('std', '.2f'),
        'difference': Column(f'difference to {shown(study.reference)}', '+.2f'),
        'interval': Column('± (95 %)', '.2f'),
        'published': Column('published (%)', '.2f'),
    }
    for cell in study.cells:
        cell.curves = {seed: job.curve for seed, job in cell.jobs.items() if job.finished}
    rows = []
    for cell in study.cells:
        row = {'model': cell.config.model, **study.columns_of(cell), 'seeds': len(cell.curves)}
        row['last'], row['last_std'] = cell.score
        if study.reference:
            other = study.reference_of(cell)
            row['difference'], row['interval'] = paired_difference(cell.last, other.last if other else {})
        if figures:
            row['published'] = figures[cell.published].value if cell.published in figures else None
        rows.append(row)
    runs = [(cell, seed, job) for cell in study.cells for seed, job in cell.jobs.items()]
    missing = ', '.join(job.name for _, _, job in runs if job.name not in failed and not job.finished)
    notes = [
        *list_notes(study, options.recipe, next(iter(figures.values()), None)),
        *(f'Failed: {job.name}: {failed[job.name].splitlines()[0]}.' for _, _, job in runs if job.name in failed),
        *([f'Not finished: {missing}.'] if missing else [])]
    details = {'study': study.name, 'source': study.source, 'reference': study.reference, 'runs': [
        {'run': job.name, 'settings': cell.settings, 'seed': seed, 'command': ' '.join(job.command), 'top1': job.curve}
        for cell, seed, job in runs]}
    pictures = {'': draw(study), 'curves': draw_curves(study)} if study.lines() else {}
    return Result({key: columns[key] for key in columns if key in rows[0]}, rows, notes, details, pictures)


def list_notes(study: Study, recipe: str, figure: published.Figure | None) -> list[str]:
    """Notes on the table; `figure` is one of the published ones that it holds."""
    config = study.cells[0].config
    data = published.data_name(config.dataset, config.data_dir)
    notes = [
        'Mean over seeds; std: sample standard deviation.',
        f'Difference to {shown(study.reference)}: at the last epoch, paired by seed, mean ± half the 95 % interval of '
        "Student's t over seeds. An interval that contains 0 shows no difference; that there are few test images, or "
        'many cases, is not in it.' if study.reference else '',
        f'Trained: {config.model} on {data}, {config.epochs} epochs, batch {config.batch_size}'
        + (f', recipe {recipe}' if recipe else '') + '.',
        f'After {study.source}.' if study.source else '', study.note]
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
    """Mean and standard deviation of the last epoch: lines over the axis of a study, or bars where it has none."""
    cells = [cell for cell in study.cells if cell.curves]
    fig, axes = plotting.figure(size=(6.4, 4.2 if study.x else 1.0 + 0.32 * len(cells)))
    ax, label = axes[0, 0], 'top-1, last epoch (%): mean, std over seeds'
    if study.x:
        drawn = {study.place(cell) for cell in cells}
        places = [place for place in dict.fromkeys(map(study.place, study.cells)) if place in drawn]
        for index, (name, own) in enumerate(study.lines().items()):
            points = [(places.index(study.place(cell)), cell.score[0], cell.score[1] or 0) for cell in own]
            ax.errorbar(*zip(*points, strict=True), label=name, capsize=3, **plotting.line(index))
        ax.set_xticks(range(len(places)), places)
        ax.set(xlabel=short(study.x), ylabel=label)
        ax.legend(fontsize='small')
    else:
        means, stds = zip(*((cell.score[0], cell.score[1] or 0) for cell in cells), strict=True)
        plotting.bars(ax, [cell.name for cell in cells], means, '.2f', stds if any(stds) else None)
        low, high = min(means) - max(stds), max(means) + max(stds)
        room = max(high - low, 1)
        ax.set_xlim(max(0, low - 0.5 * room), high + 0.3 * room)
        ax.set_xlabel(f'{label} (axis not from 0)', fontsize='small')
    ax.set_title(study.title)
    return fig


def draw_curves(study: Study) -> Figure:
    """Top-1 by epoch: a panel for each line of a study, a curve for each of its cases."""
    lines = study.lines() if study.x else {study.title: [cell for cell in study.cells if cell.curves]}
    fig, axes = plotting.panels(len(lines), most_columns=2, size=(4.6, 3.6), sharey=True)
    for ax, (name, cells) in zip(axes, lines.items(), strict=True):
        plotting.draw_by_epoch(ax, {
            shown({study.x: cell.settings[study.x]}) if study.x in cell.settings else cell.name:
            [*cell.curves.values()] for cell in cells})
        ax.set_title(name)
        if len(lines) > 1:
            ax.legend(fontsize='x-small')
    axes[0].set_ylabel('top-1 (%), mean and range over seeds')
    if len(lines) == 1:
        plotting.shared_legend(fig, axes[0])
    return fig
