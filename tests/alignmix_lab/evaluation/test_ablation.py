"""Ablations: grids and studies, jobs that end, fail or are cut, and what is made of their figures."""
import csv
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignmix_lab.classification import TrainConfig
from alignmix_lab.evaluation import published
from alignmix_lab.evaluation.ablation import AblationOptions, Job, load_studies, parse_grid, run_jobs
from alignmix_lab.evaluation.ablation.cli import ablate
from alignmix_lab.evaluation.ablation.grid import STUDIES, Cell, Study, grid_study, parse_settings
from alignmix_lab.evaluation.ablation.jobs import run_job
from alignmix_lab.evaluation.ablation.outcome import Outcome, draw_axis, spread
from alignmix_lab.evaluation.ablation.runs import Plan, run_name
from alignmix_lab.runs.plotting import figure

ROOT = Path(__file__).resolve().parents[3]


def write_run(folder: Path, config: TrainConfig, top1: list[float]) -> None:
    """What a training leaves behind, as far as ablations look at it."""
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(config.to_dict()))
    with (folder / 'summary.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        writer.writerows([epoch, 1.0, 1.0, value, 99.0, 0.1] for epoch, value in enumerate(top1))


@pytest.fixture
def plan(tmp_path) -> Plan:
    """Two seeds and two epochs of the sample."""
    return Plan(None, {'model': 'test_resnet', 'epochs': 2}, [0, 1], tmp_path / 'runs')


# Grids and studies


def test_grid_values_are_yaml():
    assert parse_grid(['mix=multimix,none', 'mix_kwargs.m=null,2', 'mix-kwargs.alpha=1,[0.5,2.0]', 'lr=1e-3']) == {
        'mix': ['multimix', 'none'], 'mix_kwargs.m': [None, 2], 'mix_kwargs.alpha': [1, [0.5, 2.0]], 'lr': [0.001]}
    assert parse_settings(['epochs=5', 'data_dir=/data/x', 'scale=[0.5, 1.0]', 'mix_kwargs.eps=1e-2']) == {
        'epochs': 5, 'data_dir': '/data/x', 'scale': [0.5, 1.0], 'mix_kwargs.eps': 0.01}


@pytest.mark.parametrize('words', [['n'], ['=1'], ['n=1', 'n=2'], ['n='], ['n=[1']])
def test_grid_errors_name_the_word(words):
    with pytest.raises(ValueError, match=r'n?='):
        parse_grid(words)


def test_grid_is_the_product_in_order():
    study = grid_study(parse_grid(['mix=multimix,densemultimix', 'mix_kwargs.n=1,10,1000']))
    assert [(cell.settings['mix'], cell.settings['mix_kwargs.n']) for cell in study.cells] == [
        ('multimix', 1), ('multimix', 10), ('multimix', 1000),
        ('densemultimix', 1), ('densemultimix', 10), ('densemultimix', 1000)]
    assert (study.x, study.scale) == ('mix_kwargs.n', 'log')


def test_papers_studies_have_every_published_case():
    studies = {study.name: study for study in load_studies([str(STUDIES)])}
    named = {cell.published for name in ('alignment', 'resolution') for cell in studies[name].cells}
    table = {figure.method for figure in published.find(paper='A', table='Table 6')}
    assert table - named == {'StyleCutMix'} and named <= table  # the one method that is not ours
    assert [cell.published for cell in studies['iterations'].cells] == [
        figure.method for figure in published.find(paper='A', table='Table 10')]
    for name, values in (('m', [None, 2]), ('n', [100, 1000])):  # Figure 4(b) for two m, (c) for two n
        other = 'n' if name == 'm' else 'm'
        assert {cell.settings[f'mix_kwargs.{name}'] for cell in studies[other].cells} == set(values)


def test_every_case_is_a_command_that_train_imagenet_reads_back(plan, caplog):
    spec = importlib.util.spec_from_file_location('train_imagenet', ROOT / 'train_imagenet.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    studies = load_studies([str(STUDIES)])
    jobs = plan.jobs(studies)
    by_name = {run_name(cell, 0): cell for study in studies for cell in study.cells}
    assert len(jobs) == 2 * len(by_name)
    for name in [*by_name][::4]:  # parsing takes a moment
        command = jobs[name].command
        read = script.parse_config(list(command[2:]))
        wanted = plan.config(by_name[name], 0)
        assert (read.mix, read.seed, read.resume, read.experiment) == (wanted.mix, 0, 'auto', name)
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in read.mix_kwargs.items()} == wanted.mix_kwargs
        assert read.model_kwargs == wanted.model_kwargs and jobs[name].epochs == 2


def test_options_of_the_method_go_with_the_method(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('dataset: torch/cifar100\nmix: multimix\nmix_kwargs: {n: 10, prob: 1.0}\n')
    plan = Plan(str(recipe), {}, [0], tmp_path)
    assert plan.config(Cell({'mix_kwargs.n': 100}), 0).mix_kwargs == {'n': 100, 'prob': 1.0}
    assert plan.config(Cell({'mix': 'alignmix', 'mix_kwargs.eps': 0.2}), 0).mix_kwargs == {'eps': 0.2}
    with pytest.raises(ValueError, match='temperature'):
        plan.config(Cell({'mix_kwargs.temperature': 1}), 0)


def test_wrong_options_stop_before_anything_is_trained(plan):
    study = Study('s', 'S', [{'mix': ['none', 'mixup'], 'epohs': 3}])
    with pytest.raises(ValueError, match=r'study s, none epohs=3: .*epohs; did you mean epochs'):
        plan.jobs([study])
    with pytest.raises(ValueError, match='there is none; did you mean iterations'):
        load_studies(['iteration'])
    with pytest.raises(ValueError, match='either --study or --grid'):
        AblationOptions()


def test_a_folder_of_another_training_is_refused(plan):
    cell = Cell({'mix': 'mixup'})
    write_run(plan.runs / run_name(cell, 0), plan.config(cell, 0), [50.0, 60.0])
    assert plan.job(cell, 0).finished
    other = Plan(plan.recipe, {**plan.settings, 'weight_decay': 0.5}, plan.seeds, plan.runs)
    with pytest.raises(ValueError, match=r'--weight-decay 0\.05, not 0\.5.*--output'):
        other.job(cell, 0)


# Jobs

FAKE = """
import csv, pathlib, signal, sys, time
folder, epochs, wait = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def stop(*_):
    (folder / 'saved').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
folder.mkdir(exist_ok=True)
path = folder / 'summary.csv'
done = len(path.read_text().splitlines()) - 1 if path.exists() else 0
for epoch in range(done, epochs):
    if not epoch:
        path.write_text('epoch,eval_top1\\n')
    if epoch == int(sys.argv[4]):
        raise RuntimeError('out of memory, say')
    with path.open('a') as file:
        file.write(f'{epoch},{50 + epoch}\\n')
    with (folder / 'starts').open('a') as file:
        file.write(f'{done}\\n')
    time.sleep(wait)
"""


def fake_job(folder: Path, epochs: int = 2, wait: float = 0.0, fails_at: int = -1) -> Job:
    """A job that takes no time."""
    return Job(('python', '-c', FAKE, str(folder), str(epochs), str(wait), str(fails_at)), folder, epochs)


def test_failed_jobs_are_reported_and_the_rest_goes_on(tmp_path, caplog):
    jobs = [fake_job(tmp_path / 'a', fails_at=1), fake_job(tmp_path / 'b')]
    failed = run_jobs(jobs)
    assert list(failed) == ['a'] and 'exit code 1' in failed['a'] and 'RuntimeError: out of memory, say' in failed['a']
    assert [job.finished for job in jobs] == [False, True]
    assert 'going on with the rest' in caplog.text
    assert run_jobs([fake_job(tmp_path / 'a'), jobs[1]]) == {}  # goes on at epoch 1; b is not started again
    assert (tmp_path / 'a' / 'starts').read_text().split() == ['0', '1']
    assert (tmp_path / 'b' / 'starts').read_text().split() == ['0', '0']


def test_an_interruption_lets_the_training_save_and_the_next_call_goes_on(tmp_path):
    job = fake_job(tmp_path / 'a', epochs=3, wait=0.5)

    def interrupt(done: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, interrupt)
    assert (job.folder / 'saved').exists() and 0 < job.done() < 3
    assert run_job(job) is None and job.finished
    assert (job.folder / 'starts').read_text().split()[-1] != '0'
    assert [row['epoch'] for row in job.rows()] == ['0', '1', '2']


def test_a_run_that_someone_else_trains_is_left_alone(tmp_path):
    job = fake_job(tmp_path / 'a')
    holder = subprocess.Popen([sys.executable, '-c', (
        'import fcntl, sys, time\n'
        f'file = open({str(job.log)!r}, "a")\n'
        'fcntl.flock(file, fcntl.LOCK_EX)\n'
        'print("held", flush=True)\n'
        'time.sleep(60)\n')], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b'held\n'
        assert 'another process is training it' in run_job(job)
    finally:
        holder.kill()
        holder.communicate()
    assert run_job(job) is None


def test_a_program_that_is_not_there_is_a_failure(tmp_path):
    job = Job(('no-such-launcher', 'train_imagenet.py'), tmp_path / 'a', 1)
    assert 'no-such-launcher cannot be started' in run_job(job)


# Results


def test_spread_by_hand():
    assert spread([]) == (None, None) and spread([3.0]) == (3.0, None)
    mean, std = spread([80.0, 84.0])
    assert mean == 82.0 and std == pytest.approx(math.sqrt(8))


def test_finished_trainings_become_tables_and_pictures(tmp_path, plan):
    values = {('mixup', 0): [81.0, 80.0], ('mixup', 1): [86.0, 84.0], ('none', 0): [10.0, 70.0]}
    for (mix, seed), top1 in values.items():
        cell = Cell({'mix': mix})
        write_run(plan.runs / run_name(cell, seed), plan.config(cell, seed), top1)
    options = AblationOptions(
        grid=['mix=mixup,none'], set=['model=test_resnet', 'epochs=2'], seeds=[0, 1], collect=True,
        output=str(tmp_path), runs=str(plan.runs))
    assert ablate(options, 'python evaluate.py ablation ...') == {}
    found = json.loads((tmp_path / 'ablation.json').read_text())
    first, second = found['rows']
    assert first == {'model': 'test_resnet', 'mix': 'mixup', 'seeds': 2, 'last': 82.0,
                     'last_std': pytest.approx(math.sqrt(8)), 'best': 83.5, 'best_std': pytest.approx(math.sqrt(12.5))}
    assert (second['seeds'], second['last'], second['last_std'], second['best']) == (1, 70.0, None, 70.0)
    assert any('Not finished: none-seed1' in note for note in found['notes'])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ('ablation.png', 'ablation-curves.png'))
    assert '| test_resnet | mixup | 2 | **82.00** | 2.83 |' in (tmp_path / 'ablation.md').read_text()


def test_published_figures_stand_in_the_table_and_what_differs_below(tmp_path, plan):
    (study,) = load_studies(['iterations'])
    for seed in plan.seeds:
        for cell in study.cells:
            write_run(plan.runs / run_name(cell, seed), plan.config(cell, seed), [50.0, 60.0])
    options = AblationOptions(
        study=['iterations'], set=['model=test_resnet', 'epochs=2'], seeds=[0, 1], output=str(tmp_path))
    ablate(options, '')  # all are finished: nothing is started
    found = json.loads((tmp_path / 'ablation-iterations.json').read_text())
    assert [row['published'] for row in found['rows']] == [80.98, 80.96, 81.31, 81.42, 81.71, 81.5, 81.34, 81.28]
    note = next(note for note in found['notes'] if note.startswith('Published'))
    assert 'Not a reproduction' in note and all(word in note for word in ('data (', 'network (', 'epochs (2, not 2000'))


def test_queue_writes_what_is_not_finished(tmp_path, plan):
    cell = Cell({'mix': 'mixup'})
    write_run(plan.runs / run_name(cell, 0), plan.config(cell, 0), [50.0, 60.0])
    options = AblationOptions(
        grid=['mix=mixup'], set=['model=test_resnet', 'epochs=2'], seeds=[0, 1], runs=str(plan.runs),
        output=str(tmp_path), queue=str(tmp_path / 'jobs.txt'), launch='accelerate launch --num_processes 8')
    ablate(options, '')
    (line,) = (tmp_path / 'jobs.txt').read_text().splitlines()
    words = shlex.split(line)
    assert words[:4] == ['accelerate', 'launch', '--num_processes', '8']
    assert words[words.index('--seed') + 1] == '1' and words[-2:] == ['--resume', 'auto']
    assert not (tmp_path / 'ablation.json').exists()


def test_lines_over_a_log_axis_and_the_range_as_a_level():
    (study,) = load_studies(['alpha'])

    def outcome(mix: str, alpha: float | list[float], *last: float) -> Outcome:
        return Outcome(Cell({'mix': mix, 'mix_kwargs.alpha': alpha}), [{0: 1.0, 1: value} for value in last],
                       None if isinstance(alpha, list) else alpha)

    _, axes = figure()
    draw_axis(axes[0, 0], study, [
        outcome('multimix', 1.0, 60.0, 62.0), outcome('multimix', 0.5, 50.0, 54.0),
        outcome('multimix', [0.5, 2.0], 64.0), outcome('densemultimix', 0.5, 70.0)])
    drawn = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes[0, 0].containers}
    assert drawn == {'multimix': [[0.5, 52.0], [1.0, 61.0]], 'densemultimix': [[0.5, 70.0]]}
    (level,) = [line for line in axes[0, 0].lines if 'U[0.5, 2.0]' in str(line.get_label())]
    assert set(level.get_ydata()) == {64.0} and axes[0, 0].get_xscale() == 'log'


def test_a_training_of_the_sample_from_the_command_to_the_picture(tmp_path):
    options = AblationOptions(
        grid=['mix_kwargs.n=5'], seeds=[3], output=str(tmp_path), set=[
            'mix=multimix', 'model=test_resnet', 'img_size=32', 'epochs=1', 'batch_size=256', 'export=none',
            'workers=1'])
    assert ablate(options, '') == {}
    (row,) = json.loads((tmp_path / 'ablation.json').read_text())['rows']
    with (tmp_path / 'runs' / 'n5-seed3' / 'summary.csv').open() as file:
        (epoch,) = csv.DictReader(file)
    assert row['seeds'] == 1 and row['last'] == row['best'] == float(epoch['eval_top1'])
