"""One epoch of training, one pass of evaluation."""
import logging
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from timm.task import ClassificationEvaluator
from timm.utils import AverageMeter, dispatch_clip_grad, random_seed
from torch import nn

from .logs import progress_bar

if TYPE_CHECKING:
    from .build import Run

_logger = logging.getLogger(__name__)


class LossTotals:
    """Sums of what the training steps report, kept on the device so that no step waits for them.

    Args:
        device: Device of the losses.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.steps = 0

    def add(self, result: dict) -> None:
        """Count one step of the task."""
        self.loss += result['loss'].detach()
        self.steps += 1

    def mean_loss(self, run: 'Run') -> float:
        """Mean loss so far over the steps of all processes."""
        return run.accelerator.reduce(self.loss, 'mean').item() / max(1, self.steps)

    def summary(self, run: 'Run') -> str:
        """What the epoch's closing line says."""
        return f'mean loss {self.mean_loss(run):#.3g}'


class MixTotals(LossTotals):
    """Loss, modes and mixing factors of an epoch."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.lam = torch.zeros((), device=device)
        self.lam_count = 0
        self.mode_steps: dict[str, int] = {}
        self.mode_loss: dict[str, torch.Tensor] = {}

    def add(self, result: dict) -> None:
        super().add(result)
        loss, mode = result['loss'].detach(), result['mode']
        self.mode_steps[mode] = self.mode_steps.get(mode, 0) + 1
        self.mode_loss[mode] = self.mode_loss.get(mode, 0) + loss
        if result['lam'] is not None:
            self.lam += result['lam'].detach().float().mean()
            self.lam_count += 1

    def summary(self, run: 'Run') -> str:
        """Share and mean loss of every mode and the mean lam, over all processes (which share the modes)."""
        modes = sorted(self.mode_steps)
        sums = run.accelerator.reduce(torch.stack([self.lam, *(self.mode_loss[mode] for mode in modes)]), 'mean')
        lam, *losses = sums.tolist()
        parts = [
            f'{mode} {100 * self.mode_steps[mode] / self.steps:.1f}% (loss {loss / self.mode_steps[mode]:#.3g})'
            for mode, loss in zip(modes, losses, strict=True)
        ]
        if self.lam_count:
            parts.append(f'mean lam {lam / self.lam_count:.3f}')
        return 'modes: ' + ', '.join(parts)


def train_one_epoch(run: 'Run', epoch: int) -> OrderedDict[str, float]:
    """Train for one epoch.

    Random numbers outside the task (dropout, the loader's workers) are seeded by (seed, epoch, rank), so an epoch
    depends only on the state it starts from.

    Args:
        run: The run, its trainable module and optimizer prepared by Accelerate.
        epoch: Index of the epoch, from 0.

    Returns:
        `loss`: mean loss over the steps of all processes.

    Raises:
        RuntimeError: The loss is not finite.
    """
    config, accelerator, task, loader = run.config, run.accelerator, run.task, run.loaders.train
    accum, batches, updates = config.grad_accum_steps, len(loader), run.updates_per_epoch
    images_per_batch = config.batch_size * accelerator.num_processes
    random_seed((config.seed + 100_003 * epoch) % 2**31, accelerator.process_index)
    loader.set_epoch(epoch)
    if side := config.train_side(epoch):
        loader.set_size(side)
    module = task.get_trainable_module()
    module.train()
    run.optimizer.zero_grad(set_to_none=True)

    totals, step_time, data_time = run.totals(accelerator.device), AverageMeter(), AverageMeter()
    waited, update_start = 0.0, time.perf_counter()
    batch_start = update_start
    with progress_bar(run, f'Train {epoch}', updates) as bar:
        for index, (images, target) in enumerate(loader):
            waited += time.perf_counter() - batch_start
            update = index // accum
            steps = min(accum, batches - update * accum)  # the last update of an epoch may be smaller
            is_update = index + 1 == update * accum + steps
            with nullcontext() if is_update else accelerator.no_sync(module):
                result = task(images, target)
                accelerator.backward(result['loss'] / steps)
            totals.add(result)
            if is_update:
                _update(run, epoch * updates + update + 1)
                bar.update()
                now = time.perf_counter()
                step_time.update(now - update_start)
                data_time.update(waited)
                if update % config.log_interval == 0 or update + 1 == updates:
                    _log_train(run, epoch, update, result['loss'], totals, step_time, data_time,
                               images_per_batch * steps)
                waited, update_start = 0.0, now
            batch_start = time.perf_counter()

    _logger.info(f'Train: {epoch} {totals.summary(run)}')
    return OrderedDict(loss=totals.mean_loss(run))


def _update(run: 'Run', num_updates: int) -> None:
    """One optimizer update, the `num_updates`-th of the run, and what follows it."""
    config, task = run.config, run.task
    if config.clip_grad is not None:
        run.accelerator.unscale_gradients(run.optimizer)
        parameters = task.get_clip_parameters(exclude_head='agc' in config.clip_mode)
        dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    task.update_ema(step=num_updates)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=num_updates)


def _log_train(
        run: 'Run',
        epoch: int,
        update: int,
        loss: torch.Tensor,
        totals: LossTotals,
        step_time: AverageMeter,
        data_time: AverageMeter,
        images: int,
) -> None:
    """timm's training line; the only place of an epoch where the host waits for the device."""
    now = run.accelerator.reduce(loss.detach(), 'mean').item()
    mean = totals.mean_loss(run)
    if not math.isfinite(mean):
        raise RuntimeError(
            f'the training loss is {mean} at epoch {epoch}, update {update}; a lower --lr, a longer --warmup-epochs, '
            '--clip-grad or --amp-dtype bfloat16 may help')
    updates, lr = run.updates_per_epoch, mean_lr(run)
    _logger.info(
        f'Train: {epoch} [{update:>4d}/{updates} ({100 * (update + 1) / updates:>3.0f}%)]  '
        f'Loss: {now:#.3g} ({mean:#.3g})  '
        f'Time: {step_time.val:.3f}s, {images / step_time.val:>7.2f}/s  '
        f'({step_time.avg:.3f}s, {images / step_time.avg:>7.2f}/s)  '
        f'LR: {lr:.3e}  Data: {data_time.val:.3f} ({data_time.avg:.3f})')


def mean_lr(run: 'Run') -> float:
    """Learning rate now, averaged over parameter groups."""
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


@torch.inference_mode()
def validate(run: 'Run', model: nn.Module, name: str = 'Test') -> OrderedDict[str, float]:
    """Evaluate a model on the whole validation set, every image once.

    Processes may have different numbers of batches, so they meet only after the last one.

    Args:
        run: The run.
        model: Plain model that gives logits.
        name: Start of the log line.

    Returns:
        `loss`, `top1` and `top5`, the latter two in per cent.
    """
    loader, interval = run.loaders.val, run.config.log_interval
    model.eval()
    evaluator = ClassificationEvaluator(device=run.accelerator.device)
    batches, start = len(loader), time.perf_counter()
    with progress_bar(run, name, batches) as bar:
        for index, (images, target) in enumerate(loader):
            with run.accelerator.autocast():
                output = model(images)
            evaluator.update(output, target)
            bar.update()
            if index % interval == 0 and index + 1 < batches:
                _log_test(name, index, batches, start, evaluator.summary())
    metrics = evaluator.compute(distributed=run.accelerator.num_processes > 1)
    _log_test(name, batches - 1, batches, start, metrics)
    return metrics


def _log_test(name: str, index: int, batches: int, start: float, metrics: OrderedDict[str, float]) -> None:
    _logger.info(
        f'{name}: [{index:>4d}/{batches - 1}]  Time: {(time.perf_counter() - start) / max(1, index + 1):.3f}  '
        f'Loss: {metrics["loss"]:>6.3f}  Acc@1: {metrics["top1"]:>7.3f}  Acc@5: {metrics["top5"]:>7.3f}')
