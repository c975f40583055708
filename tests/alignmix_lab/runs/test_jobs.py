"""Jobs that end, fail, are cut or wait for each other."""
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignmix_lab.runs import jobs as running
from alignmix_lab.runs.jobs import Job, describe_jobs, gpu_share, run_jobs

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
    return Job(['python', '-c', FAKE, str(folder), str(epochs), str(wait), str(fails_at)], folder, epochs)


def test_failed_jobs_are_reported_and_the_rest_goes_on(tmp_path, caplog):
    jobs = [fake_job(tmp_path / 'a', fails_at=1), fake_job(tmp_path / 'b')]
    failed = run_jobs(jobs)
    assert list(failed) == ['a'] and 'exit code 1' in failed['a'] and 'RuntimeError: out of memory, say' in failed['a']
    assert [job.finished for job in jobs] == [False, True]
    assert 'going on with the rest' in caplog.text
    assert run_jobs([fake_job(tmp_path / 'a'), jobs[1]]) == {}  # goes on at epoch 1; b is not started again
    assert (tmp_path / 'a' / 'starts').read_text().split() == ['0', '1']
    assert (tmp_path / 'b' / 'starts').read_text().split() == ['0', '0']


def signal_when(condition: Callable[[], object], number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal to this process once a condition holds."""
    def wait() -> None:
        until = time.monotonic() + 30
        while not condition() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_lets_all_runs_save_and_the_next_call_goes_on(tmp_path, number):
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # whatever the tests were started with
    jobs = [fake_job(tmp_path / name, epochs=3, wait=0.4) for name in 'abc']
    try:
        signal_when(lambda: all(job.done for job in jobs[:2]), number)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs, at_once=2)
        assert [(job.folder / 'saved').exists() for job in jobs] == [True, True, False]
        assert all(0 < job.done < 3 for job in jobs[:2]) and not jobs[2].folder.exists()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert run_jobs(jobs, at_once=3) == {} and all(job.finished for job in jobs)
    assert [(job.folder / 'starts').read_text().split()[-1] == '0' for job in jobs] == [False, False, True]
    assert list(jobs[0].curve) == [0, 1, 2]


@pytest.fixture
def children():
    """Child processes that a test has started; earlier tests may have left some, such as workers of loaders."""
    earlier = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in earlier]


def test_runs_at_a_time_are_as_many_as_asked_for(tmp_path, children):
    jobs = [fake_job(tmp_path / name, epochs=2, wait=0.3) for name in 'abcd']
    most = 0

    def watch() -> None:
        nonlocal most
        while not all(job.finished for job in jobs):
            most = max(most, len(children()))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert run_jobs(jobs, at_once=2) == {}
    watcher.join()
    assert most == 2


@pytest.mark.parametrize('own_session', [False, True])
@pytest.mark.parametrize('ends_first', [False, True])
def test_what_a_launcher_leaves_behind_is_waited_for(tmp_path, children, own_session, ends_first):
    """accelerate's launcher of one process ends at SIGTERM, before the training has saved.

    A scheduler may signal the launcher as well; torchrun starts its workers in sessions of their own.
    """
    launcher = (
        f'import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], start_new_session={own_session})')
    job = fake_job(tmp_path / 'a', epochs=3, wait=0.4)
    slow = FAKE.replace("    (folder / 'saved').touch()", "    time.sleep(1); (folder / 'saved').touch()")
    job = Job(['python', '-c', launcher, '-c', slow, *job.command[3:]], job.folder, 3)

    def launched() -> bool:
        if job.done and ends_first:
            (process,) = children()
            process.kill()
        return job.done > 0

    signal_when(launched)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job])
    assert (job.folder / 'saved').exists()


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch, children):
    monkeypatch.setattr(running, 'GRACE', 0.3)
    deaf = 'import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN); pathlib.Path(sys.argv[1]).touch(); ' \
        'time.sleep(60)'
    job = Job(['python', '-c', deaf, str(tmp_path / 'ready')], tmp_path / 'a', 1)
    signal_when((tmp_path / 'ready').exists)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job])
    assert children() == []


def test_a_program_that_is_not_there_ends_the_call_and_what_runs(tmp_path, children):
    other = fake_job(tmp_path / 'b', epochs=9, wait=0.4)
    job = Job(['no-such-launcher', 'train_imagenet.py'], tmp_path / 'a', 1)
    with pytest.raises(FileNotFoundError, match='no-such-launcher'):
        run_jobs([other, job], at_once=2)
    assert children() == []


def test_epochs_without_evaluation_have_no_top1(tmp_path):
    job = Job([], tmp_path, 5)
    assert (job.curve, job.done) == ({}, 0)
    (tmp_path / 'summary.csv').write_text('epoch,eval_top1\n0,\n1,50.5\n2,\n3,60\n')
    assert (job.curve, job.done, job.finished) == ({1: 50.5, 3: 60.0}, 4, False)


def test_time_is_estimated_from_finished_runs(tmp_path):
    jobs = [fake_job(tmp_path / name, epochs=100) for name in 'ab']
    assert describe_jobs(jobs) == (
        'Runs: 2, 0 finished; epochs: 200, 0 done; how long the rest takes can be said when one has finished')
    jobs[0].folder.mkdir()
    (jobs[0].folder / 'summary.csv').write_text('epoch,eval_top1\n99,80\n')
    (jobs[0].folder / 'report.md').write_text('- Data: x\n- Time: 2 days, 2:00:00 for 100 epochs of 9 updates\n')
    assert describe_jobs(jobs, at_once=8) == (
        'Runs: 2, 1 finished; epochs: 200, 100 done; the rest takes about 2 days, 2:00:00 at the pace of the finished '
        'runs')


@pytest.mark.parametrize('visible, slots, shares', [
    (None, 2, ['0,1', '2,3']), (None, 3, ['0', '1', '2']), (None, 6, ['0', '1', '2', '3', '0', '1']),
    ('6,7', 2, ['6', '7']), (None, 1, [None])])
def test_runs_at_a_time_share_the_gpus(monkeypatch, visible, slots, shares):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    if visible is None:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    else:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert [gpu_share(slot, slots).get('CUDA_VISIBLE_DEVICES') for slot in range(slots)] == shares
