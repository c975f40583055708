"""Several processes on the CPU, and the threads of one that accelerate launch starts."""
import csv
import os

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import load_checkpoint

from alignmix_lab.runs.accelerator import _use_all_cores, create_accelerator

PLAIN = dict(model='test_vit', no_aug=True, opt='sgd', lr=0.03, weight_decay=0.0, sched='none', epochs=1)


@pytest.fixture(scope='module')
def two(make_config, on_processes, tmp_path_factory):
    """Folder of jobs trained on two processes, and callable: what a job's processes saved, by rank."""
    folder = tmp_path_factory.mktemp('two')
    torch.manual_seed(3)
    torch.save(timm.create_model('test_vit', num_classes=10).state_dict(), folder / 'start.pth')
    torch.manual_seed(4)
    resnet = timm.create_model('test_resnet', num_classes=10)
    resnet(torch.randn(4, 3, 64, 64))  # running statistics of its own
    torch.save(resnet.state_dict(), folder / 'resnet.pth')
    dense = dict(mix='densemultimix', mix_kwargs={'n': 12}, model_ema=True, model_ema_decay=0.7, drop=0.1)
    # 84 images are 5 batches of 8 on each of two processes: 3 updates of 2, 2 and 1.
    align = dict(
        mix='alignmix', mix_kwargs={'mode_probs': (0.3, 0.3, 0.4)}, batch_size=8, grad_accum_steps=2, model_ema=True,
        model_ema_decay=0.7, dist_bn='broadcast', dist_timeout=60)
    jobs = {
        'dense': (dict(batch_size=8, validation_batch_size=4, **dense), {}),
        'plain': (dict(batch_size=8, initial_checkpoint=str(folder / 'start.pth'), **PLAIN), {}),
        'frozen': (dict(
            mix='manifold', batch_size=8, epochs=1, freeze='2', initial_checkpoint=str(folder / 'resnet.pth'),
            layer_decay=0.8, model_ema=True, balanced_sampling=True, class_weights='balanced'), {}),
        'whole': (align, {}),
        'died': (dict(align, checkpoint_steps=1), {'at': (7, 'die')}),
        'died-on': (dict(align, checkpoint_steps=1, resume='auto', output=folder / 'died'), {}),
        'asked': (align, {'at': (2, 'signal')}),
        'asked-on': (dict(align, resume='auto', output=folder / 'asked'), {}),
        'spoilt': (dict(align, epochs=1), {'at': (3, 'spoil')}),
        # Layers of a method's own, which DistributedDataParallel would miss in steps that do not use them.
        'several': (dict(
            batch_size=8, mix={'alignmix_ae': 0.5, 'mixup': 0.5}, mix_off_epoch=1,
            mix_kwargs={'alignmix_ae.dim': 8, 'alignmix_ae.width': 4}), {}),
    }
    on_processes(2, 'train_all', {
        name: {**make_config(options.pop('output', folder / name), **options).to_dict(), **extra}
        for name, (options, extra) in jobs.items()}, folder)
    return folder, lambda name: [torch.load(folder / f'{name}-{rank}.pt', weights_only=True) for rank in (0, 1)]


def test_two_processes_train_on_different_images(two):
    first, second = ({image for _, _, image in part['steps']} for part in two[1]('plain'))
    assert len(first) == len(second) == 5 and not first & second


def test_frozen_layers_train_on_no_process(two):
    """Neither their parameters nor, through the average over processes, their statistics."""
    start = torch.load(two[0] / 'resnet.pth', weights_only=True)
    for part in two[1]('frozen'):
        for which in ('state_dict', 'state_dict_ema'):
            for key, value in start.items():
                frozen = key.startswith(('conv1', 'bn1', 'layer1', 'layer2'))
                assert torch.equal(part[which][key], value) == frozen, (which, key)
    first, second = (part['state_dict'] for part in two[1]('frozen'))
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_modes_are_shared_and_draws_are_not(two):
    first, second = (part['steps'] for part in two[1]('whole'))
    assert [mode for mode, _, _ in first] == [mode for mode, _, _ in second]
    assert len({mode for mode, _, _ in first}) == 3
    lams = [(one[1], other[1]) for one, other in zip(first, second, strict=True) if one[1] is not None]
    assert lams and all(one != other for one, other in lams)


def test_several_methods_are_shared_and_end_together(two):
    first, second = ([mode for mode, _, _ in part['steps']] for part in two[1]('several'))
    assert first == second and len(first) == 10
    assert {mode.partition('/')[0] for mode in first[:5]} == {'alignmix_ae', 'mixup'}
    assert first[5:] == ['clean'] * 5


