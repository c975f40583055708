"""Trainings as processes: finished ones stay, those that were cut go on, those that fail do not stop the rest.

A job is finished when its summary.csv has the last epoch, so that it does not matter who ran it: this runner, or a
scheduler that was given the command.
"""
import csv
import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_logger = logging.getLogger(__name__)

GRACE = 120  # seconds that an interrupted training has to save its state


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        command: Words of the command; 'python' is this interpreter. It continues the run where there is one.
        folder: Folder of the run.
        epochs: Epochs after which it is finished.
    """
    command: tuple[str, ...]
    folder: Path
    epochs: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder, which the training makes itself."""
        return self.folder.with_name(f'{self.name}.log')

    def rows(self) -> list[dict[str, str]]:
        """The lines of its summary.csv so far, one an epoch."""
        try:
            with (self.folder / 'summary.csv').open(newline='', encoding='utf-8') as file:
                return list(csv.DictReader(file))
        except OSError:
            return []

    def done(self) -> int:
        """Epochs that are done."""
        rows = self.rows()
        return int(rows[-1]['epoch']) + 1 if rows else 0

    @property
    def finished(self) -> bool:
        return self.done() >= self.epochs


def run_jobs(jobs: Sequence[Job], progress: bool = False, cwd: Path | None = None) -> dict[str, str]:
    """Run what is not finished, one after the other.

    Args:
        jobs: What to run.
        progress: A progress bar even where the output is no terminal.
        cwd: Folder to run in; None is the present one.

    Returns:
        Of each job that failed, by its name, why.
    """
    failed = {}
    total, before = sum(job.epochs for job in jobs), sum(min(job.done(), job.epochs) for job in jobs)
    with tqdm(total=total, initial=before, unit='epoch', disable=not (progress or sys.stderr.isatty())) as bar:
        for number, job in enumerate(jobs, 1):
            if job.finished:
                continue
            bar.set_description(f'[{number}/{len(jobs)}] {job.name}')
            start, since = time.monotonic(), job.done()

            def update(done: int, base: int = bar.n - since) -> None:
                bar.update(base + done - bar.n)

            error = run_job(job, update, cwd)
            if error is None:
                last = job.rows()[-1].get('eval_top1') or 'nan'
                _logger.info(
                    f'[{number}/{len(jobs)}] {job.name}: top-1 {float(last):.2f} % after {job.epochs} epochs, '
                    f'{time.monotonic() - start:.0f} s' + (f', from epoch {since}' if since else ''))
            else:
                failed[job.name] = error
                _logger.error(f'[{number}/{len(jobs)}] {job.name} failed, going on with the rest: {error}')
    return failed


def run_job(job: Job, update: Callable[[int], None] = lambda done: None, cwd: Path | None = None) -> str | None:
    """Run a job to its end.

    An interruption is passed on to the training, which saves its state, before it is raised here.

    Args:
        job: The job.
        update: Gets the number of epochs that are done, from time to time.
        cwd: Folder to run in.

    Returns:
        Why it failed, with the end of its log, or None.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *job.command[1:]] if job.command[0] == 'python' else list(job.command)
    with job.log.open('a', encoding='utf-8', errors='replace') as log:
        try:
            # The training inherits the lock: it holds as long as the training lives, even if this process dies.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f'another process is training it (it has {job.log} open)'
        log.write(f'$ {shlex.join(job.command)}\n')
        log.flush()
        start = log.tell()
        try:
            # A session of its own: Ctrl-C comes here alone, and the launcher's processes can be told together.
            process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=cwd, start_new_session=True)
        except OSError as e:
            return f'{words[0]} cannot be started: {e}'
        _wait(process, job, update)
    if process.returncode == 0 and job.finished:
        return None
    reason = f'exit code {process.returncode}' if process.returncode else f'it ended after {job.done()} epochs'
    return f'{reason}; {job.log} ends with\n{tail(job.log, start)}'


def _wait(process: subprocess.Popen, job: Job, update: Callable[[int], None]) -> None:
    try:
        while process.poll() is None:
            time.sleep(0.2)
            update(min(job.done(), job.epochs))
    except BaseException:
        _logger.warning(f'{job.name}: interrupted, waiting up to {GRACE} s for it to save its state')
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    update(min(job.done(), job.epochs))


def tail(path: Path, start: int = 0, lines: int = 15) -> str:
    """The last lines of a log that were written after the byte `start`."""
    with path.open('rb') as file:
        file.seek(start)
        text = file.read().decode(errors='replace')
    return '\n'.join(f'    {line}' for line in text.splitlines()[-lines:])


def write_queue(jobs: Sequence[Job], file: TextIO) -> int:
    """Write the commands of what is not finished, one a line, and return how many."""
    waiting = [job for job in jobs if not job.finished]
    file.writelines(shlex.join(job.command) + '\n' for job in waiting)
    return len(waiting)
