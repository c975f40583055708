"""Preview of a run without data, devices or processes: steps, modes, memory and learning rates.

The model is built on the meta device, which has shapes but no values, so that this takes seconds for any model.
"""
import logging
import os
from collections import ChainMap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import yaml
from timm.task import ClassificationTask
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from alignmix_lab.data.loaders import Loaders
from alignmix_lab.data.order import train_batches
from alignmix_lab.runs.accelerator import choose_precision
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.models import classifier_parameters, freeze
from alignmix_lab.runs.plotting import as_png, figure
from alignmix_lab.runs.run import Run
from alignmix_lab.runs.sharding import block_classes
from timm_alignmix import create_mix

from .build import create_data, create_task, model_arguments, resolve_model
from .config import TrainConfig
from .totals import MixTotals

_logger = logging.getLogger(__name__)

GIB = 2**30
_LARGE = 2e9  # values of a model that a dry run does not build


@dataclass(frozen=True)
class PlannedProcesses:
    """Stand-in for Accelerate, without starting processes."""
    num_processes: int
    mixed_precision: str
    device: torch.device = torch.device('meta')


def dry_run(config: TrainConfig) -> None:
    """Print the resolved configuration, log what the run would do, and draw its learning rate.

    Raises:
        ValueError: As for :func:`alignmix_lab.classification.prepare`.
    """
    if int(os.environ.get('RANK', 0)) > 0:
        return
    run = plan_run(config)
    probabilities = mode_probabilities(run)
    curve = learning_rates(run)
    figure = draw_learning_rates(run, curve)
    _logger.info('\n'.join([
        run.describe(),
        f'Total: {run.num_epochs * run.updates_per_epoch:,} updates, '
        f'{run.num_epochs * len(run.loaders.train) * run.config.batch_size * run.accelerator.num_processes:,} images',
        *_describe_resolutions(run),
        f'Mixing: {run.config.mix_name}, probability of each mode: '
        + ', '.join(f'{mode} {p:.3g}' for mode, p in probabilities.items())
        + (f'; clean from epoch {config.mix_off_epoch} on' if config.mix_off_epoch else ''),
        *describe_cost(run, step_cost(run)),
        f'Learning rate drawn in {figure}',
    ]))
    print(yaml.safe_dump(run.config.to_dict(), default_flow_style=False))


def plan_run(config: TrainConfig) -> Run:
    """Build the run with its model on the meta device and stand-ins for the processes and for missing data.

    The number of processes is the launcher's, else --num-processes, else 1. Missing data is replaced by --dataset-size
    and --num-classes.
    """
    processes = int(os.environ.get('WORLD_SIZE', config.num_processes or 1))
    arguments, data_config = resolve_model(config)
    loaders = _stand_in_loaders(config, processes)
    if loaders is None:
        loaders = create_data(config, data_config, torch.device('cpu'), world_size=processes)
    with torch.device('meta'):
        model = timm.create_model(config.model, num_classes=loaders.num_classes, **arguments)
    if config.freeze:
        freeze(model, config.freeze, config.model)
    precision = choose_precision(config.amp, config.amp_dtype)
    task = ClassificationTask(model, device=torch.device('meta'), verbose=False)
    run = Run(config, PlannedProcesses(processes, precision), loaders, task, data_config, MixTotals)
    run.add_optimizer(scaled=classifier_parameters(model), scale=config.head_lr_scale)
    return run