def test_machines_that_see_different_checkpoints_are_refused(two, make_config, on_processes, tmp_path):
    """Two machines without a common folder: one would resume, the other begin anew."""
    config = make_config(two[0] / 'plain', batch_size=8, resume='auto', **PLAIN)
    on_processes(2, 'start_apart', config.to_dict(), [config.output, str(tmp_path / 'empty')], tmp_path)
    for rank in (0, 1):
        reason = (tmp_path / f'{rank}.txt').read_text()
        assert 'process 0 would begin at epoch 1, update 0, process 1 would begin at epoch 0, update 0' in reason


def test_gradients_are_reduced_once_an_update(two):
    """Two epochs of 3 updates from 5 batches; without accumulation one of 5."""
    assert [part['reductions'] for part in two[1]('whole')] == [6, 6]
    assert [part['reductions'] for part in two[1]('plain')] == [5, 5]


@pytest.mark.parametrize('name', ['dense', 'plain', 'whole', 'spoilt', 'several'])
def test_both_processes_end_with_the_same_model(two, name):
    """Parameters, running statistics (averaged, or those of the first) and averages; all report the same history."""
    first, second = two[1](name)
    assert first['processes'] == 2 and first['history'] == second['history']
    for which in ('state_dict', 'state_dict_ema'):
        for key, value in (first[which] or {}).items():
            assert torch.equal(value, second[which][key]), (which, key)


def test_two_processes_that_die_within_an_epoch_end_as_if_they_had_not(two):
    """Each process has running statistics of its own within an epoch; the second job finds the first's files."""
    folder, saved = two
    assert [part['code'] for part in saved('died')] == ['died', 'died']
    assert [part['history'] for part in saved('died-on')] == [part['history'][1:] for part in saved('whole')]
    for found, expected in zip(saved('died-on'), saved('whole'), strict=True):
        assert found['steps'] == expected['steps'][-3:]  # after the first of three updates
        for which in ('state_dict', 'state_dict_ema'):
            for key, value in expected[which].items():
                assert torch.equal(found[which][key], value), (which, key)


def test_a_signal_to_one_process_stops_both_after_the_same_update(two):
    folder, saved = two
    assert [part['code'] for part in saved('asked')] == [75, 75]
    assert [len(part['steps']) for part in saved('asked')] == [4, 4]
    names = {path.name for path in (folder / 'asked' / 'run').glob('*.pth.tar')}
    assert 'recovery-0-2.pth.tar' in names
    assert [part['history'] for part in saved('asked-on')] == [part['history'] for part in saved('whole')]


def test_a_loss_that_is_not_finite_on_one_process_is_left_out_on_both(two):
    for part in two[1]('spoilt'):
        assert part['history'][0]['train']['skipped'] == 1
        assert all(value.isfinite().all() for value in part['state_dict'].values())


