"""What a checkpoint holds of a run, and how a run continues from it, on the same or another number of processes."""
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import unwrap_model

from timm_alignmix.weights import key_problems

from .checkpoint import position
from .totals import LossTotals

if TYPE_CHECKING:
    from .build import Run

_logger = logging.getLogger(__name__)


def checkpoint_state(run: 'Run', epoch: int, updates: int = 0, totals: LossTotals | None = None) -> dict[str, Any]:
    """Everything of a run that its checkpoint holds, under timm's keys; to be called on all processes.

    No generator needs saving: each draw is a function of the seed, the step and the process.

    Args:
        run: The run.
        epoch: Epoch that a resumed run continues.
        updates: Updates of that epoch that are done.
        totals: What these summed up.

    Raises:
        RuntimeError: Weights are not finite.
    """
    _check_finite(run)
    progress = {
        'epoch': epoch,
        'updates': updates,
        'updates_per_epoch': run.updates_per_epoch,
        'samples': min(updates * run.global_batch_size, len(run.loaders.train) * run.images_per_step),
        'layout': run.layout,
        'totals': totals and totals.state_dict(run.accelerator),
        'nonfinite': run.nonfinite,
        'seconds': run.seconds,
        'statistics': _gather_statistics(run),
    }
    state = {
        'arch': run.config.arch,
        'version': 2,  # the epoch is the finished one
        'args': run.config.to_dict(),
        'data_config': run.data_config,
        'global_batch_size': run.global_batch_size,
        'progress': progress,
        'optimizer': run.optimizer.state_dict(),
        **run.task.get_checkpoint_state(),
        **run.task.get_checkpoint_state(ema=True),
    }
    if run.accelerator.scaler is not None:
        state['amp_scaler'] = run.accelerator.scaler.state_dict()
    return state


def load_run(run: 'Run', state: dict[str, Any], path: Path) -> None:
    """Put a checkpoint into a run and set where it continues.

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
    run.start_epoch, run.start_update = position(state)
    if 'progress' in state:
        _load_progress(run, state['progress'], state['args'])
    where = f'epoch {run.start_epoch - 1} is done'
    if run.start_update:
        where = f'epoch {run.start_epoch} continues after {run.start_update} of {run.updates_per_epoch} updates'
    _logger.info(f'Resumed {path}: {where}')


def _load_progress(run: 'Run', progress: dict[str, Any], args: dict[str, Any]) -> None:
    """Continue an epoch, on another layout at the same sample: batches of all processes together are stretches of one
    order (but for FFCV files larger than memory, where each process reads a part of its own)."""
    run.resumed_totals, run.nonfinite, run.seconds_before = (
        progress[key] for key in ('totals', 'nonfinite', 'seconds'))
    if progress['layout'] == run.layout:
        _load_statistics(run, progress['statistics'])
        return
    changes = ', '.join(
        f'{name} {value} -> {run.layout[name]}' for name, value in progress['layout'].items()
        if value != run.layout[name])
    lr = args['lr']
    message = f'Resuming on another layout: {changes}; learning rate {lr:.4g} -> {run.config.lr:.4g}'
    if progress['updates'] == progress['updates_per_epoch']:
        run.start_update = run.updates_per_epoch
    elif progress['updates']:
        # Round up: no sample is trained on twice.
        run.start_update = min(-(-progress['samples'] // run.global_batch_size), run.updates_per_epoch)
        left_out = run.start_update * run.global_batch_size - progress['samples']
        message += (
            f'; epoch {run.start_epoch} goes on from {progress["updates"]} of '
            f'{progress["updates_per_epoch"]} updates to {run.start_update} of {run.updates_per_epoch} (sample '
            f'{progress["samples"]}' + (f', {left_out} left out' if left_out > 0 else '') + ')')
    _logger.warning(message + '; the draws of mixing and dropout are others')


def _check_finite(run: 'Run') -> None:
    weights = [parameter.detach() for parameter in run.task.get_eval_model().parameters()]
    largest = torch._foreach_norm(weights, math.inf)
    if not torch.stack([value.float() for value in largest]).isfinite().all():
        raise RuntimeError(
            'the weights are no longer finite though the loss was: gradients overflowed. Nothing was saved; continue '
            'from the last checkpoint with a lower --lr, --clip-grad or --amp-dtype bfloat16')


def _statistics(run: 'Run') -> list[torch.Tensor]:
    """Running statistics of the model and its average, in which processes differ until an evaluation."""
    models = [run.task.get_eval_model(), *([run.task.get_eval_model(ema=True)] if run.task.has_ema() else [])]
    return [
        buffer for model in models for name, buffer in unwrap_model(model).named_buffers()
        if name.rpartition('.')[2] in ('running_mean', 'running_var')
    ]


def _gather_statistics(run: 'Run') -> torch.Tensor | None:
    """Those of all processes, (processes, values), where they differ."""
    buffers = _statistics(run)
    if run.accelerator.num_processes == 1 or not buffers:
        return None
    own = torch.cat([buffer.float().flatten().to(run.accelerator.device) for buffer in buffers])
    rows = run.accelerator.gather(own[None]).cpu()
    return None if torch.equal(rows, rows[:1].expand_as(rows)) else rows


def _load_statistics(run: 'Run', rows: torch.Tensor | None) -> None:
    buffers = _statistics(run)
    sizes = [buffer.numel() for buffer in buffers]
    if rows is None or rows.shape[1] != sum(sizes):  # all alike, or with a moving average that only one of both has
        return
    own = rows[run.accelerator.process_index].split(sizes)
    for buffer, values in zip(buffers, own, strict=True):
        buffer.copy_(values.view_as(buffer))


def _check_weights(model: torch.nn.Module, state: dict[str, Any], path: Path, name: str) -> None:
    problems = key_problems(unwrap_model(model).state_dict(), state['state_dict'])
    if problems:
        raise ValueError(f'{path} ({state.get("arch", "unknown model")}) does not fit {name}: {problems}')
