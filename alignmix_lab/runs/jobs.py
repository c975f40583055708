"""Training commands that run beside each other, each in a run folder of its own, and how far they are."""
import csv
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .agreement import StopSignals
from .run_report import seconds_per_epoch

_logger = logging.getLogger(__name__)

GRACE = 120  # seconds that interrupted runs have to save their state
LAUNCHER = 'ALIGNMIX_LAUNCHER'  # environment variable of all processes of the jobs: id of the process that started them


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


def describe_jobs(jobs: list[Job], at_once: int = 1) -> str:
    """Count runs and epochs, and estimate the time that is left where finished runs tell how long an epoch takes."""
    finished = [job for job in jobs if job.finished]
    total, done = sum(job.epochs for job in jobs), sum(job.done for job in jobs)
    text = f'Runs: {len(jobs)}, {len(finished)} finished; epochs: {total}, {done} done'
    paces = [pace for pace in (seconds_per_epoch(job.folder) for job in finished) if pace is not None]
    if paces and done < total:
        seconds = sum(paces) / len(paces) * (total - done) / min(at_once, len(jobs) - len(finished))
        text += f'; the rest takes about {timedelta(seconds=round(seconds))} at the pace of the finished runs'
    elif done < total:
        text += '; how long the rest takes can be said when one has finished'
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
