"""Checkpoint files in timm's layout: written atomically, loaded without running code, checked for damage."""
import logging
import operator
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from timm_alignmix.weights import key_problems

from .sharding import check_shards, copy_shards, remove_shards

_logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes the checkpoints of a run.

    After an epoch: `last.pth.tar`, its predecessor `previous.pth.tar`, `model_best.pth.tar` and the best
    `checkpoint-EPOCH.pth.tar`, up to `max_history`. Within an epoch: the newest two `recovery-EPOCH-UPDATE.pth.tar`.

    A file is written under a temporary name, flushed to disk and then renamed, so a run that dies while saving keeps
    the previous file.
    """

    def __init__(self, folder: Path, eval_metric: str = 'top1', max_history: int = 10):
        self.folder = folder
        self.eval_metric = eval_metric  # ranks checkpoints; 'loss' is better when smaller
        self.max_history = max_history
        self.history: list[tuple[int, float]] = []  # (epoch, metric) of the kept files, best first
        self.best: dict[str, float] | None = None  # `epoch` and metrics of the best epoch so far

    def path(self, name: str | int) -> Path:
        """Return the file of an epoch or of `last`, `previous`, `model_best` or `recovery-EPOCH-UPDATE`."""
        return self.folder / (f'checkpoint-{name}.pth.tar' if isinstance(name, int) else f'{name}.pth.tar')

    def save(self, state: dict[str, Any], epoch: int, metrics: dict[str, float] | None) -> None:
        """Save an epoch; only epochs with metrics are ranked."""
        decreasing, dropped, is_best = self.eval_metric == 'loss', [], False
        metric = metrics and metrics[self.eval_metric]
        if metrics is not None:
            better = operator.lt if decreasing else operator.gt
            is_best = self.best is None or better(metric, self.best[self.eval_metric])
            if is_best:
                self.best = {'epoch': epoch, **metrics}
            # Stable sort: of equal epochs the earlier one ranks first.
            ranked = sorted([*self.history, (epoch, metric)], key=lambda kept: kept[1], reverse=not decreasing)
            self.history, dropped = ranked[:self.max_history], ranked[self.max_history:]
        with self.explained(self.path('last').name):
            if self.path('last').exists():
                self._link('previous')
            self._write('last', {**state, 'epoch': epoch, 'metric': metric, 'metrics': metrics, **self._ranking()})
            if is_best:
                self._link('model_best')
            if (epoch, metric) in self.history:
                self._link(epoch)
        for old, _ in dropped:
            self.path(old).unlink(missing_ok=True)
        self._forget_shards()

    def save_recovery(self, state: dict[str, Any], epoch: int, updates: int) -> Path:
        """Save an epoch after some of its updates; timm would continue such a file from the start of the epoch."""
        name = f'recovery-{epoch}-{updates}'
        with self.explained(self.path(name).name):
            self._write(name, {**state, 'epoch': epoch - 1, 'metric': None, 'metrics': None, **self._ranking()})
        for _, old in _within_epochs(self.folder)[:-2]:
            old.unlink()
        self._forget_shards()
        return self.path(name)

    def forget_after(self, position: tuple[int, int]) -> None:
        """Remove recovery checkpoints later than (epoch, updates), from where the run now continues differently."""
        for later, path in _within_epochs(self.folder):
            if later > position:
                path.unlink()

    def _forget_shards(self) -> None:
        remove_shards(self.folder, self.folder.glob('*.pth.tar'))

    def _ranking(self) -> dict[str, Any]:
        return {'saver': {'eval_metric': self.eval_metric, 'history': self.history, 'best': self.best}}

    @contextmanager
    def explained(self, name: str) -> Iterator[None]:
        """Explain a failure to write; torch.save raises an error of its own when the disk is full."""
        try:
            yield
        except (OSError, RuntimeError) as e:
            cause = e if isinstance(e, OSError) else e.__context__
            if not isinstance(cause, OSError):
                raise
            raise RuntimeError(
                f'{self.folder / name} could not be written: {cause.strerror or cause}. The checkpoints before it are '
                'intact; free disk space or make the folder writable, and continue with --resume auto') from e
        finally:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Continue a ranking by the same metric, in its own folder or, with its best file, in a new one."""
        saver = state.get('saver', {})
        if saver.get('eval_metric') != self.eval_metric:
            return
        self.best = saver['best']
        if source.parent.resolve() == self.folder.resolve():
            self.history = [(epoch, metric) for epoch, metric in saver['history'] if self.path(epoch).exists()]
        elif (best := source.parent / self.path('model_best').name).exists():
            copy_shards(best, self.folder)
            shutil.copy2(best, self.path('model_best'))

    @property
    def _temporary(self) -> Path:
        return self.folder / 'tmp.pth.tar'

    def _write(self, name: str, state: dict[str, Any]) -> None:
        with open(self._temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self._rename(self.path(name))

    def _link(self, name: str | int) -> None:
        """Give the last checkpoint a second name, as a hard link if the file system supports it."""
        self._temporary.unlink(missing_ok=True)
        try:
            os.link(self.path('last'), self._temporary)
        except OSError:
            shutil.copy2(self.path('last'), self._temporary)
        self._rename(self.path(name))

    def _rename(self, target: Path) -> None:
        os.replace(self._temporary, target)
        self._temporary.unlink(missing_ok=True)  # renaming a link to another link of the same file keeps both
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _numbered(folder: Path, pattern: str) -> list[tuple[tuple[int, ...], Path]]:
    """Find the files of a folder whose names match, sorted by their numbers."""
    found = ((re.fullmatch(pattern, path.name), path) for path in folder.glob('*'))  # none if the folder is missing
    return sorted((tuple(map(int, match.groups())), path) for match, path in found if match)


def _within_epochs(folder: Path) -> list[tuple[tuple[int, ...], Path]]:
    """Find the recovery checkpoints of a folder as ((epoch, updates), file), the newest last."""
    return _numbered(folder, r'recovery-(\d+)-(\d+)\.pth\.tar')


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint on the CPU; code in the file is never executed.

    Unlike torch.load, it verifies the checksums in the file, which reveal a changed byte in a tensor.

    Raises:
        ValueError: The file is missing, damaged, or no training checkpoint.
    """
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such checkpoint')
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() or next(
                (entry.filename for entry in file.infolist() if entry.external_attr), None)  # torch writes none
        if damaged is not None:
            raise ValueError(f'its entry {damaged} has changed')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # foreign content and bad sectors raise errors of almost any type
        raise ValueError(f'{path} is damaged or no checkpoint ({e})') from e
    if not isinstance(state, dict) or not {'state_dict', 'optimizer', 'epoch'} <= state.keys():
        raise ValueError(f'{path} has no training state to resume; to start from its weights pass --initial-checkpoint')
    check_shards(state, Path(path))
    return state


def check_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], source: str | Path, name: str) -> None:
    """Check that weights from `source` have a model's keys and shapes; a ValueError lists those that do not fit."""
    problems = key_problems(unwrap_model(model).state_dict(), state_dict)
    if problems:
        raise ValueError(f'{source} does not fit {name}: {problems}')


def load_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], source: str | Path, name: str) -> None:
    """Load weights after :func:`check_weights`."""
    check_weights(model, state_dict, source, name)
    model.load_state_dict(state_dict)


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder has the checkpoints of a run."""
    return (folder / 'last.pth.tar').exists() or bool(_within_epochs(folder))


def position(state: dict[str, Any]) -> tuple[int, int]:
    """Return the epoch in which a checkpoint continues, and how many of its updates are done."""
    progress = state.get('progress')
    return (progress['epoch'], progress['updates']) if progress else (state['epoch'] + 1, 0)


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest intact checkpoint of a run's folder; None if there are no checkpoints.

    Raises:
        ValueError: All checkpoints are damaged.
    """
    ends = [path for path in (folder / 'last.pth.tar', folder / 'previous.pth.tar') if path.exists()]
    others = _within_epochs(folder)
    others += [((epoch + 1, 0), path) for (epoch,), path in _numbered(folder, r'checkpoint-(\d+)\.pth\.tar')]
    found = _first_whole(ends)
    reached = position(found[1]) if found else (-1, -1)
    newer = _first_whole([path for where, path in sorted(others, reverse=True) if where > reached])
    if newer is None and found is None and (ends or others):
        raise ValueError(f'all checkpoints in {folder} are damaged; pass another --experiment to start again')
    return newer or found


def _first_whole(paths: list[Path]) -> tuple[Path, dict[str, Any]] | None:
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as e:
            _logger.warning(f'{e}; trying the one before')
    return None