def _stand_in_loaders(config: TrainConfig, processes: int) -> Loaders | None:
    """Make loaders that only have a length; None if the data can be read."""
    at_hand = os.path.exists(config.data_dir) if config.data_dir else not config.dataset_size
    if at_hand or config.dataset_size is None:
        return None
    if config.num_classes is None:
        raise ValueError(
            '--dataset-size replaces data that is not at hand; pass its number of classes too: --num-classes N')
    train, val = config.dataset_size
    return Loaders(
        train=range(train_batches(train, config.batch_size, processes)),
        val=range(-(-val // ((config.validation_batch_size or config.batch_size) * processes))),
        num_classes=config.num_classes,
        class_names=None,
        kind='',
        description=f'not read, assuming {train:,} training and {val:,} validation images, '
                    f'{config.num_classes} classes',
    )


def mode_probabilities(run: Run) -> dict[str, float]:
    """Return the probability of each mode, after checking on a real model that the method can mix it.

    Models too large for that are not checked.
    """
    size = sum(parameter.numel() for parameter in run.task.get_trainable_module().parameters())
    if size > _LARGE:
        _logger.info(f'Not checked, for the size of {run.config.model}: whether the method can mix it')
        mix, options = run.config.mixing()
        return create_mix(mix, **options).modes
    config = replace(run.config, pretrained=False, initial_checkpoint='')
    task = create_task(
        config, model_arguments(config), run.data_config, run.loaders.num_classes, torch.device('cpu'))
    return task.mix.modes


def _describe_resolutions(run: Run) -> list[str]:
    sides = [run.config.train_side(epoch) for epoch in range(run.num_epochs)]
    if sides[0] is None:
        return []
    starts = [epoch for epoch, side in enumerate(sides) if epoch == 0 or side != sides[epoch - 1]]
    return ['Training images: ' + ', '.join(f'{sides[epoch]} pixels from epoch {epoch}' for epoch in starts)
            + f'; evaluation: {run.data_config["input_size"][-1]} pixels']


@dataclass
class StepEstimate:
    """Estimated cost of a training step for one process, in bytes."""
    parameters: int  # the weights in float32
    gradients: int  # of those that are not frozen
    optimizer: int | None  # its state; None if it cannot step without values
    average: int  # the moving average on the device
    gathered: int  # of a run in shards: weights outside of blocks, two blocks, and the gradients of one; in float32
    activations: int  # in float32, those that the forward pass saves for the backward pass
    checkpointed: int | None  # the same with gradient checkpointing; None if the model does not have it
    flops: float  # operations of a forward pass on one image; a multiply-add counts as two


def step_cost(run: Run) -> StepEstimate:
    """Measure a step of the plain model on the meta device, at the run's batch size and largest image size.

    The optimizer makes a step, so call this last.
    """
    config, model = run.config, run.task.get_trainable_module().train()
    channels, height, width = run.data_config['input_size']
    if config.max_res:
        height = width = config.max_res
    own = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    classes = block_classes(model)
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    # Storages are held, so that no other takes the address of one. Checkpointing keeps those outside of blocks and the
    # inputs of blocks, and computes one block again at a time.
    outside, inputs, inside = {}, {}, {block: {} for block in blocks}
    saved = [outside]  # where to note what is saved now

    def keep(tensor: torch.Tensor, place: dict | None = None) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            (saved[-1] if place is None else place)[storage._cdata] = storage
        return tensor

    def enter(block: torch.nn.Module, args: tuple) -> None:
        for value in args:
            if isinstance(value, torch.Tensor):
                keep(value, inputs)
        saved.append(inside[block])

    def leave(*_: object) -> None:
        saved.pop()

    handles = [handle for block in blocks for handle in (
        block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    with torch.device('meta'):
        images = torch.empty(config.batch_size, channels, height, width)
        target = torch.empty(config.batch_size, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter, _FusedAttentions(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            F.cross_entropy(model(images), target)
    for handle in handles:
        handle.remove()
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [*model.parameters(), *model.buffers()] if config.model_ema and not config.model_ema_force_cpu else []
    weights, of_blocks = _bytes([*model.parameters()]), [_bytes([*block.parameters()]) for block in blocks]
    kept = _stored(outside | inputs) + max(map(_stored, inside.values()), default=0)
    return StepEstimate(
        parameters=weights, gradients=_bytes(parameters),
        optimizer=_optimizer_bytes(run.optimizer, parameters), average=_bytes(average),
        gathered=weights - sum(of_blocks) + 3 * max(of_blocks, default=0),
        activations=_stored(dict(ChainMap(outside, *inside.values()))),
        checkpointed=kept if blocks and _has_checkpointing(model) else None,
        flops=counter.get_total_flops() / config.batch_size)


class _FusedAttentions(TorchFunctionMode):
    """Attention saves what fused kernels save: on the meta device torch's own form saves the matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(partial(func, **(kwargs or {})), *args)
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend, query, key, value, *options):
        output = attend(query, key, value, *options)
        ctx.save_for_backward(query, key, value, output)
        return output


def _has_checkpointing(model: torch.nn.Module) -> bool:
    try:
        model.set_grad_checkpointing(enable=True)
    except (AssertionError, AttributeError):  # the former is raised by timm's models without it
        return False
    model.set_grad_checkpointing(enable=False)
    return True


def _stored(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> int | None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # the optimizer reads values
        return None
    return _bytes([value for state in optimizer.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)])


def describe_cost(run: Run, cost: StepEstimate) -> list[str]:
    """Describe memory and compute, and how they were estimated."""
    config, processes = run.config, run.accelerator.num_processes
    states = {'parameters': cost.parameters, 'gradients': cost.gradients, 'optimizer': cost.optimizer}
    if cost.average:
        states['moving average'] = cost.average
    known = {name: value for name, value in states.items() if value is not None}
    activations = [value // 2 if config.amp and value else value for value in (cost.activations, cost.checkpointed)]
    notes = ['activations: saved by one forward pass of the plain model, counted without computing it'
             + (', taken as half for mixed precision' if config.amp else '')]
    if len(known) < len(states):
        notes.append(f'the state of {config.opt} is not known')
    lines = [_memory_line('Memory of a process, estimated', known, *activations)]
    if processes > 1:
        shards = {f'{name} / {processes}': value // processes for name, value in known.items()}
        gathered = cost.gathered // 2 if config.amp else cost.gathered
        lines.append(_memory_line('  in shards (--use_fsdp)', {**shards, 'gathered': gathered}, *activations))
    images = run.num_epochs * len(run.loaders.train) * config.batch_size * processes
    return [
        *lines,
        f'  ({"; ".join(notes)}; excluding mixing, kernel workspace and fragmentation)',
        f'Compute, estimated: forward {cost.flops / 1e9:.2f} GFLOP per image, training three times that, '
        f'{3 * cost.flops * images / 1e18:.3g} EFLOP in total without evaluation'
        + (' (at the largest image size)' if config.max_res else ''),
    ]


def _memory_line(title: str, states: dict[str, int], activations: int, checkpointed: int | None) -> str:
    text = ', '.join(f'{name} {value / GIB:.2f}' for name, value in states.items())
    total = sum(states.values())
    line = f'{title}: {(total + activations) / GIB:.2f} GiB = {text}, activations {activations / GIB:.2f}'
    if checkpointed is not None:
        line += f'; with --grad-checkpointing {(total + checkpointed) / GIB:.2f}, activations {checkpointed / GIB:.2f}'
    return line


class Curve(NamedTuple):
    """Learning rates over a run."""
    epochs: np.ndarray  # (T,) times in epochs
    rates: dict[float, np.ndarray]  # (T,) by `lr_scale` of the parameter groups


def learning_rates(run: Run, points: int = 2000) -> Curve:
    """Follow the run's schedule at up to `points` of its epochs or updates."""
    by_scale = {group.get('lr_scale', 1.0): group for group in run.optimizer.param_groups}
    on_updates = run.config.sched_on_updates and run.scheduler is not None
    steps_per_epoch = run.updates_per_epoch if on_updates else 1
    count = run.num_epochs * steps_per_epoch
    steps, rates = np.unique(np.linspace(0, count - 1, min(points, count)).round().astype(int)), []
    for step in steps.tolist():
        if run.scheduler is not None:
            (run.scheduler.step_update if on_updates else run.scheduler.step)(step)
        rates.append([group['lr'] for group in by_scale.values()])
    return Curve(steps / steps_per_epoch, dict(zip(by_scale, np.array(rates).T, strict=True)))


def draw_learning_rates(run: Run, curve: Curve) -> Path:
    """Write `learning_rate.png` to the run's folder, or to --output without --experiment."""
    config = run.config
    path = Path(config.output) / config.experiment / 'learning_rate.png'
    fig, axes = figure(
        size=(7, 3.2), title=f'{config.model}, {config.sched}, global batch {run.global_batch_size}')
    ax = axes[0, 0]
    for scale, rates in curve.rates.items():
        ax.plot(curve.epochs, rates, drawstyle='default' if config.sched_on_updates else 'steps-post',
                label='all parameters' if len(curve.rates) == 1 else f'groups with learning rate x{scale:g}')
    ax.set(xlabel='epoch', ylabel='learning rate', yscale='log')
    ax.legend()
    write_whole(path, as_png(fig, dpi=110))
    return path
