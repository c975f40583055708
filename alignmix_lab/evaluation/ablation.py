"""Train a recipe with every value of a grid and several seeds, and compare.

    alignmix ablate --recipe RECIPE --grid mix_kwargs.n=1,10,100,1000 --seeds 0 1 2
    alignmix ablate --recipe RECIPE --study n m alpha --jobs 4
    alignmix ablate --recipe RECIPE --study iterations --launch 'accelerate launch --num_processes 8'
    alignmix ablate --recipe RECIPE --study mixes --queue jobs.txt, and --collect after they ran

Finished runs are kept, interrupted ones resumed; those that fail are reported while the rest goes on. Without a recipe
and data the runs are on the built-in sample.
"""
import csv
import itertools
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from matplotlib.figure import Figure
from scipy.special import stdtrit
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import setup_default_logging
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from alignmix_lab.classification.config import TrainConfig, resolve_config
from alignmix_lab.runs import options as opts
from alignmix_lab.runs import plotting
from alignmix_lab.runs.agreement import StopSignals
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.run_report import seconds_per_epoch
from alignmix_lab.runs.timing import hardware

from . import published
from .result import Column, Result, environment, table, write_result

_logger = logging.getLogger(__name__)
_what = partial(opts.config_option, 'What to compare')
_how = partial(opts.config_option, 'How to train')
_run = partial(opts.config_option, 'Run, logs and checkpoints')

STUDIES = Path(__file__).with_name('studies.yaml')
SCRIPT = Path(__file__).resolve().parents[2] / 'train_imagenet.py'  # of a clone
GRACE = 120  # seconds that interrupted runs have to save their state
LAUNCHER = 'ALIGNMIX_ABLATION'  # environment variable of all processes of the runs: process id of the ablation


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
        result = make_result(study, options, failed)
        name = 'ablation' if study.name == 'grid' else f'ablation-{study.name}'
        files = write_result(Path(options.output), name, study.title, result, facts)
        print(f'\n{study.title}\n\n{table(result)}\n', flush=True)
        _logger.info('Written: ' + ', '.join(map(str, files)))
    return failed


# Studies: which options take which values

@dataclass(frozen=True)
class Job:
    """A run and its command; it is finished when its summary.csv has the last epoch, whoever ran the command."""
    command: list[str]  # resumes the run where there is one; 'python' is this interpreter
    folder: Path
    epochs: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def curve(self) -> dict[int, float]:
        """Top-1 (%) by epoch, of the epochs that were evaluated."""
        path = self.folder / 'summary.csv'
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        return {int(row['epoch']): float(row['eval_top1']) for row in csv.DictReader(lines) if row['eval_top1']}

    @property
    def done(self) -> int:
        """Epochs up to the last evaluation."""
        return min(max(self.curve, default=-1) + 1, self.epochs)

    @property
    def finished(self) -> bool:
        return self.done == self.epochs

    def start(self, variables: dict[str, str]) -> subprocess.Popen:
        """Run the command with more environment variables; its output goes beside the folder, which it makes."""
        words = [sys.executable, *self.command[1:]] if self.command[0] == 'python' else self.command
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f'{self.folder}.log', 'a', encoding='utf-8') as log:
            print('$', shlex.join(self.command), file=log, flush=True)
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,  # Ctrl-C is ours
                env={**os.environ, **variables, LAUNCHER: str(os.getpid())})