@pytest.fixture(scope='module')
def thousand_and_one(tmp_path_factory):
    """An ImageFolder with 1,001 validation images of 32 x 32 pixels."""
    root = tmp_path_factory.mktemp('thousand')
    pixels, labels = load_digits(return_X_y=True)
    for index in range(1001):
        grey = (pixels[index].reshape(8, 8) * (255 / 16)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
        for split in ('train', 'validation') if index < 32 else ('validation',):
            folder = root / split / str(labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(folder / f'{index}.png')
    return root


def test_any_number_of_processes_evaluates_1001_images_alike(thousand_and_one, make_config, on_processes, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), tmp_path / 'weights.pth')
    found = {}
    for count, batch in ((1, 100), (2, 64), (3, 37)):
        folder = tmp_path / str(count)
        folder.mkdir()
        config = make_config(
            folder, data_dir=str(thousand_and_one), img_size=32, batch_size=8, validation_batch_size=batch)
        on_processes(count, 'evaluate', config.to_dict(), tmp_path / 'weights.pth', folder)
        found[count] = [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(count)]
    (one,) = found[1]
    assert len(one['seen']) == 1001 and 0 < one['metrics']['top1'] < 100
    for count in (2, 3):
        parts = found[count]
        assert sorted(image for part in parts for image in part['seen']) == sorted(one['seen'])
        for part in parts:
            assert part['metrics'] == parts[0]['metrics']
            assert part['metrics']['top1'] == one['metrics']['top1']
            assert part['metrics']['top5'] == one['metrics']['top5']
            assert part['metrics']['loss'] == pytest.approx(one['metrics']['loss'], rel=1e-6)


def test_any_number_of_processes_ranks_all_labels_together(digits, make_config, on_processes, tmp_path):
    """Average precision is not the mean of that of the processes: of four, three have 7 images and one has 6."""
    files = sorted(digits.glob('*/*/*.png'))
    for split in ('train', 'validation'):
        with open(tmp_path / f'{split}.csv', 'w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['file', 'labels'])
            for path in files:
                digit = int(path.parent.name)
                names = ['even'] * (digit % 2 == 0) + ['round'] * (digit in (0, 3, 6, 8, 9))
                if path.parts[-3] == split:
                    writer.writerow([path, ' '.join(names)])
    torch.save(timm.create_model('test_resnet', num_classes=2).state_dict(), tmp_path / 'weights.pth')
    found = {}
    for count in (1, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        config = make_config(folder, data_dir=str(tmp_path), multi_label=True, img_size=32, batch_size=8)
        on_processes(count, 'evaluate', config.to_dict(), tmp_path / 'weights.pth', folder)
        found[count] = [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(count)]
    (one,), parts = found[1], found[4]
    assert sorted(image for part in parts for image in part['seen']) == sorted(one['seen']) and len(one['seen']) == 27
    for part in parts:
        assert part['metrics'].keys() == one['metrics'].keys()
        for name, value in one['metrics'].items():
            assert part['metrics'][name] == pytest.approx(value, rel=1e-6)


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


def test_accelerate_launch_uses_all_cores_on_a_cpu(launch, tmp_path):
    """accelerate launch sets OMP_NUM_THREADS=1 where nothing is said."""
    script = tmp_path / 'threads.py'
    script.write_text(
        'import os, torch\n'
        'from alignmix_lab.runs.accelerator import create_accelerator\n'
        "before = os.environ['OMP_NUM_THREADS'], torch.get_num_threads()\n"
        "create_accelerator('cpu')\n"
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


@pytest.mark.parametrize('asked, exported, refused', [
    (2, {}, True),
    (2, dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='29500', WORLD_SIZE='1', RANK='0'), True),
    (2, dict(MASTER_ADDR='127.0.0.1'), True),  # the launcher adds the port
    (1, dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='29500'), False),
    (1, dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='29500', WORLD_SIZE='1', RANK='0'), False),
])
def test_a_launch_of_several_that_starts_one_is_refused(launch, tmp_path, asked, exported, refused):
    script = tmp_path / 'one.py'
    script.write_text(
        'from alignmix_lab.runs.accelerator import create_accelerator\n'
        'try:\n'
        "    print('processes', create_accelerator('cpu').num_processes)\n"
        'except ValueError as e:\n'
        '    print(e)\n')
    output = launch('--cpu', '--num_processes', str(asked), str(script), **exported)
    assert ('--multi_gpu --num_processes N' if refused else 'processes 1') in output


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # alone, left over from something else
    assert create_accelerator().num_processes == 1
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(ValueError, match='started 2 processes, but each would train alone'):
        create_accelerator()


@pytest.mark.parametrize('variable, value, amp, said', [
    ('USE_FSDP', 'true', False, 'configured for FSDP'),
    ('USE_DEEPSPEED', 'true', False, 'without use_deepspeed'),
    ('GRADIENT_ACCUMULATION_STEPS', '4', False, 'gradient_accumulation_steps 4 .* pass --grad-accum-steps'),
    ('DYNAMO_BACKEND', 'INDUCTOR', False, 'dynamo_backend INDUCTOR .* pass --torchcompile'),
    ('MIXED_PRECISION', 'bf16', True, '--amp-dtype float16 contradicts mixed_precision bf16'),
    ('DYNAMO_BACKEND', 'NO', False, None),
    ('MIXED_PRECISION', 'bf16', False, None),
    ('MIXED_PRECISION', 'no', True, None),
])
def test_settings_of_accelerate_launch_hold_or_are_refused(monkeypatch, variable, value, amp, said):
    monkeypatch.setenv(f'ACCELERATE_{variable}', value)
    monkeypatch.setattr('alignmix_lab.runs.accelerator._use_all_cores', lambda accelerator: None)  # threads stay
    if said is None:
        precision = create_accelerator('cpu', amp, 'bfloat16').mixed_precision
        assert precision == ('bf16' if variable == 'MIXED_PRECISION' else 'no')
        return
    with pytest.raises(ValueError, match=said):
        create_accelerator('cpu', amp)
