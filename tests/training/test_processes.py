"""Several processes on the CPU, and the threads of one that accelerate launch starts."""
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.models import load_checkpoint

from timm_alignmix.training.build import _use_all_cores

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
          '--dynamo_backend', 'no']
PLAIN = dict(model='test_vit', no_aug=True, opt='sgd', lr=0.03, weight_decay=0.0, sched='none', epochs=1)


def launch(*words: str, **variables: str) -> str:
    """Run a command with ours importable; its output."""
    env = {key: value for key, value in os.environ.items() if key not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    env.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='', **variables)
    process = subprocess.Popen(
        [*LAUNCH, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher, which ends what it started
        output = 'timed out\n' + process.communicate()[0]
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope='module')
def two(make_config, tmp_path_factory):
    """Folder of two jobs trained on two processes, and callable: what a job's processes saved, by rank."""
    folder = tmp_path_factory.mktemp('two')
    torch.manual_seed(3)
    torch.save(timm.create_model('test_vit', num_classes=10).state_dict(), folder / 'start.pth')
    dense = dict(mix='densemultimix', mix_kwargs={'n': 12}, model_ema=True, model_ema_decay=0.7, drop=0.1)
    jobs = {
        'dense': make_config(folder / 'dense', batch_size=8, validation_batch_size=4, **dense),
        'plain': make_config(folder / 'plain', batch_size=8, initial_checkpoint=str(folder / 'start.pth'), **PLAIN),
    }
    (folder / 'jobs.json').write_text(json.dumps({name: config.to_dict() for name, config in jobs.items()}))
    launch('--multi_gpu', '--num_processes', '2', '--main_process_port', '0', str(Path(__file__).with_name(
        'two_processes.py')), str(folder / 'jobs.json'), str(folder), ACCELERATE_USE_CPU='1')
    return folder, lambda name: [torch.load(folder / f'{name}-{rank}.pt', weights_only=True) for rank in (0, 1)]


def test_two_processes_evaluate_each_image_once(two, val_pixels):
    images, _ = val_pixels
    for saved in two[1]('dense'), two[1]('plain'):
        assert [part['processes'] for part in saved] == [2, 2]
        assert sorted(len(part['val']) for part in saved) == [13, 14]
        assert len(set(saved[0]['val']) | set(saved[1]['val'])) == 27 == len(images.flatten(1).unique(dim=0))


def test_two_processes_train_on_different_images(two):
    first, second = (part['train'] for part in two[1]('plain'))
    assert len(first) == len(second) == 40
    assert len(set(first) | set(second)) == 80


@pytest.mark.parametrize('name', ['dense', 'plain'])
def test_both_processes_end_with_the_same_model(two, name):
    """Parameters, running statistics and averages; all ranks report the same history."""
    first, second = two[1](name)
    assert first['history'] == second['history']
    for which in ('state_dict', 'state_dict_ema'):
        for key, value in (first[which] or {}).items():
            assert torch.equal(value, second[which][key]), (which, key)


def test_metrics_of_two_processes_are_those_of_one(two, new_model, evaluate):
    folder, saved = two
    history = saved('dense')[0]['history']
    with open(folder / 'dense' / 'run' / 'summary.csv', newline='') as file:
        assert [float(row['eval_loss']) for row in csv.DictReader(file)] == [
            entry['validation']['loss'] for entry in history]
    for epoch, entry in enumerate(history):
        model = new_model()
        load_checkpoint(model, folder / 'dense' / 'run' / f'checkpoint-{epoch}.pth.tar', use_ema=True, strict=True)
        found = evaluate(model)
        assert found['top1'] == pytest.approx(entry['validation']['top1'], abs=1e-9)
        assert found['loss'] == pytest.approx(entry['validation']['loss'], rel=1e-5)


def test_two_processes_train_as_one_on_the_whole_batch(two, make_config, run_training, tmp_path):
    """Without mixing and batch norm, two batches of 8 are one of 16."""
    folder, saved = two
    one = run_training(make_config(tmp_path, batch_size=16, initial_checkpoint=str(folder / 'start.pth'), **PLAIN))
    found, expected = saved('plain')[0], torch.load(one.folder / 'last.pth.tar', weights_only=True)
    loss = one.result['history'][0]['train']['loss']
    assert found['history'][0]['train']['loss'] == pytest.approx(loss, rel=1e-5)
    for key, value in expected['state_dict'].items():
        torch.testing.assert_close(found['state_dict'][key], value, atol=2e-6, rtol=0, msg=key)


def test_accelerate_launch_uses_all_cores_on_a_cpu(tmp_path):
    """accelerate launch sets OMP_NUM_THREADS=1 where nothing is said."""
    script = tmp_path / 'threads.py'
    script.write_text(
        'import os, torch\n'
        'from timm_alignmix.training import TrainConfig\n'
        'from timm_alignmix.training.build import create_accelerator\n'
        "before = os.environ['OMP_NUM_THREADS'], torch.get_num_threads()\n"
        "create_accelerator(TrainConfig(device='cpu'))\n"
        "print('threads', *before, torch.get_num_threads())\n")
    assert f'threads 1 1 {len(os.sched_getaffinity(0))}\n' in launch('--num_processes', '1', str(script))


@pytest.mark.parametrize('launched, local, threads, expected', [
    (True, 1, 1, 6), (True, 2, 1, 3), (True, 8, 1, 1), (True, 1, 2, 2), (False, 1, 1, 1)])
def test_threads_are_changed_only_where_accelerate_launch_set_one(
        monkeypatch, launched, local, threads, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(local))
    accelerator = Accelerator(cpu=True)  # may set the variable
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    if not launched:
        monkeypatch.delenv('ACCELERATE_MIXED_PRECISION')
    torch.set_num_threads(threads)
    try:
        _use_all_cores(accelerator)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)
