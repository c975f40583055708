"""Checkpoints: kept files, damaged and hostile ones, and runs that continue where they stopped."""
import csv
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from alignmix_lab.runs.checkpoint import CheckpointSaver, find_checkpoint, read_checkpoint
from alignmix_lab.runs.logs import append_summary
from alignmix_lab.runs.run_report import draw_curves


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # its hard links keep their content
    path.write_bytes(content[:len(content) // 2])


@pytest.fixture(scope='module')
def stopped(finished, make_config, run_training, tmp_path_factory):
    """The run of densemultimix again, stopped after two of its three epochs. Do not write into its folder."""
    full = finished('densemultimix')
    options = {**full.config.to_dict(), 'output': str(tmp_path_factory.mktemp('stopped')), 'stop_epoch': 2}
    return run_training(make_config(**options))


@pytest.fixture
def continued(stopped, make_config, run_training, tmp_path):
    """Callable: continue a copy of the stopped run, after a change to its folder."""
    def go(change=lambda folder: None, **options):
        output = tmp_path / 'copy'
        shutil.copytree(stopped.config.output, output)
        change(output / 'run')
        settings = {**stopped.config.to_dict(), 'stop_epoch': None, 'resume': 'auto', **options, 'output': output}
        return run_training(make_config(**settings))
    return go


def assert_same_end(run, full, first_epoch):
    """Bit by bit: metrics of each epoch, weights, their average, the optimizer's state and summary.csv."""
    assert run.result['history'] == full.result['history'][first_epoch:]
    found, expected = (torch.load(r.folder / 'last.pth.tar', weights_only=True) for r in (run, full))
    for which in ('state_dict', 'state_dict_ema'):
        for key, value in expected[which].items():
            assert torch.equal(found[which][key], value), (which, key)
    for index, state in expected['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(found['optimizer']['state'][index][key], value)
    assert found['task_state'] == expected['task_state'] and found['saver'] == expected['saver']
    assert (run.folder / 'summary.csv').read_text() == (full.folder / 'summary.csv').read_text()


def test_a_stopped_run_continues_bit_by_bit(stopped, continued, finished):
    full = finished('densemultimix')
    assert stopped.result['history'] == full.result['history'][:2]
    run = continued()
    assert_same_end(run, full, 2)
    assert not any('changed arguments' in line for line in run.log)


@pytest.mark.parametrize('stop_epoch', [1, 2])
def test_a_run_continues_where_mixing_is_switched_off(make_config, run_training, tmp_path, stop_epoch):
    """Stopped at the epoch that switches it off, or in the middle of those without."""
    options = dict(
        mix={'mixup': 0.4, 'densemultimix': 0.4, 'none': 0.2}, mix_kwargs={'densemultimix.n': 12}, epochs=3,
        mix_off_epoch=1, model_ema=True, model_ema_decay=0.7, drop=0.1)
    full = run_training(make_config(tmp_path / 'full', **options))
    modes = [set(entry['train']['modes']) for entry in full.result['history']]
    assert modes[0] & {'mixup', 'densemultimix/dense', 'densemultimix/input'} and modes[1:] == [{'clean'}] * 2
    run_training(make_config(tmp_path / 'stopped', **options, stop_epoch=stop_epoch))
    assert_same_end(run_training(make_config(tmp_path / 'stopped', **options, resume='auto')), full, stop_epoch)


def test_resume_auto_falls_back_from_a_truncated_file(continued, finished):
    def damage(folder):
        truncate(folder / 'last.pth.tar')
        truncate(folder / 'checkpoint-1.pth.tar')
        assert read_checkpoint(folder / 'previous.pth.tar')['epoch'] == 0

    run = continued(damage)
    assert_same_end(run, finished('densemultimix'), 1)
    for name in ('last', 'checkpoint-1'):
        assert any(f'{name}.pth.tar is damaged' in line and 'trying the one before' in line for line in run.log)
    assert any('previous.pth.tar: epoch 0 is done' in line for line in run.log)


def test_without_the_optimizers_state_the_schedule_still_continues(continued, finished):
    run = continued(no_resume_opt=True)
    expected = finished('densemultimix').result['history'][2]
    assert run.result['history'][0]['lr'] == pytest.approx(expected['lr'], rel=1e-12)
    assert run.result['history'][0]['train']['loss'] != expected['train']['loss']


def test_resume_refuses_where_every_checkpoint_is_damaged(continued):
    def damage(folder):
        for path in folder.glob('*.pth.tar'):
            truncate(path)

    with pytest.raises(ValueError, match='all checkpoints in .* are damaged'):
        continued(damage)


def test_resume_auto_of_a_new_folder_starts_anew(make_config, run_training, tmp_path):
    run = run_training(make_config(tmp_path, resume='auto', epochs=1))
    assert any('no checkpoint in' in line and 'starting from scratch' in line for line in run.log)
    assert [entry['epoch'] for entry in run.result['history']] == [0]


def test_tuples_in_options_are_no_change(finished, make_config, run_training, tmp_path):
    """args.yaml holds lists where flags give tuples."""
    done = finished('alignmix')
    shutil.copytree(done.config.output, tmp_path / 'copy')
    options = {**done.config.to_dict(), 'output': str(tmp_path / 'copy'), 'resume': 'auto', 'epochs': 3}
    run = run_training(make_config(**options))
    changed = [line for line in run.log if 'changed arguments' in line]
    assert changed == ['Resuming with changed arguments: --epochs 2 -> 3']


def test_another_model_is_refused_with_its_missing_keys(finished, make_config, run_training, tmp_path):
    source = finished('none').folder / 'last.pth.tar'
    with pytest.raises(ValueError, match=r'\(test_resnet\) does not fit test_efficientnet: missing keys: conv_stem'):
        run_training(make_config(tmp_path, model='test_efficientnet', resume=str(source)))


def test_another_optimizer_is_refused(finished, make_config, run_training, tmp_path):
    source = finished('none').folder / 'last.pth.tar'
    with pytest.raises(ValueError, match='trained with --opt adamw, not sgd; pass --no-resume-opt'):
        run_training(make_config(tmp_path, opt='sgd', epochs=3, resume=str(source)))


def test_a_finished_run_has_nothing_to_train(finished, make_config, run_training, tmp_path):
    source = finished('none').folder / 'last.pth.tar'
    with pytest.raises(ValueError, match='nothing to train: epoch 2 of 2'):
        run_training(make_config(tmp_path, resume=str(source)))


@pytest.mark.parametrize('options, said', [
    (dict(lr=1e-4), r'other arguments \(--lr 0.003 -> 0.0001\)'),
    (dict(workers=1, log_interval=7), 'the same arguments'),
])
def test_a_folder_with_a_run_is_refused(finished, make_config, run_training, options, said):
    done = finished('multimix')
    before = (done.folder / 'args.yaml').read_text()
    with pytest.raises(ValueError, match=f'holds a run with {said}.*--resume auto'):
        run_training(make_config(**{**done.config.to_dict(), **options}))
    assert (done.folder / 'args.yaml').read_text() == before


def test_a_hostile_checkpoint_is_refused_unrun(make_config, run_training, tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth.tar'
    torch.save(dict(state_dict={}, optimizer={}, epoch=0, args=Hostile(marker)), path)
    with pytest.raises(ValueError, match='hostile.pth.tar is damaged or no checkpoint'):
        run_training(make_config(tmp_path, resume=str(path)))
    with pytest.raises(ValueError, match=r"--initial-checkpoint .*hostile.pth.tar has no weights"):
        run_training(make_config(tmp_path, initial_checkpoint=str(path)))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize('content', [
    b'', b'x', b'hello, this is text\n', b'\x80\x02}q\x00.', b'PK\x03\x04' + 99 * b'\0', bytes(range(256)),
    b'(lp0\n.', b'0' * 5000])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / 'x.pth.tar'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='x.pth.tar (is damaged or no checkpoint|has no training state)'):
        read_checkpoint(path)


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({'fc.weight': torch.zeros(2)}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='--initial-checkpoint'):
        read_checkpoint(tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='no such checkpoint'):
        read_checkpoint(tmp_path / 'none.pth')


@pytest.mark.parametrize('metric, kept, best', [('top1', {1, 2}, 1), ('loss', {2, 3}, 3)])
def test_the_saver_keeps_the_best(tmp_path, metric, kept, best):
    """Four epochs with metrics and a fifth without, two files to keep; of equal epochs the earlier wins."""
    saver = CheckpointSaver(tmp_path, metric, max_history=2)
    rows = [(10.0, 3.0), (50.0, 2.5), (20.0, 2.0), (20.0, 1.0)]
    for epoch, (top1, loss) in enumerate(rows):
        saver.save({'state_dict': {}, 'optimizer': {}}, epoch, {'loss': loss, 'top1': top1})
    saver.save({'state_dict': {}, 'optimizer': {}}, 4, None)
    names = {f'checkpoint-{epoch}.pth.tar' for epoch in kept}
    assert {path.name for path in tmp_path.iterdir()} == names | {
        'last.pth.tar', 'previous.pth.tar', 'model_best.pth.tar'}
    assert read_checkpoint(tmp_path / 'previous.pth.tar')['epoch'] == 3
    assert read_checkpoint(tmp_path / 'model_best.pth.tar')['epoch'] == best == saver.best['epoch']
    for epoch in kept:
        assert read_checkpoint(tmp_path / f'checkpoint-{epoch}.pth.tar')['epoch'] == epoch
    assert find_checkpoint(tmp_path)[1]['epoch'] == 4


def test_a_changed_byte_is_noticed_or_harmless(tmp_path):
    """One bit in every seventh byte of a file, and in every byte of its directory, of which torch believes all."""
    path = tmp_path / 'x.pth.tar'
    state = {'state_dict': {'weight': torch.arange(300.0)}, 'optimizer': {}, 'epoch': 3}
    torch.save(state, path)
    content, noticed = path.read_bytes(), 0
    tensor = content.index(state['state_dict']['weight'].numpy().tobytes())
    with zipfile.ZipFile(path) as file:
        directory = range(file.start_dir, len(content))
    for place in sorted({*range(0, len(content), 7), *directory}):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])
        try:
            found = read_checkpoint(path)
        except ValueError as e:
            assert 'is damaged or no checkpoint' in str(e)
            noticed += tensor <= place < tensor + 1200
        else:
            assert torch.equal(found['state_dict']['weight'], state['state_dict']['weight']), place
            assert found['epoch'] == 3
    assert noticed >= 1200 // 7


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path):
    saver = CheckpointSaver(tmp_path)
    saver.save({'state_dict': {}, 'optimizer': {}}, 0, None)
    large = {'state_dict': {'weight': torch.zeros(100_000)}, 'optimizer': {}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # larger files cannot be written
    try:
        for save in (lambda: saver.save(large, 1, None), lambda: saver.save_recovery(large, 1, 5)):
            with pytest.raises(RuntimeError, match='could not be written: File too large. The checkpoints before it'):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_checkpoint(tmp_path)[1]['epoch'] == 0
    assert {path.name for path in tmp_path.iterdir()} == {'last.pth.tar', 'previous.pth.tar'}
    saver.save(large, 1, None)
    assert find_checkpoint(tmp_path)[1]['epoch'] == 1


def test_the_newest_whole_checkpoint_is_found_and_the_newest_two_within_epochs_are_kept(tmp_path, caplog):
    saver, state = CheckpointSaver(tmp_path), {'state_dict': {}, 'optimizer': {}}

    def within(epoch, updates):
        progress = {'epoch': epoch, 'updates': updates}
        return saver.save_recovery({**state, 'progress': progress}, epoch, updates)

    saver.save(state, 8, None)
    for updates in (5, 50, 100):
        within(9, updates)
    found = [path.name for path in sorted(tmp_path.glob('recovery*'))]
    assert found == ['recovery-9-100.pth.tar', 'recovery-9-50.pth.tar']
    assert find_checkpoint(tmp_path)[0].name == 'recovery-9-100.pth.tar'
    truncate(tmp_path / 'recovery-9-100.pth.tar')
    assert find_checkpoint(tmp_path)[0].name == 'recovery-9-50.pth.tar'
    assert 'recovery-9-100.pth.tar is damaged' in caplog.text and 'trying the one before' in caplog.text
    saver.save(state, 9, None)
    assert find_checkpoint(tmp_path)[0].name == 'last.pth.tar'
    truncate(tmp_path / 'last.pth.tar')
    assert find_checkpoint(tmp_path)[0].name == 'recovery-9-50.pth.tar'
    saver.forget_after((9, 0))
    assert find_checkpoint(tmp_path)[0].name == 'previous.pth.tar'
    within(10, 1)
    assert find_checkpoint(tmp_path)[0].name == 'recovery-10-1.pth.tar'


def test_an_epoch_without_evaluation_leaves_gaps(make_config, run_training, tmp_path):
    run = run_training(make_config(tmp_path, epochs=3, val_interval=2))
    assert ['validation' in entry for entry in run.result['history']] == [False, True, True]
    with open(run.folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert [row['eval_top1'] == '' for row in rows] == [True, False, False]


def test_a_summary_keeps_the_columns_of_an_earlier_version(finished, tmp_path):
    old = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\r\n0,1.5,1.25,50.0,90.0,0.1\r\n'
    (tmp_path / 'summary.csv').write_bytes(old.encode())
    entry = finished('none').result['history'][-1]
    assert 'accuracy' in entry['train']
    append_summary(tmp_path / 'summary.csv', 1, entry['train'], entry['validation'], 0.05, ('loss', 'top1', 'top5'))
    with open(tmp_path / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / 'summary.csv').read_bytes().decode().startswith(old) and len(rows) == 2
    assert {key: float(value) for key, value in rows[1].items()} == {
        'epoch': 1, 'train_loss': entry['train']['loss'], 'lr': 0.05,
        **{f'eval_{key}': entry['validation'][key] for key in ('loss', 'top1', 'top5')}}
    draw_curves(tmp_path / 'summary.csv', tmp_path / 'curves.png')