@dataclass
class Cell:
    """A case of a study: what is trained with every seed."""
    settings: dict[str, Any]  # an option of the method is mix_kwargs.NAME
    name: str = ''
    published: str = ''  # name of the method in published.csv
    config: TrainConfig | None = None
    jobs: dict[int, Job] = field(default_factory=dict)  # by seed
    curves: dict[int, dict[int, float]] = field(default_factory=dict)  # of finished jobs

    @property
    def last(self) -> dict[int, float]:
        """Top-1 (%) at the last epoch, by seed."""
        return {seed: curve[max(curve)] for seed, curve in self.curves.items()}

    @property
    def score(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of top-1 at the last epoch."""
        return plotting.spread([*self.last.values()])


@dataclass
class Study:
    """Cases that are compared; studies.yaml describes the fields."""
    name: str
    title: str
    cases: list[dict[str, Any]]
    source: str = ''
    set: dict[str, Any] = field(default_factory=dict)
    x: str | None = None
    paper: str | None = None
    table: str | None = None
    note: str = ''
    reference: str | dict[str, Any] | None = None

    def __post_init__(self):
        if not self.cases:
            raise ValueError(f'study {self.name} needs cases')
        cells = {}
        for case in self.cases:
            grid = {key: value for key, value in case.items() if key not in ('label', 'published')}
            for values in itertools.product(*(v if isinstance(v, list) else [v] for v in grid.values())):
                own = dict(zip(grid, values, strict=True))
                method = re.sub('{(.+?)}', lambda m, own=own: str(own.get(m[1], m[0])), case.get('published', ''))
                settings = {**self.set, **own}
                cells[repr(sorted(settings.items()))] = Cell(settings, case.get('label') or shown(settings), method)
        self.cells = list(cells.values())
        keys = dict.fromkeys(key for cell in self.cells for key in cell.settings)
        self.keys = [key for key in keys if len({repr(cell.settings.get(key, '')) for cell in self.cells}) > 1]
        if self.reference and not any(map(self.reference_of, self.cells)):
            raise ValueError(f'study {self.name}: no case is the reference {shown(self.reference)}')

    def reference_of(self, cell: Cell) -> Cell | None:
        """The case that a case is compared with; first of all one that differs in the reference's settings alone."""
        wanted = [self.reference]
        if isinstance(self.reference, dict):
            wanted = [{**cell.settings, **self.reference}, {**self.set, **self.reference}]
        found = (other for known in wanted for other in self.cells if known in (other.name, other.settings))
        return next((other for other in found if other is not cell), None)

    def lines(self) -> dict[str, list[Cell]]:
        """Cases with finished runs, by what they differ in other than the horizontal axis."""
        lines: dict[str, list[Cell]] = {}
        for cell in self.cells:
            own = {key: cell.settings[key] for key in self.keys if key != self.x and key in cell.settings}
            if cell.curves:
                lines.setdefault(shown(own) or str(cell.settings.get('mix', 'top-1')), []).append(cell)
        return lines

    def place(self, cell: Cell) -> str:
        """Where a case stands on the horizontal axis."""
        return shown(cell.settings.get(self.x, cell.name))


def short(key: str) -> str:
    """An option's own name."""
    return key.rpartition('.')[2]


def shown(value: Any) -> str:
    """A value, or several options and values, in tables, pictures and names."""
    if isinstance(value, dict):
        return ' '.join(shown(v) if key == 'mix' else f'{short(key)}={shown(v)}' for key, v in value.items())
    if isinstance(value, list):
        return f'U[{", ".join(map(str, value))}]'
    return {'None': 'all', 'True': 'on', 'False': 'off'}.get(str(value), str(value))


def parse_words(words: list[str], flag: str) -> dict[str, Any]:
    """Options from words such as `epochs=5`, or for --grid lists of values from `mix_kwargs.n=1,10`, all in YAML."""
    options = {}
    for word in words:
        key, _, text = word.partition('=')
        key = key.removeprefix('--').replace('-', '_')
        if not key or not text or key in options:
            raise ValueError(f'{flag} takes OPTION=VALUE, each option once, got {word!r}')
        options[key] = opts.load_yaml(f'[{text}]' if flag == '--grid' else text, f'{flag} {word}')
    return options


def grid_study(grid: dict[str, list[Any]]) -> Study:
    """The study of all combinations; the last option with several numbers is the horizontal axis."""
    x = next((key for key in reversed(grid) if sum(type(value) in (int, float) for value in grid[key]) > 1), None)
    return Study('grid', f'Grid of {", ".join(map(short, grid))}', [grid], x=x,
                 reference={'mix': 'none'} if {'none'} < {*map(str, grid.get('mix', ()))} else None)


def load_studies(names: list[str]) -> list[Study]:
    """Studies of the papers by name, or all of a YAML file; a ValueError says what is wrong with one."""
    studies = []
    for name in names:
        path = Path(name) if name.endswith(('.yaml', '.yml')) else STUDIES
        try:
            entries = opts.load_yaml(path.read_text(encoding='utf-8'), str(path))
            known = {key: Study(key, **entry) for key, entry in entries.items()}
        except (OSError, AttributeError, TypeError) as e:
            raise ValueError(f'--study {name}: {e}') from e
        if path is STUDIES and name not in known:
            near = opts.near_names(name, known)
            raise ValueError(f'--study {name}: there is none{near}; there are {", ".join(known)}, or a YAML file')
        studies += [known[name]] if path is STUDIES else known.values()
    return studies


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


def describe_jobs(jobs: list[Job], at_once: int = 1) -> str:
    """Count runs and epochs, and estimate the time that is left where finished runs tell how long an epoch takes."""
    finished = [job for job in jobs if job.finished]
    total, done = sum(job.epochs for job in jobs), sum(job.done for job in jobs)
    text = f'Runs: {len(jobs)}, {len(finished)} finished; epochs: {total}, {done} done'
    paces = [pace for pace in (seconds_per_epoch(job.folder) for job in finished) if pace is not None]
    if paces and done < total:
        seconds = sum(paces) / len(paces) * (total - done) / min(at_once, len(jobs) - len(finished))
        text += f'; the rest takes about {timedelta(seconds=round(seconds))} at the pace of the finished runs'
    return text


def run_jobs(jobs: list[Job], at_once: int = 1, progress: bool = False) -> dict[str, str]:
    """Run what is not finished, `at_once` runs at a time; returns why runs failed, by name.

    SIGTERM, SIGINT and SIGHUP are passed on; when the runs have saved their state, KeyboardInterrupt is raised.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    stop = StopSignals([number for number in numbers if signal.getsignal(number) != signal.SIG_IGN])  # as by nohup
    done = {job.name: job.done for job in jobs}
    waiting = [job for job in jobs if not job.finished]
    running: dict[int, tuple[Job, subprocess.Popen]] = {}  # by slot
    failed: dict[str, str] = {}
    bar = tqdm(total=sum(job.epochs for job in jobs), initial=sum(done.values()), unit='epoch',
               disable=not (progress or sys.stderr.isatty()))
    with stop.listening(), logging_redirect_tqdm(), bar:
        try:
            while (waiting or running) and not stop.received:
                for slot in sorted({*range(at_once)} - {*running})[:len(waiting)]:
                    running[slot] = waiting[0], waiting[0].start(gpu_share(slot, at_once))
                    del waiting[0]
                bar.set_description(', '.join(job.name for job, _ in running.values()))
                time.sleep(0.2)
                ended = [slot for slot, (_, process) in running.items() if process.poll() is not None]
                done |= {job.name: job.done for job, _ in running.values()}
                bar.update(sum(done.values()) - bar.n)
                for job, process in map(running.pop, [] if stop.received else ended):
                    title = f'[{jobs.index(job) + 1}/{len(jobs)}] {job.name}'
                    if process.returncode == 0 and job.finished:
                        _logger.info(f'{title}: top-1 {job.curve[max(job.curve)]:.2f} % after {job.epochs} epochs')
                        continue
                    log = Path(f'{job.folder}.log')
                    ending = log.read_text(encoding='utf-8', errors='replace').splitlines()[-15:]
                    reason = f'exit code {process.returncode} after {job.done} epochs; {log} ends with'
                    failed[job.name] = '\n    '.join([reason, *ending])
                    _logger.error(f'{title} failed, going on with the rest: {failed[job.name]}')
        finally:
            if running or stop.received:
                end_runs()
    if stop.received:
        raise KeyboardInterrupt
    return failed


def end_runs() -> None:
    """Let all processes of the runs save and end; a launcher may have ended before what it launched."""
    _logger.warning(f'Interrupted, waiting up to {GRACE} s for the runs to save their state')
    family = [process for process in psutil.process_iter(['environ'])
              if (process.info['environ'] or {}).get(LAUNCHER) == str(os.getpid())]
    for ask, seconds in ((psutil.Process.terminate, GRACE), (psutil.Process.kill, 10)):
        for process in family:
            with suppress(psutil.NoSuchProcess):
                ask(process)
        _, family = psutil.wait_procs(family, seconds)


def gpu_share(slot: int, slots: int) -> dict[str, str]:
    """Environment variables that give one of several runs at a time its share of the GPUs."""
    if slots == 1 or not torch.cuda.device_count():
        return {}
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))).split(',')
    each = len(gpus) // slots
    return {'CUDA_VISIBLE_DEVICES': ','.join(gpus[slot * each:(slot + 1) * each]) or gpus[slot % len(gpus)]}


# Results

def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float | None, float | None]:
    """Mean difference over the seeds that both have, and half its 95 % interval by Student's t.

    Both are None for fewer than two seeds.

    Example:
        >>> paired_difference({0: 81.0, 1: 83.0, 2: 85.0}, {0: 80.0, 1: 81.0})
        (1.5, 6.353...)
    """
    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    mean, std = plotting.spread(differences)
    if std is None:
        return None, None
    return mean, float(stdtrit(len(differences) - 1, 0.975)) * std / len(differences) ** 0.5


def make_result(study: Study, options: AblationOptions, failed: dict[str, str]) -> Result:
    """Table, notes and pictures of a study, from whatever is finished."""
    keys = ['case'] if any('label' in case for case in study.cases) else study.keys
    figures = {f.method: f for f in published.find(paper=study.paper, table=study.table)} if study.table else {}
    columns = {
        **{key: Column(short(key)) for key in keys},
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
        values = {'case': cell.name, **{key: shown(value) for key, value in cell.settings.items()}}
        row = {'model': cell.config.model, **{key: values.get(key) for key in keys}, 'seeds': len(cell.curves)}
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
