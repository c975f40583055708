"""One epoch of training."""
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from timm.utils import dispatch_clip_grad, random_seed
from torch import nn

from .agreement import Agreement, StopRequested
from .logs import EpochLog, progress_bar
from .run import Run
from .sharding import whole
from .totals import LossTotals

_logger = logging.getLogger(__name__)


def train_one_epoch(run: Run, epoch: int, save: Callable[[int, LossTotals], None]) -> OrderedDict[str, Any]:
    """Train for one epoch, or for the rest of the epoch in which a run resumes.

    An update is skipped if the loss of any process is not finite: weights, averages, running statistics and totals stay
    as they were, on all processes. `save` saves the epoch after a number of updates with their totals; it is called on
    all processes.

    Returns:
        `loss`, the mean over the steps of all processes; `skipped`, the number of skipped updates; if the task tells,
        `accuracy` in per cent; if it draws modes, `modes`, the share, mean loss and accuracy of each, and `lam`, the
        mean weight of an example against its partner.

    Raises:
        RuntimeError: The loss was not finite in --max-nonfinite consecutive updates.
        StopRequested: A process was asked to stop; everything is saved.
    """
    config, accelerator, loader, updates = run.config, run.accelerator, run.loaders.train, run.updates_per_epoch
    first, totals = 0, run.totals(accelerator.device)
    if epoch == run.start_epoch and run.start_update:
        first = run.start_update
        totals.load_state_dict(run.resumed_totals, accelerator)
    if side := config.train_side(epoch):
        loader.set_size(side)
    config.prepare_epoch(run.task, epoch)
    loader.set_epoch(epoch, start=min(first * config.grad_accum_steps, len(loader)))
    module = run.task.get_trainable_module()
    module.train()
    run.optimizer.zero_grad(set_to_none=True)
    agreement, log = Agreement(accelerator, module, run.stop), EpochLog(run, epoch, totals)
    with progress_bar(run, f'Train {epoch}', updates, first) as bar, closing(iter(loader)) as batches:
        for update in range(first, updates):
            number = epoch * updates + update + 1  # of the updates of the run
            results = _compute_gradients(run, epoch, update, batches, agreement, log)
            if not results:
                break  # a stream may end before its announced length
            finite, stop = agreement.read()
            log_due = update % config.log_interval == 0 or update + 1 == updates
            norm = None
            if finite:
                run.nonfinite = 0
                for result in results:
                    totals.add(result)
                norm = _update(run, number, log_due)
            else:
                agreement.undo()
                _skip(run, epoch, update, totals)
            run.optimizer.zero_grad(set_to_none=True)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates=number)
            bar.update()
            log.update_done(len(results))
            if log_due:
                log.write(update, results[-1]['loss'], norm)
            is_due = config.checkpoint_steps and number % config.checkpoint_steps == 0 and update + 1 < updates
            if stop or is_due:
                save(update + 1, totals)
            if stop:
                raise StopRequested
    return _summarize(run, epoch, totals)


def _compute_gradients(
        run: Run, epoch: int, update: int, batches: Iterator[Any], agreement: Agreement,
        log: EpochLog) -> list[dict[str, Any]]:
    """Run the forward and backward passes of an update; returns the results of each step, without the outputs."""
    task, accelerator, accum = run.task, run.accelerator, run.config.grad_accum_steps
    module, results = task.get_trainable_module(), []
    steps = min(accum, len(run.loaders.train) - update * accum)  # the last update of an epoch may be smaller
    for step in range(steps):
        batch = log.next_batch(batches)
        if batch is None:
            return []
        if step == 0:
            _seed_update(run, epoch, update)
            agreement.start()
        is_last = step + 1 == steps
        with nullcontext() if is_last else accelerator.no_sync(module):
            result = task(*batch)
            agreement.add(result['loss'])
            if is_last:
                agreement.send()
            accelerator.backward(result['loss'] / steps)
        results.append({**result, 'loss': result['loss'].detach(), 'output': None})
    return results


def _seed_update(run: Run, epoch: int, update: int) -> None:
    """Seed dropout and stochastic depth by (seed, epoch, update, rank), so that a run can resume after any update as if
    it had not stopped."""
    seed = np.random.SeedSequence((run.config.seed, epoch, update)).generate_state(1)[0]
    random_seed(int(seed) % 2**31, run.accelerator.process_index)


def _update(run: Run, number: int, measure: bool) -> torch.Tensor | None:
    """Make the `number`-th update of the run; returns the norm of the gradients before clipping if it was computed."""
    config, task, norm = run.config, run.task, None
    if config.clip_grad is not None or measure:
        run.accelerator.unscale_gradients(run.optimizer)
    clips_norm = config.clip_grad is not None and config.clip_mode == 'norm'
    if clips_norm or measure:  # an infinite limit only measures
        limit = config.clip_grad if clips_norm else math.inf
        norm = whole(nn.utils.clip_grad_norm_(task.get_clip_parameters(), limit))
    if config.clip_grad is not None and not clips_norm:
        parameters = task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
        dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
    run.optimizer.step()
    task.update_ema(step=number)
    return norm


def _skip(run: Run, epoch: int, update: int, totals: LossTotals) -> None:
    """Count a skipped update, and end a run that only skips updates."""
    totals.skipped += 1
    run.nonfinite += 1
    where = f'epoch {epoch}, update {update}'
    if run.nonfinite >= run.config.max_nonfinite:
        raise RuntimeError(
            f'the training loss was not finite in {run.nonfinite} updates in a row, the last at {where}; a lower --lr, '
            'a longer --warmup-epochs, --clip-grad or --amp-dtype bfloat16 may help (--max-nonfinite sets the limit)')
    if run.accelerator.is_main_process:
        _logger.warning(f'Train: the loss is not finite at {where}: update skipped, {run.nonfinite} in a row')


def _summarize(run: Run, epoch: int, totals: LossTotals) -> OrderedDict[str, Any]:
    sums, _ = totals.reduced(run.accelerator)
    skipped = f', {totals.skipped} updates skipped' if totals.skipped else ''
    _logger.info(f'Train: {epoch} {totals.describe(sums)}{skipped}')
    means, modes = sums.means(), totals.modes(sums)
    summary = OrderedDict(loss=means.get('loss', math.nan), skipped=totals.skipped)
    if modes:
        summary['modes'] = {
            mode: {'share': share, **{
                name: means[f'{name}/{mode}'] for name in ('loss', 'accuracy') if f'{name}/{mode}' in means}}
            for mode, share in modes.items()}
    summary.update({name: means[name] for name in ('accuracy', 'lam') if name in means})
    return summary
