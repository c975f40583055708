"""A training run: its parts, and how checkpoints save and restore it, also on another number of processes."""
import logging
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from .agreement import StopSignals
from .checkpoint import check_weights, position
from .config import RunConfig
from .optim import fused_update, scale_lr, scaled_lr
from .options import blaming
from .sharding import is_sharded, own_part, read_own_shards, read_shards
from .totals import LossTotals

_logger = logging.getLogger(__name__)


def average_arguments(config: RunConfig) -> dict[str, Any] | None:
    """Collect the arguments of a run's moving average, timm's ModelEmaV3; None if it has none."""
    if not config.model_ema:
        return None
    return dict(
        decay=config.model_ema_decay, use_warmup=config.model_ema_warmup,
        device='cpu' if config.model_ema_force_cpu else None)


@dataclass
class Run:
    """The parts of a training run."""

    config: RunConfig
    accelerator: Accelerator
    loaders: Any  # `train`, `val` and a `description`
    task: TrainingTask
    data_config: dict[str, Any]  # preprocessing of the images, saved in checkpoints
    totals: type[LossTotals]  # sums over the steps of an epoch
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Scheduler | None = None
    num_epochs: int = 0
    start_epoch: int = 0
    start_update: int = 0  # updates of the first epoch that were done before a resume
    resumed_totals: dict[str, Any] | None = None  # of these updates
    nonfinite: int = 0  # updates skipped in a row
    seconds_before: float = 0.0  # duration of the run before it was resumed
    started: float = field(default_factory=time.perf_counter)
    stop: StopSignals = field(default_factory=StopSignals)
    lock: IO | None = None  # file of the run's folder, on the main process

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates per epoch; the last one may have fewer batches."""
        return -(-len(self.loaders.train) // self.config.grad_accum_steps)

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer update, over all processes."""
        return self.images_per_step * self.config.grad_accum_steps

    @property
    def images_per_step(self) -> int:
        """Images per batch, over all processes."""
        return self.config.batch_size * self.accelerator.num_processes

    @property
    def layout(self) -> dict[str, int]:
        """Parts of the global batch."""
        return dict(
            processes=self.accelerator.num_processes, batch_size=self.config.batch_size,
            grad_accum_steps=self.config.grad_accum_steps)

    @property
    def seconds(self) -> float:
        """Duration of the run so far, including the time before a resume."""
        return self.seconds_before + time.perf_counter() - self.started

    def add_optimizer(
            self, parameters: Any = None, scaled: list[nn.Parameter] | None = None, scale: float = 1.0) -> None:
        """Set the learning rate and create the optimizer and the schedule.

        `parameters` are a model or parameter groups for timm's `create_optimizer_v2`; None for the trainable module.
        The learning rate of the `scaled` parameters is multiplied by `scale`.
        """
        self.config = config = replace(self.config, lr=scaled_lr(self.config, self.global_batch_size))
        parameters = self.task.get_trainable_module() if parameters is None else parameters
        fused = fused_update(config, self.accelerator.device)
        with blaming(config, 'opt', 'opt_eps', 'opt_betas', 'opt_foreach', 'opt_kwargs', 'layer_decay'):
            self.optimizer = create_optimizer_v2(
                parameters, **optimizer_kwargs(config), **fused, **config.opt_kwargs)
        if scaled and scale != 1:
            scale_lr(self.optimizer, scaled, scale)
        with blaming(config, 'sched', 'lr_noise', 'lr_cycle_mul', 'lr_decay_fn', 'decay_rate', 'decay_epochs'):
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer, **scheduler_kwargs(config), updates_per_epoch=self.updates_per_epoch)

    def missed_decays(self) -> list[float]:
        """List the epochs at which the step or multistep schedule decays, but which the run does not reach."""
        config = self.config
        epochs = self.num_epochs - (config.warmup_epochs if config.warmup_prefix else 0)
        if config.sched == 'multistep':  # timm applies a milestone one epoch early
            return [epoch for epoch in config.decay_milestones if epoch > epochs]
        first = config.decay_epochs or 90
        return [first] if config.sched == 'step' and first >= epochs else []

    def describe(self) -> str:
        """Describe the run: data, processes, batch, steps, learning rate and parameter groups."""
        config = self.config
        frozen = [p for p in self.task.get_trainable_module().parameters() if not p.requires_grad]
        shown = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
        lines = [
            f'Data: {self.loaders.description}',
            'Images: ' + ', '.join(f'{key} {self.data_config[key]}' for key in shown if key in self.data_config),
            f'Processes: {self.accelerator.num_processes} on {self.accelerator.device.type}, '
            f'mixed precision {self.accelerator.mixed_precision}',
            f'Global batch: {self.global_batch_size} = {config.batch_size} per process x {config.grad_accum_steps} '
            f'accumulated x {self.accelerator.num_processes} processes',
            f'Steps: {self.num_epochs} epochs x {self.updates_per_epoch} updates ({len(self.loaders.train)} batches)',
            f'Learning rate: {config.lr:.4g}, {config.sched} schedule'
            + (f', too short to decay at {self.missed_decays()}' if self.missed_decays() else ''),
            *([f'Frozen: {len(frozen)} tensors, {sum(p.numel() for p in frozen):,} values'] if frozen else []),
            f'Parameter groups ({config.opt}):',
            *(f'  {len(group["params"])} tensors, {sum(p.numel() for p in group["params"]):,} values, '
              f'weight decay {group.get("weight_decay", 0.0):g}, learning rate x{group.get("lr_scale", 1.0):g}'
              for group in self.optimizer.param_groups),
        ]
        return '\n'.join(lines)

    def state_dict(self, epoch: int, updates: int = 0, totals: LossTotals | None = None) -> dict[str, Any]:
        """Collect the content of a checkpoint under timm's keys; must be called on all processes.

        A resumed run continues in `epoch` after `updates` of its updates, which have these `totals`. No generator is
        saved: each draw is a function of the seed, the step and the process.

        Raises:
            RuntimeError: Weights are not finite.
        """
        self._check_finite()
        progress = {
            'epoch': epoch,
            'updates': updates,
            'updates_per_epoch': self.updates_per_epoch,
            'samples': min(updates * self.global_batch_size, len(self.loaders.train) * self.images_per_step),
            'layout': self.layout,
            'totals': totals and totals.state_dict(self.accelerator),
            'nonfinite': self.nonfinite,
            'seconds': self.seconds,
            'statistics': self._gather_statistics(),
        }
        state = {
            'arch': self.config.arch,
            'version': 2,  # the epoch is the finished one
            'args': self.config.to_dict(),
            'data_config': self.data_config,
            'global_batch_size': self.global_batch_size,
            'progress': progress,
            'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(),
            **self.task.get_checkpoint_state(ema=True),
        }
        if self.accelerator.scaler is not None:
            state['amp_scaler'] = self.accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Load a checkpoint and set where the run continues.

        A moving average that is not in the checkpoint starts from the loaded weights.

        Raises:
            ValueError: The checkpoint belongs to another model or optimizer.
        """
        config, task = self.config, self.task
        source = f'{path} ({state.get("arch", "unknown model")})'
        check_weights(task.get_eval_model(), state['state_dict'], source, config.arch)
        state = self._read_shards(state, path)
        task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
        if task.has_ema():
            ema = state.get('state_dict_ema', state['state_dict'])
            task.load_checkpoint_state(ema, state.get('task_state_ema'), ema=True)
        if not config.no_resume_opt:
            saved_opt = state.get('args', {}).get('opt', config.opt)
            if saved_opt != config.opt:
                raise ValueError(
                    f'{path} was trained with --opt {saved_opt}, not {config.opt}; pass --no-resume-opt to start with '
                    'a new optimizer')
            self.optimizer.load_state_dict(state['optimizer'])
            if self.accelerator.scaler is not None and 'amp_scaler' in state:
                self.accelerator.scaler.load_state_dict(state['amp_scaler'])
        self.start_epoch, self.start_update = position(state)
        if 'progress' in state:
            self._load_progress(state['progress'], state['args'])
        where = f'epoch {self.start_epoch - 1} is done'
        if self.start_update:
            where = f'epoch {self.start_epoch} continues after {self.start_update} of {self.updates_per_epoch} updates'
        _logger.info(f'Resumed {path}: {where}')

    def _read_shards(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        if not is_sharded(self.accelerator):
            return read_shards(state, path)
        own = {**self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True)}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        return read_own_shards(state, path, own, parameters)

    def _load_progress(self, progress: dict[str, Any], args: dict[str, Any]) -> None:
        """Continue an epoch; with another layout at the same sample, because the batches of all processes follow one
        order (except for FFCV files larger than memory, of which each process reads its own part)."""
        self.resumed_totals, self.nonfinite, self.seconds_before = (
            progress[key] for key in ('totals', 'nonfinite', 'seconds'))
        if progress['layout'] == self.layout:
            self._load_statistics(progress['statistics'])
            return
        changes = ', '.join(
            f'{name} {value} -> {self.layout[name]}' for name, value in progress['layout'].items()
            if value != self.layout[name])
        lr = args['lr']
        message = f'Resuming on another layout: {changes}; learning rate {lr:.4g} -> {self.config.lr:.4g}'
        if progress['updates'] == progress['updates_per_epoch']:
            self.start_update = self.updates_per_epoch
        elif progress['updates']:
            # Rounded up, so that no sample is used twice.
            self.start_update = min(-(-progress['samples'] // self.global_batch_size), self.updates_per_epoch)
            left_out = self.start_update * self.global_batch_size - progress['samples']
            message += (
                f'; epoch {self.start_epoch} continues from {progress["updates"]} of '
                f'{progress["updates_per_epoch"]} updates to {self.start_update} of {self.updates_per_epoch} (sample '
                f'{progress["samples"]}' + (f', {left_out} skipped' if left_out > 0 else '') + ')')
        _logger.warning(message + '; the random draws of mixing and dropout will differ')

    def _check_finite(self) -> None:
        weights = [own_part(parameter.detach()) for parameter in self.task.get_eval_model().parameters()]
        largest = torch._foreach_norm([weight for weight in weights if weight.numel()], math.inf)
        finite = torch.stack([value.float() for value in largest]).isfinite().all()
        if self.accelerator.reduce(finite.float(), 'mean') < 1:  # each process may hold other weights
            raise RuntimeError(
                'the weights are no longer finite although the loss was: gradients overflowed. Nothing was saved; '
                'continue from the last checkpoint with a lower --lr, --clip-grad or --amp-dtype bfloat16')

    def _statistics(self) -> list[torch.Tensor]:
        """List the running statistics of the model and its average, which differ by process until an evaluation."""
        models = [self.task.get_eval_model(), *([self.task.get_eval_model(ema=True)] if self.task.has_ema() else [])]
        return [
            buffer for model in models for name, buffer in unwrap_model(model).named_buffers()
            if name.rpartition('.')[2] in ('running_mean', 'running_var')]

    def _gather_statistics(self) -> torch.Tensor | None:
        """Gather the statistics of all processes, (processes, values); None if they are equal."""
        buffers = self._statistics()
        if self.accelerator.num_processes == 1 or not buffers:
            return None
        own = torch.cat([buffer.float().flatten().to(self.accelerator.device) for buffer in buffers])
        rows = self.accelerator.gather(own[None]).cpu()
        return None if torch.equal(rows, rows[:1].expand_as(rows)) else rows

    def _load_statistics(self, rows: torch.Tensor | None) -> None:
        buffers = self._statistics()
        sizes = [buffer.numel() for buffer in buffers]
        if rows is None or rows.shape[1] != sum(sizes):  # all equal, or only one of both has a moving average
            return
        own = rows[self.accelerator.process_index].split(sizes)
        for buffer, values in zip(buffers, own, strict=True):
            buffer.copy_(values.view_as(buffer))
