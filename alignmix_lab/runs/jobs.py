"""Training runs as processes: how far they are, and several of them at a time."""
import csv
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .agreement import StopSignals
from .files import lock_file
from .run_report import seconds_per_epoch

_logger = logging.getLogger(__name__)

GRACE = 120  # seconds that an interrupted run has to save its state


@dataclass(frozen=True, eq=False)
class Job:
    """A run and the command that trains it.

    It is finished when its summary.csv has the last epoch, so it does not matter who ran the command.
    """
    command: Sequence[str]  # resumes the run where there is one; 'python' is this interpreter
    folder: Path
    epochs: int  # after which it is finished

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder, which the training makes itself."""
        return self.folder.with_name(f'{self.name}.log')

    @property
    def done(self) -> int:
        """Epochs that are done."""
        rows = self._rows()
        return min(int(rows[-1]['epoch']) + 1, self.epochs) if rows else 0

    @property
    def finished(self) -> bool:
        return self.done == self.epochs

    def curve(self, metric: str = 'eval_top1') -> dict[int, float]:
        """A column of summary.csv by epoch, of the epochs where it was measured."""
        return {int(row['epoch']): float(row[metric]) for row in self._rows() if row[metric]}

    def _rows(self) -> list[dict[str, str]]:
        try:
            with (self.folder / 'summary.csv').open(newline='', encoding='utf-8') as file:
                return list(csv.DictReader(file))
        except OSError:
            return []


def describe_jobs(jobs: Sequence[Job], at_once: int = 1) -> str:
    """Count runs and epochs, and estimate the time that is left where finished runs tell how long an epoch takes."""
    finished = [job for job in jobs if job.finished]
    total, done = sum(job.epochs for job in jobs), sum(job.done for job in jobs)
    text = f'Runs: {len(jobs)}, {len(finished)} finished; epochs: {total}, {done} done'
    paces = [pace for pace in (seconds_per_epoch(job.folder) for job in finished) if pace is not None]
    if paces and done < total:
        seconds = sum(paces) / len(paces) * (total - done) / min(at_once, len(jobs) - len(finished))
        text += f'; the rest takes about {timedelta(seconds=round(seconds))} at the pace of the finished runs'
    return text


def run_jobs(jobs: Sequence[Job], at_once: int = 1, progress: bool = False) -> dict[str, str]:
    """Run what is not finished, `at_once` runs at a time; returns why runs failed, by name.

    SIGTERM, SIGINT and SIGHUP are passed on to the runs; when these have saved their state and ended,
    KeyboardInterrupt is raised. `progress` shows the progress bar even where the output is no terminal.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    stop = StopSignals([number for number in numbers if signal.getsignal(number) != signal.SIG_IGN])  # as by nohup
    done = {job: job.done for job in jobs}
    waiting = iter([(f'[{number}/{len(jobs)}] {job.name}', job) for number, job in enumerate(jobs, 1)])
    running: dict[str, Job] = {}
    failed: dict[str, str] = {}
    bar = tqdm(total=sum(job.epochs for job in jobs), initial=sum(done.values()), unit='epoch',
               disable=not (progress or sys.stderr.isatty()))

    def work(slot: int) -> None:
        for title, job in waiting:
            if done[job] == job.epochs:
                continue
            running[title] = job
            bar.set_description(', '.join(running))
            error = run_job(job, stop, gpu_share(slot, at_once))
            done[job] = job.done
            if stop.received:
                return
            if error is None:
                _logger.info(f'{title}: top-1 {[*job.curve().values()][-1]:.2f} % after {job.epochs} epochs')
            else:
                failed[job.name] = error
                _logger.error(f'{title} failed, going on with the rest: {error}')
            del running[title]

    with stop.listening(), logging_redirect_tqdm(), bar, ThreadPoolExecutor(at_once) as pool:
        workers = [pool.submit(work, slot) for slot in range(at_once)]
        while wait(workers, 1).not_done:
            done |= {job: job.done for job in [*running.values()]}
            bar.update(sum(done.values()) - bar.n)
        bar.update(sum(done.values()) - bar.n)
    for worker in workers:
        worker.result()
    if stop.received:
        raise KeyboardInterrupt
    return failed


def run_job(job: Job, stop: StopSignals, variables: dict[str, str] | None = None) -> str | None:
    """Run a job to its end, or after a signal until it has saved its state, with more environment variables.

    Returns:
        Why it failed, with the end of its log, or None.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *job.command[1:]] if job.command[0] == 'python' else job.command
    with job.log.open('a', encoding='utf-8') as log:
        if not lock_file(log):
            return f'another process is training it (it has {job.log} open)'
        log.write(f'$ {shlex.join(job.command)}\n')
        log.flush()
        try:
            # All its processes inherit the lock: it holds as long as one of them lives, even if this one dies. The
            # session of its own keeps Ctrl-C from them and lets a signal reach them together.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(variables or {})},
                start_new_session=True)
        except OSError as e:
            return f'it cannot be started: {e}'
    deadline = None
    # After a signal every process of the run has time to save: a launcher may end before what it launched.
    while process.poll() is None or (stop.received and _is_locked(job.log)):
        if stop.received and deadline is None:
            _logger.warning(f'{job.name}: interrupted, waiting up to {GRACE} s for it to save its state')
            _signal(process, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
        elif deadline is not None and time.monotonic() > deadline:
            _signal(process, signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.2)
    if process.returncode == 0 and job.finished:
        return None
    reason = f'exit code {process.returncode}' if process.returncode else f'it ended after {job.done} epochs'
    lines = job.log.read_text(encoding='utf-8', errors='replace').splitlines()[-15:]
    return '\n    '.join([f'{reason}; {job.log} ends with', *lines])


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _is_locked(path: Path) -> bool:
    with path.open('a') as file:
        return not lock_file(file)


def gpu_share(slot: int, slots: int) -> dict[str, str]:
    """Environment variables that give one of several runs at a time its share of the GPUs."""
    if slots == 1 or not torch.cuda.device_count():
        return {}
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))).split(',')
    each = len(gpus) // slots
    own = gpus[slot * each:(slot + 1) * each] or [gpus[slot % len(gpus)]]
    return {'CUDA_VISIBLE_DEVICES': ','.join(own)}
