"""Ablations: the commands they come to, and what is made of their figures."""
import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import yaml
from scipy import stats

from alignmix_lab.classification import TrainConfig
from alignmix_lab.commands.train import parse_config
from alignmix_lab.evaluation import ablation
from alignmix_lab.evaluation.ablation import AblationOptions, ablate, draw, main, make_job, plan
from alignmix_lab.evaluation.studies import STUDIES, Cell, Study, load_studies
from alignmix_lab.runs.files import lock_file
from alignmix_lab.runs.run_report import seconds_per_epoch

SETTINGS = ['model=test_resnet', 'epochs=2']


def write_run(folder: Path, config: TrainConfig, top1: list[float]) -> None:
    """What a training leaves behind, as far as ablations look at it."""
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(config.to_dict()))
    with (folder / 'summary.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        writer.writerows([epoch, 1.0, 1.0, value, 99.0, 0.1] for epoch, value in enumerate(top1))


@pytest.fixture
def options(tmp_path) -> AblationOptions:
    """Two seeds and two epochs of the sample."""
    return AblationOptions(grid=['mix=mixup,none'], set=SETTINGS, seeds=[0, 1], output=str(tmp_path))


def finish(options: AblationOptions, top1: dict[tuple[str, int], list[float]]) -> None:
    """Pretend that some of the runs have been trained: top-1 by epoch, by case and seed."""
    for (mix, seed), values in top1.items():
        cell = Cell({'mix': mix})
        job = make_job(options, cell, seed)
        write_run(job.folder, cell.config, values)


def test_every_case_is_a_command_that_training_reads_back(options):
    studies = load_studies([str(STUDIES)])
    jobs = plan(options, studies)
    by_name = {cell.jobs[0].name: cell for study in studies for cell in study.cells}
    assert len(jobs) == len({job.name for job in jobs}) == 2 * len(by_name)
    shared = [{cell.jobs[0].name for cell in study.cells} for study in studies if study.name in ('n', 'm')]
    assert 'multimix-m2-n1000-seed0' in shared[0] & shared[1]  # though they name n and m in another order
    for name in [*by_name][::4]:  # parsing takes a moment
        job = by_name[name].jobs[0]
        assert job in jobs
        assert [*job.command[:2]] == ['python', 'train_imagenet.py']
        read, wanted = parse_config([*job.command[2:]]), by_name[name].config
        assert (read.mix, read.seed, read.resume, read.experiment) == (wanted.mix, 0, 'auto', name)
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in read.mix_kwargs.items()} == wanted.mix_kwargs
        assert read.model_kwargs == wanted.model_kwargs and job.epochs == 2


def test_an_installed_package_trains_as_a_module(options, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, 'SCRIPT', tmp_path / 'train_imagenet.py')
    options.launch = 'accelerate launch --num_processes 8'
    command = [*make_job(options, Cell({'mix': 'mixup'}), 0).command]
    assert command[:7] == ['accelerate', 'launch', '--num_processes', '8', '-m', 'alignmix_lab', 'train']
    assert parse_config(command[7:]).mix == 'mixup'


def test_the_script_is_that_of_the_clone_wherever_the_command_runs(options, monkeypatch, tmp_path):
    (tmp_path / 'train_imagenet.py').write_text('raise SystemExit("that of another project")')
    monkeypatch.chdir(tmp_path)
    job = make_job(options, Cell({'mix': 'mixup'}), 0)
    assert job.command[1] == str(ablation.SCRIPT)


def test_epochs_are_those_of_the_whole_schedule(options):
    cell = Cell({'cooldown_epochs': 3, 'warmup_epochs': 1, 'warmup_prefix': True})
    assert make_job(options, cell, 0).epochs == 2 + 3 + 1


