"""Log lines, progress bar and summary.csv of a run."""
import csv
import io
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils import AverageMeter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .files import write_whole
from .run import Run
from .totals import LossTotals, Sums

_logger = logging.getLogger(__name__)


@contextmanager
def progress_bar(run: Run, name: str, total: int, initial: int = 0) -> Iterator[tqdm]:
    """Show a progress bar below the log lines: on the main process, on a terminal or with --progress."""
    shown = run.accelerator.is_main_process and (run.config.progress or sys.stderr.isatty())
    with logging_redirect_tqdm(), tqdm(
            total=total, initial=initial, desc=name, leave=False, disable=not shown) as bar:
        yield bar


class EpochLog:
    """timm's training lines and the trackers' values of one epoch; only :meth:`write` waits for the device.

    The totals may contain steps from before a resume, which the first line leaves out.
    """

    def __init__(self, run: Run, epoch: int, totals: LossTotals):
        self.run, self.epoch, self.totals = run, epoch, totals
        self.before, _ = totals.reduced(run.accelerator)  # at the last line
        self.step_time, self.data_time = AverageMeter(), AverageMeter()  # of the epoch
        self.seconds = self.seconds_waited = 0.0  # since the last line
        self.images = self.images_since = 0  # of the last update, since the last line
        self.update_start, self.waited = time.perf_counter(), 0.0

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, or None at the end, and time the wait for it."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - start
        return batch

    def update_done(self, steps: int) -> None:
        """Count an update with a number of steps."""
        now = time.perf_counter()
        self.step_time.update(now - self.update_start)
        self.data_time.update(self.waited)
        self.seconds += self.step_time.val
        self.seconds_waited += self.waited
        self.images = self.run.images_per_step * steps
        self.images_since += self.images
        self.update_start, self.waited = now, 0.0

    def write(self, update: int, loss: torch.Tensor, norm: torch.Tensor | None) -> None:
        """Log an update: its last loss, the norm of its gradients if known, and means."""
        run, updates = self.run, self.run.updates_per_epoch
        sums, (now, *measured) = self.totals.reduced(run.accelerator, loss, *([] if norm is None else [norm]))
        mean, lr = sums.means().get('loss', math.nan), mean_lr(run)
        step, data = self.step_time, self.data_time
        _logger.info(
            f'Train: {self.epoch} [{update:>4d}/{updates} ({100 * (update + 1) / updates:>3.0f}%)]  '
            f'Loss: {now:#.3g} ({mean:#.3g})  '
            f'Time: {step.val:.3f}s, {self.images / step.val:>7.2f}/s  '
            f'({step.avg:.3f}s, {self.images / step.avg:>7.2f}/s)  '
            f'LR: {lr:.3e}  Data: {data.val:.3f} ({data.avg:.3f})')
        if run.accelerator.trackers:
            self._track(sums, measured, lr, self.epoch * updates + update + 1)
        self.before = sums
        self.seconds = self.seconds_waited = 0.0
        self.images_since = 0

    def _track(self, sums: Sums, measured: list[float], lr: float, step: int) -> None:
        """Send the values since the last line to the trackers."""
        values = sums.means(self.before)
        values.update({f'share/{mode}': share for mode, share in self.totals.modes(sums, self.before).items()})
        values.update(
            lr=lr, images_per_second=self.images_since / self.seconds,
            data_wait_share=self.seconds_waited / self.seconds, skipped_updates=self.totals.skipped)
        if measured:
            values['grad_norm'] = measured[0]
        if torch.cuda.is_available():
            values['gpu_memory_gib'] = torch.cuda.max_memory_allocated(self.run.accelerator.device) / 2**30
        self.run.accelerator.log({f'train/{name}': value for name, value in values.items()}, step=step)


def mean_lr(run: Run) -> float:
    """Return the current learning rate, averaged over the parameter groups."""
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


def append_summary(
        path: Path, epoch: int, train_metrics: dict[str, Any], eval_metrics: dict[str, float] | None, lr: float,
        metrics: tuple[str, ...]) -> None:
    """Add an epoch to summary.csv, with a header if it is new; epochs without evaluation have empty cells.

    A file keeps the columns that it has, which may be those of an earlier version.
    """
    train = {f'train_{key}': train_metrics[key] for key in ('loss', 'accuracy') if key in train_metrics}
    row = {'epoch': epoch, **train, 'lr': lr}
    row.update({f'eval_{key}': eval_metrics[key] for key in metrics if eval_metrics})
    text = io.StringIO(newline='')
    old = path.read_bytes().decode() if path.exists() else ''
    columns = ['epoch', *train, *(f'eval_{key}' for key in metrics), 'lr']
    columns = next(csv.reader(old.splitlines()), columns)
    writer = csv.DictWriter(text, fieldnames=columns, extrasaction='ignore')
    if not old:
        writer.writeheader()
    writer.writerow(row)
    write_whole(path, old + text.getvalue())
