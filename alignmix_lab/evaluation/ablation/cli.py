"""The command line of ablations."""
import logging
import shlex
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.options import Options, config_option, create_parser, parse_flags, read_yaml
from alignmix_lab.runs.plotting import as_png
from alignmix_lab.runs.timing import hardware

from ..result import environment, table, write_result
from .grid import STUDIES, Study, grid_study, load_studies, parse_grid, parse_settings
from .jobs import Job, run_jobs, write_queue
from .outcome import draw_together, make_result
from .runs import Plan

_logger = logging.getLogger(__name__)
_what = partial(config_option, 'What to compare')
_how = partial(config_option, 'Trainings')
_run = partial(config_option, 'Run, logs and checkpoints')

HELP = """Train a recipe with every value of a grid and several seeds, and compare.

    alignmix ablate --recipe FILE --grid mix_kwargs.n=1,10,100,1000 --seeds 0 1 2
    alignmix ablate --recipe FILE --study n m alpha
    alignmix ablate --recipe FILE --study iterations --launch 'accelerate launch --num_processes 8'
    alignmix ablate --recipe FILE --study mixes --queue jobs.txt, and after they ran --collect

Studies of the papers: {studies}.
Trainings go through train_imagenet.py. Those that are finished are kept, those that were cut are resumed, those that
fail are reported and the rest goes on. Without --recipe the options are those of train_imagenet.py, on the sample."""


@dataclass
class AblationOptions(Options):
    """Options of evaluate.py ablation."""

    recipe: str = _what('', 'YAML file of train_imagenet.py that all trainings start from')
    study: list[str] | None = _what(None, 'studies of the papers, or YAML files of studies', nargs='+')
    grid: list[str] | None = _what(
        None, 'values of options, all combinations: mix_kwargs.n=1,10,100 mix=multimix,densemultimix', nargs='+')
    set: list[str] | None = _what(
        None, 'options of every training over the recipe: data_dir=DIR epochs=10', nargs='+')
    seeds: list[int] = _what([0, 1, 2], 'seeds of every case', int, nargs='+', low=0)

    launch: str = _how('python', "what starts train_imagenet.py, e.g. 'accelerate launch --num_processes 8'")
    queue: str = _how('', 'train nothing, write the commands of what is not finished to this file, one a line')
    collect: bool = _how(False, 'train nothing, show what is finished', bool)

    output: str = _run('./output/ablation', 'folder of the results')
    runs: str = _run('', "folder of the trainings' folders; default: runs in --output")
    progress: bool = _run(False, 'progress bar even where the output is no terminal', bool)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.study) == bool(self.grid):
            raise ValueError('say what to compare: either --study or --grid')
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f'--seeds must be different, got {self.seeds}')
        if self.queue and self.collect:
            raise ValueError('--queue writes what is to be trained, --collect shows what was: one at a time')
        if self.recipe and not Path(self.recipe).is_file():
            raise ValueError(f'--recipe {self.recipe}: no such file')


def main(argv: list[str] | None = None, prog: str = 'alignmix ablate') -> None:
    """Run, queue or collect an ablation; the exit code is 1 where a training failed."""
    names = ', '.join(study.name for study in load_studies([str(STUDIES)]))
    parser = create_parser(AblationOptions, '%(prog)s (--study NAME ... | --grid OPTION=VALUES ...) '
                               '[options]', HELP.format(studies=names), prog)
    options = parse_flags(parser, AblationOptions, _resolve, argv)
    words = sys.argv[1:] if argv is None else argv
    try:
        failed = ablate(options, shlex.join(['alignmix', 'ablate', *words]))
    except (ValueError, OSError) as e:
        sys.exit(f'{prog}: error: {e}')
    except KeyboardInterrupt:
        sys.exit('Interrupted. The same command goes on where this one was.')
    if failed:
        sys.exit(1)


def _resolve(flags: dict[str, Any], file: str | None) -> AblationOptions:
    return AblationOptions(**{**(read_yaml(file, AblationOptions) if file else {}), **flags})


def ablate(options: AblationOptions, command: str) -> dict[str, str]:
    """Train what is missing, and write the results of every study.

    Args:
        options: The options.
        command: The command that says them, for the results.

    Returns:
        Of each training that failed, by its name, why.

    Raises:
        ValueError: A wrong option, or a folder with a training of other options; nothing is trained then.
    """
    logging.getLogger('alignmix_lab.classification.config').setLevel(logging.WARNING)  # says the sample's every time
    studies = load_studies(options.study) if options.study else [grid_study(parse_grid(options.grid))]
    output = Path(options.output)
    plan = Plan(options.recipe or None, parse_settings(options.set or []), options.seeds,
                Path(options.runs) if options.runs else output / 'runs', options.launch)
    jobs = plan.jobs(studies)
    done = sum(job.finished for job in jobs.values())
    _logger.info(f'{len(jobs)} trainings, {sum(job.epochs for job in jobs.values())} epochs; {done} are finished')
    if options.queue:
        with open(options.queue, 'w', encoding='utf-8') as file:
            count = write_queue(list(jobs.values()), file)
        _logger.info(f'{options.queue}: {count} commands, to be run in {Path.cwd()}; --collect shows what came out')
        return {}
    failed: dict[str, str] = {}
    if not options.collect:
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        with logging_redirect_tqdm():
            failed = run_jobs(list(jobs.values()), options.progress)
    for study in studies:
        write_study(study, plan, jobs, failed, output, command)
    with_lines = [study for study in studies if study.x]
    if len(with_lines) > 1 and any(job.finished for job in jobs.values()):
        write_whole(output / 'ablation-together.png', as_png(draw_together(with_lines, plan, jobs)))
    return failed


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def write_study(
        study: Study,
        plan: Plan,
        jobs: dict[str, Job],
        failed: dict[str, str],
        output: Path,
        command: str,
) -> None:
    """Write and print the results of a study."""
    result = make_result(study, plan, jobs, failed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    facts = {
        'command': command,
        'environment': {**environment(device, 1), 'device': hardware(device).partition(', torch')[0]},
        'data': None,
        'options': {'recipe': plan.recipe, 'set': plan.settings, 'seeds': plan.seeds, 'launch': plan.launch},
        'models': [],
    }
    name = 'ablation' if study.name == 'grid' else f'ablation-{study.name}'
    files = write_result(output, name, study.title, result, facts)
    print(f'\n{study.title}\n\n{table(result)}\n', flush=True)
    _logger.info('Written: ' + ', '.join(map(str, files)))
