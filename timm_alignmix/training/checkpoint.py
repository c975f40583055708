"""Checkpoints in timm's layout: written whole, loaded without running code, checked against the model."""
import logging
import operator
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import unwrap_model

from timm_alignmix.weights import key_problems

if TYPE_CHECKING:
    from .build import Run

_logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes `last.pth.tar`, `model_best.pth.tar` and the best `checkpoint-N.pth.tar` of a run.

    A file appears under its name only when it is complete: it is written under a temporary name, flushed to the disk
    and renamed. So a run that dies while it saves keeps the previous file.

    Args:
        folder: Folder of the run.
        eval_metric: The metric that ranks checkpoints; of 'loss' the smaller is the better.
        max_history: Number of `checkpoint-N.pth.tar` to keep.

    Attributes:
        best: `epoch` and metrics of the best epoch so far.
    """

    def __init__(self, folder: Path, eval_metric: str = 'top1', max_history: int = 10):
        self.folder = folder
        self.eval_metric = eval_metric
        self.max_history = max_history
        self.history: list[tuple[int, float]] = []  # (epoch, metric) of the kept files, best first
        self.best: dict[str, float] | None = None

    def path(self, name: str | int) -> Path:
        """File of `last`, `model_best` or of an epoch."""
        return self.folder / (f'checkpoint-{name}.pth.tar' if isinstance(name, int) else f'{name}.pth.tar')

    def save(self, state: dict[str, Any], epoch: int, metrics: dict[str, float] | None) -> None:
        """Save an epoch; only an evaluated one (with metrics) takes part in the ranking."""
        decreasing, dropped, is_best = self.eval_metric == 'loss', [], False
        metric = metrics and metrics[self.eval_metric]
        if metrics is not None:
            better = operator.lt if decreasing else operator.gt
            is_best = self.best is None or better(metric, self.best[self.eval_metric])
            if is_best:
                self.best = {'epoch': epoch, **metrics}
            # Stable: of equal epochs the earlier one is the better.
            ranked = sorted([*self.history, (epoch, metric)], key=lambda kept: kept[1], reverse=not decreasing)
            self.history, dropped = ranked[:self.max_history], ranked[self.max_history:]
        saver = {'eval_metric': self.eval_metric, 'history': self.history, 'best': self.best}
        self._write({**state, 'epoch': epoch, 'metric': metric, 'metrics': metrics, 'saver': saver})
        if is_best:
            self._link('model_best')
        if (epoch, metric) in self.history:
            self._link(epoch)
        for old, _ in dropped:
            self.path(old).unlink(missing_ok=True)

    def restore(self, state: dict[str, Any], source: Path) -> None:
        """Continue the ranking by the same metric, in its own folder or, with its best file, in a new one."""
        saver = state.get('saver', {})
        if saver.get('eval_metric') != self.eval_metric:
            return
        self.best = saver['best']
        if source.parent.resolve() == self.folder.resolve():
            self.history = [(epoch, metric) for epoch, metric in saver['history'] if self.path(epoch).exists()]
        elif (best := source.parent / self.path('model_best').name).exists():
            shutil.copy2(best, self.path('model_best'))

    def _write(self, state: dict[str, Any]) -> None:
        temporary = self.folder / 'tmp.pth.tar'
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self._rename(temporary, self.path('last'))

    def _link(self, name: str | int) -> None:
        """Give the newest checkpoint a second name, as a hard link where the file system has them."""
        temporary = self.folder / 'tmp.pth.tar'
        try:
            os.link(self.path('last'), temporary)
        except OSError:
            shutil.copy2(self.path('last'), temporary)
        self._rename(temporary, self.path(name))

    def _rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        source.unlink(missing_ok=True)  # renaming a link onto a link of the same file leaves both
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint on the CPU; nothing in the file is executed.

    Raises:
        ValueError: The file is missing, damaged, or no training checkpoint.
    """
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such checkpoint')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as e:  # of any foreign content
        raise ValueError(f'{path} is damaged or no checkpoint ({e})') from e
    if not isinstance(state, dict) or not {'state_dict', 'optimizer', 'epoch'} <= state.keys():
        raise ValueError(f'{path} has no training state to resume; to start from its weights pass --initial-checkpoint')
    return state


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run's folder, or None where there is none at all.

    Raises:
        ValueError: There are checkpoints and every one is damaged.
    """
    numbered = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda path: int(path.name.split('-')[1].split('.')[0]))
    candidates = [path for path in (folder / 'last.pth.tar', *reversed(numbered)) if path.exists()]
    for path in candidates:
        try:
            return path, read_checkpoint(path)
        except ValueError as e:
            _logger.warning(f'{e}; trying the one before')
    if candidates:
        raise ValueError(f'no checkpoint in {folder} can be read')
    return None


def checkpoint_state(run: 'Run') -> dict[str, Any]:
    """Everything of a run that its checkpoint holds, under timm's keys."""
    state = {
        'arch': run.config.arch,
        'version': 2,  # the epoch is the finished one
        'args': run.config.to_dict(),
        'data_config': run.data_config,
        'global_batch_size': run.global_batch_size,
        'optimizer': run.optimizer.state_dict(),
        **run.task.get_checkpoint_state(),
        **run.task.get_checkpoint_state(ema=True),
    }
    if run.accelerator.scaler is not None:
        state['amp_scaler'] = run.accelerator.scaler.state_dict()
    return state


def load_run(run: 'Run', state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint into a run and set its first epoch.

    The moving average, where the run keeps one, starts from the loaded weights where the checkpoint has none.

    Raises:
        ValueError: The checkpoint is of another model or optimizer.
    """
    config, task = run.config, run.task
    _check_weights(task.get_eval_model(), state, path, config.arch)
    task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
    if task.has_ema():
        ema = state.get('state_dict_ema', state['state_dict'])
        task.load_checkpoint_state(ema, state.get('task_state_ema'), ema=True)
    if not config.no_resume_opt:
        saved_opt = state.get('args', {}).get('opt', config.opt)
        if saved_opt != config.opt:
            raise ValueError(
                f'{path} was trained with --opt {saved_opt}, not {config.opt}; pass --no-resume-opt to start the '
                'optimizer anew')
        run.optimizer.load_state_dict(state['optimizer'])
        if run.accelerator.scaler is not None and 'amp_scaler' in state:
            run.accelerator.scaler.load_state_dict(state['amp_scaler'])
    run.start_epoch = state['epoch'] + 1
    _logger.info(f'Resumed {path}: epoch {state["epoch"]} is done')


def _check_weights(model: torch.nn.Module, state: dict[str, Any], path: Path, name: str) -> None:
    problems = key_problems(unwrap_model(model).state_dict(), state['state_dict'])
    if problems:
        raise ValueError(f'{path} ({state.get("arch", "unknown model")}) does not fit {name}: {problems}')