def test_options_of_the_method_go_with_the_method(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('dataset: torch/cifar100\nmix: multimix\nmix_kwargs: {n: 10, prob: 1.0}\n'
                      'mixes: {mixup: {batch_size: 32, mix_kwargs: {per_example: true}}}\n')
    options = AblationOptions(recipe=str(recipe), study=['n'], output=str(tmp_path))

    def resolved(**settings: object) -> TrainConfig:
        cell = Cell({key.replace('__', '.'): value for key, value in settings.items()})
        command = make_job(options, cell, 0).command
        assert parse_config([*command[2:]]).mix_kwargs == cell.config.mix_kwargs
        return cell.config

    assert resolved(mix_kwargs__n=100).mix_kwargs == {'n': 100, 'prob': 1.0}
    assert resolved(mix='alignmix', mix_kwargs__eps=0.2).mix_kwargs == {'eps': 0.2}
    mixup = resolved(mix='mixup', mix_kwargs__alpha=0.2)
    assert mixup.mix_kwargs == {'per_example': True, 'alpha': 0.2} and mixup.batch_size == 32
    with pytest.raises(ValueError, match='temperature'):
        resolved(mix_kwargs__temperature=1)


def test_wrong_options_stop_before_anything_is_trained(options, tmp_path):
    with pytest.raises(ValueError, match=r'study s, none epohs=3: .*epohs; did you mean epochs'):
        plan(options, [Study('s', 'S', [{'mix': ['none', 'mixup'], 'epohs': 3}])])
    with pytest.raises(ValueError, match='no option epochs.x'):
        plan(options, [Study('s', 'S', [{'epochs.x': 3}])])
    with pytest.raises(ValueError, match='another case has the same name in files, multimix-n1-seed0'):
        plan(options, [Study('s', 'S', [{'mix': 'multimix', 'mix_kwargs.n': 1}]),
                       Study('t', 'T', [{'mix': 'multimix', 'opt_kwargs.n': 1}])])
    with pytest.raises(ValueError, match='there is none; did you mean iterations'):
        load_studies(['iteration'])
    file = tmp_path / 'own.yaml'
    with pytest.raises(ValueError, match='No such file'):
        load_studies([str(file)])
    for text in ('- a', 'a: [', 'a: none', 'a: {title: A}', 'a: {title: A, cases: [mix]}', 'a: {title: A, cases: []}',
                 'a: {title: A, cases: [{mix: none}], colour: red}',
                 'a: {title: A, cases: [{mix: none}, {mix: mixup}], reference: cutmix}',
                 'a: {title: A, cases: [{mix: none}, {mix: mixup}], reference: {mix: cutmix}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r'own\.yaml|study a'):
            load_studies([str(file)])
    with pytest.raises(ValueError, match='either --study or --grid'):
        AblationOptions()
    with pytest.raises(ValueError, match='--recipe nowhere: no such file'):
        ablate(AblationOptions(study=['n'], recipe='nowhere'), '')
    with pytest.raises(ValueError, match='one at a time'):
        AblationOptions(study=['n'], collect=True, dry_run=True)


def test_a_folder_of_another_training_is_refused(options):
    finish(options, {('mixup', 0): [50.0, 60.0]})
    assert make_job(options, Cell({'mix': 'mixup'}), 0).finished
    options.set = [*SETTINGS, 'weight_decay=0.5']
    with pytest.raises(ValueError, match=r'study grid, mixup: .*--weight-decay 0\.05 -> 0\.5.*--output'):
        ablate(options, '')


# Results


def test_finished_trainings_become_tables_and_pictures(tmp_path, options):
    finish(options, {('mixup', 0): [81.0, 80.0], ('mixup', 1): [86.0, 84.0], ('none', 0): [10.0, 70.0]})
    options.collect = True
    assert ablate(options, 'alignmix ablate ...') == {}
    found = json.loads((tmp_path / 'ablation.json').read_text())
    first, second = found['rows']
    assert first == {'model': 'test_resnet', 'mix': 'mixup', 'seeds': 2, 'last': 82.0,
                     'last_std': pytest.approx(math.sqrt(8)), 'difference': None, 'interval': None}  # one seed of none
    assert (second['seeds'], second['last'], second['last_std']) == (1, 70.0, None)
    assert any('Not finished: none-seed1' in note for note in found['notes'])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ('ablation.png', 'ablation-curves.png'))
    assert '| test_resnet | mixup | 2 | **82.00** | 2.83 |' in (tmp_path / 'ablation.md').read_text()


def test_published_figures_stand_in_the_table_and_what_differs_below(tmp_path, options):
    options.grid, options.study = None, ['iterations']
    (study,) = load_studies(['iterations'])
    for seed in options.seeds:
        for cell in study.cells:
            write_run(make_job(options, cell, seed).folder, cell.config, [50.0, 60.0])
    ablate(options, '')  # all are finished: nothing is started
    found = json.loads((tmp_path / 'ablation-iterations.json').read_text())
    assert [row['published'] for row in found['rows']] == [80.98, 80.96, 81.31, 81.42, 81.71, 81.5, 81.34, 81.28]
    note = next(note for note in found['notes'] if note.startswith('Published'))
    assert 'Not a reproduction' in note and all(word in note for word in ('data (', 'network (', 'epochs (2, not 2000'))


def test_paired_differences_are_those_of_a_t_test(tmp_path, options):
    options.seeds, options.collect = [0, 1, 2, 3], True
    top1 = {'none': [70.5, 71.0, 69.0, 72.0], 'mixup': [72.0, 71.5, 71.0, 72.5]}
    runs = {(mix, seed): [99.0, value] for mix, values in top1.items() for seed, value in enumerate(values)}
    del runs['mixup', 1]
    finish(options, runs)
    ablate(options, '')
    mixup, none = json.loads((tmp_path / 'ablation.json').read_text())['rows']
    low, high = stats.ttest_rel([72.0, 71.0, 72.5], [70.5, 69.0, 72.0]).confidence_interval(0.95)
    assert mixup['difference'] == pytest.approx((low + high) / 2) == pytest.approx(4 / 3)
    assert mixup['interval'] == pytest.approx((high - low) / 2)
    assert (none['difference'], none['interval']) == (None, None)
    page = (tmp_path / 'ablation.md').read_text()
    assert '| difference to none | ± (95 %) |' in page and f'| +1.33 | {(high - low) / 2:.2f} |' in page
    assert '- Difference to none: ' in page


def test_several_studies_have_files_of_their_own(tmp_path, options):
    file = tmp_path / 'own.yaml'
    file.write_text('a: {title: A, x: lr, cases: [{lr: [0.1, 1e-2]}]}\n'
                    'b: {title: B, x: opt, cases: [{mix: [none, mixup], opt: [sgd, adam]}]}\n')
    options.grid, options.study, options.collect = None, [str(file)], True
    for job in plan(options, load_studies([str(file)])):
        if job.name != 'mixup-optsgd-seed0':
            job.folder.mkdir(parents=True)
            (job.folder / 'summary.csv').write_text('epoch,eval_top1\n0,50\n1,60\n')
    ablate(options, '')
    names = ('ablation-a.png', 'ablation-b.png', 'ablation-a-curves.png', 'ablation-b-curves.png')
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_queue_writes_what_is_not_finished(tmp_path, options):
    finish(options, {('mixup', 0): [50.0, 60.0]})
    options.grid, options.launch = ['mix=mixup'], 'accelerate launch --num_processes 8'
    options.queue = str(tmp_path / 'jobs.txt')
    ablate(options, '')
    (line,) = (tmp_path / 'jobs.txt').read_text().splitlines()
    words = shlex.split(line)
    assert words[:4] == ['accelerate', 'launch', '--num_processes', '8']
    assert words[words.index('--seed') + 1] == '1' and words[-2:] == ['--resume', 'auto']
    assert not (tmp_path / 'ablation.json').exists()


def test_a_dry_run_lists_the_runs_and_estimates_their_time(tmp_path, options, capsys, caplog):
    finish(options, {('mixup', 0): [50.0, 60.0], ('none', 1): [40.0]})
    (tmp_path / 'runs' / 'mixup-seed0' / 'report.md').write_text('- Time: 1:00:10 for 2 epochs of 5 updates\n')
    options.dry_run, options.jobs = True, 2
    caplog.set_level('INFO')
    assert ablate(options, '') == {}
    assert capsys.readouterr().out.splitlines() == [
        'mixup-seed0: 2 of 2 epochs', 'none-seed0: 0 of 2 epochs',
        'mixup-seed1: 0 of 2 epochs', 'none-seed1: 1 of 2 epochs']
    # Five epochs of 1805 s, two at a time.
    assert 'Runs: 4, 1 finished; epochs: 8, 3 done; the rest takes about 1:15:12' in caplog.text
    assert not (tmp_path / 'ablation.json').exists()


@pytest.mark.parametrize('name', ['alpha', 'layer', 'm'])
def test_lines_over_the_axis(name, options):
    (study,) = load_studies([name])
    plan(options, [study])

    def drawn(**cases: list[float]) -> tuple[dict[str, list], list[str]]:
        for cell in study.cells:
            cell.curves = {seed: {0: 1.0, 1: value} for seed, value in enumerate(cases.get(cell.name, []))}
        ax = draw(study).axes[0]
        data = {container.get_label(): container.lines[0].get_xydata().tolist() for container in ax.containers}
        return data, [label.get_text() for label in ax.get_xticklabels()]

    if name == 'alpha':
        cases = {'multimix alpha=1.0': [60, 62], 'densemultimix alpha=0.5': [70], 'multimix alpha=U[0.5, 2.0]': [64]}
        assert drawn(**cases) == (
            {'multimix': [[1, 61.0], [2, 64.0]], 'densemultimix': [[0, 70.0]]}, ['0.5', '1.0', 'U[0.5, 2.0]'])
    elif name == 'layer':
        cases = {'mixup': [40], 'multimix mix_at=0': [50], 'multimix mix_at=embedding': [60]}
        assert drawn(**cases) == (
            {'mixup': [[0, 40.0]], 'multimix': [[1, 50.0], [2, 60.0]]}, ['mixup', '0', 'embedding'])
    else:
        assert drawn(**{'multimix n=100 m=all': [50], 'multimix n=100 m=4': [60]}) == (
            {'multimix n=100': [[0, 60.0], [1, 50.0]]}, ['4', 'all'])


def test_two_trainings_of_the_sample_at_a_time_from_the_command_to_the_picture(tmp_path, capsys):
    """The folder of one of them is in use at first: it fails, and the next call trains it."""
    words = ['--grid', 'mix_kwargs.n=5', '--seeds', '3', '4', '--jobs', '2', '--output', str(tmp_path), '--set',
             'mix=multimix', 'model=test_resnet', 'img_size=32', 'epochs=1', 'batch_size=256', 'export=none',
             'workers=0']
    folder = tmp_path / 'runs' / 'n5-seed3'
    folder.mkdir(parents=True)
    with (folder / '.lock').open('a') as lock:
        assert lock_file(lock)
        with pytest.raises(SystemExit) as e:
            main(words)
    assert e.value.code == 1
    failed = json.loads((tmp_path / 'ablation.json').read_text())
    assert failed['rows'][0]['seeds'] == 1 and 'Failed: n5-seed3: exit code ' in ' '.join(failed['notes'])
    assert 'another process is training in' in (tmp_path / 'runs' / 'n5-seed3.log').read_text()
    main(words)
    (row,) = json.loads((tmp_path / 'ablation.json').read_text())['rows']
    top1 = []
    for seed in (3, 4):
        with (tmp_path / 'runs' / f'n5-seed{seed}' / 'summary.csv').open() as file:
            (epoch,) = csv.DictReader(file)
        top1.append(float(epoch['eval_top1']))
    assert row['seeds'] == 2 and row['last'] == pytest.approx(sum(top1) / 2)
    assert seconds_per_epoch(tmp_path / 'runs' / 'n5-seed3') > 0  # what estimates are made of
    main([*words, '--dry-run'])
    assert 'n5-seed4: 1 of 1 epochs' in capsys.readouterr().out
