"""Time and memory of a training step with each mix, as in Table 3 of MultiMix and Table 2 of AlignMixup."""
import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from matplotlib.figure import Figure

from alignmix_lab.runs.options import Options, config_option
from alignmix_lab.runs.plotting import bars, panels
from alignmix_lab.runs.timing import Timing, hardware, peak_memory, time_interleaved
from timm_alignmix import MixTask, dense_model_kwargs, list_mixes
from timm_alignmix.mixes import Mix

from ..base import register_protocol
from ..context import Evaluation
from ..models import EvalModel
from ..result import Column, Result

_logger = logging.getLogger(__name__)

CYCLE = 6  # steps per timing: modes with a probability of 1/2 or 1/3 get a whole number of steps
BASE = 'none'


class TrainingStep:
    """Training steps of one mix on fixed images: draws, forward, loss, backward, update. A call runs one cycle of them.

    A method draws one of its modes at each step, and modes differ in cost. For a short measurement to represent a long
    training, a cycle contains each mode in proportion to its probability. The learning rate is 0, so that all steps do
    the same work.

    Args:
        model: A timm model, on the device of the images; trained in place.
        images: (B, C, H, W), normalised.
        mix_kwargs: Options of a method given by name.
        amp_dtype: Mixed precision type; float16 uses loss scaling. None: the model's own precision.

    Raises:
        ValueError: The method does not support this model.
    """

    def __init__(
            self, model: nn.Module, mix: str | Mix, images: torch.Tensor, target: torch.Tensor,
            mix_kwargs: dict[str, Any] | None = None, amp_dtype: torch.dtype | None = None, compile: bool = False,
            cycle: int = CYCLE) -> None:
        self.images, self.target, self.amp_dtype = images, target, amp_dtype
        self.task = MixTask(model.train(), mix, mix_kwargs, img_size=tuple(images.shape[2:]), verbose=False)
        if compile:
            self.task.compile()
        parameters = self.task.trainable_module.parameters()  # the model's, and what a mix adds in training
        self.optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=amp_dtype is torch.float16)
        self.modes = modes_in_proportion(getattr(self.task.mix, 'probs', {}), cycle)

    def __call__(self) -> list[str]:
        """Run the cycle and return its modes."""
        return [self.step(mode) for mode in self.modes]

    def each_mode(self) -> None:
        """Run one step of every mode."""
        for mode in dict.fromkeys(self.modes):
            self.step(mode)

    def step(self, mode: str | None = None) -> str:
        """Run one step in the given mode, or in a drawn one, and return the mode."""
        if mode is not None:
            self.task.mix.probs = {mode: 1.0}
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            result = self.task(self.images, self.target)
        self.scaler.scale(result['loss']).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result['mode']

    def state_bytes(self) -> int:
        """Bytes of parameters, buffers and optimizer state, which are held between steps."""
        module = self.task.trainable_module
        tensors = [*module.parameters(), *module.buffers()]
        tensors += [v for entry in self.optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def modes_in_proportion(probs: dict[str, float], count: int) -> list[str | None]:
    """List `count` modes in proportion to their probabilities, by largest remainders; all None without modes."""
    if not probs:
        return [None] * count
    exact = {mode: p * count for mode, p in probs.items()}
    taken = {mode: int(share + 1e-9) for mode, share in exact.items()}
    order = sorted(exact, key=lambda mode: taken[mode] - exact[mode])
    for mode in order[:count - sum(taken.values())]:
        taken[mode] += 1
    return [mode for mode, times in taken.items() for _ in range(times)]


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step with one mix."""
    step: Timing  # seconds per step, one entry per round
    state_bytes: int  # bytes held between steps
    step_bytes: int  # additional bytes at the peak of a step

    @property
    def memory(self) -> int:
        return self.state_bytes + self.step_bytes


def measure_steps(
        steps: dict[str, TrainingStep],
        rounds: int = 10,
        warmup: int = 1,
        tick: Callable[[], Any] = lambda: None,
) -> dict[str, StepCost]:
    """Time steps interleaved in one run, then measure their memory one by one.

    Each round times one cycle of every case; `warmup` rounds come before. `tick` is called after every measurement.
    """
    device = next(iter(steps.values())).images.device
    cases = {name: lambda step=step: (step(), tick()) for name, step in steps.items()}
    timings = time_interleaved(cases, device, rounds, warmup, clock=clock_for(device))
    for step in steps.values():
        step.optimizer.zero_grad()  # do not hold gradients while another case is measured
    costs = {}
    for name, step in steps.items():
        step_bytes = peak_memory(step.each_mode, device)
        tick()
        step.optimizer.zero_grad()
        seconds = [value / len(step.modes) for value in timings[name].seconds]
        costs[name] = StepCost(Timing(seconds), step.state_bytes(), step_bytes)
    return costs


def clock_for(device: torch.device) -> Callable[[], float]:
    """Clock for a device: process time for a single CPU thread, to ignore other programs; else wall-clock time."""
    is_alone = device.type == 'cpu' and torch.get_num_threads() == 1
    return time.process_time if is_alone else time.perf_counter


@dataclass
class CostOptions(Options):
    """Options of the cost protocol."""
    cost_mixes: list[str] | None = config_option(
        'Cost', None, 'mixes to time in addition to none; default: all', nargs='+')
    cost_batch: int | None = config_option(
        'Cost', None, 'images per step; default: 128, on a CPU 8', int, low=2)
    cost_rounds: int | None = config_option(
        'Cost', None, 'rounds; each times six steps of every mix; default: 10, on a CPU 5', int, low=1)
    cost_compile: bool = config_option('Cost', False, 'compile the steps with torch.compile', bool)


@register_protocol('cost', CostOptions, timed=True)
def cost(ev: Evaluation) -> Result:
    """Time, images per second and memory of a training step with every mix, in one interleaved run."""
    config = ev.config
    mixes = [BASE, *(name for name in config.cost_mixes or list_mixes() if name != BASE)]
    amp_dtype = getattr(torch, config.amp_dtype) if config.amp else None
    on_cpu = ev.device.type == 'cpu'
    batch, rounds = config.cost_batch or (8 if on_cpu else 128), config.cost_rounds or (5 if on_cpu else 10)
    rows, notes, spreads = [], [], {}
    for model in one_of_each_kind(ev.models):
        label = f'{model.arch} {model.data_config["input_size"][-1]} px'
        images = torch.randn(batch, *model.data_config['input_size'], device=ev.device)
        if config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        target = torch.arange(batch, device=ev.device) % model.num_classes
        steps, refused = build_steps(
            lambda mix, model=model: network_for(model, mix, config.model_kwargs), mixes, images, target,
            amp_dtype=amp_dtype, compile=config.cost_compile)
        _logger.info(f'cost of {label}: {rounds} rounds of {CYCLE} steps of {batch} images for {", ".join(steps)}')
        with ev.progress(f'cost {label}', (rounds + 2) * len(steps)) as bar:
            costs = measure_steps(steps, rounds, tick=bar.update)
        _logger.info(f'cost of {label}: done')
        notes += [f'{label}, {mix}: left out. {reason}' for mix, reason in refused.items()]
        rows += [_row(label, mix, cost, costs[BASE], batch) for mix, cost in costs.items()]
        spreads[label] = {mix: cost.step.seconds for mix, cost in costs.items()}
    precision = config.amp_dtype if config.amp else 'float32'
    where = f'batch {batch}, {precision}{", compiled" if config.cost_compile else ""}'
    return Result(
        columns={
            'mix': Column('mix'),
            'images_s': Column('images/s', '.1f'),
            'ms': Column('ms/step', '.1f'),
            'overhead': Column('time vs none (%)', '+.1f'),
            'low': Column('lower quartile', '+.1f'),
            'high': Column('upper quartile', '+.1f'),
            'mib': Column('memory (MiB)', '.0f'),
            'more_mib': Column('memory vs none (MiB)', '+.0f'),
        },
        rows=rows,
        notes=[
            f'One process, {where}, {hardware(ev.device)}.',
            'A step consists of random draws, forward, loss, backward and SGD update on images that are already on the '
            f'device, without data loading. Each of {rounds} rounds times {CYCLE} steps of every mix, with '
            'the modes of a mix in proportion to their probabilities; ms/step and images/s are medians over rounds.',
            *(['Times are CPU times of the process (one thread), not wall-clock times.']
              if clock_for(ev.device) is time.process_time else []),
            'Time vs none: median and quartiles of the ratio within each round, which cancels drift of the machine.',
            *([f'{rounds} round(s) say nothing about the spread: a difference of some per cent may be chance; pass '
               '--cost-rounds 5 or more.'] if rounds < 3 else []),
            'Memory: parameters, buffers and momentum, plus the peak of the tensors within a step.',
            *notes,
        ],
        details={'seconds_per_step': spreads},
        figures={'': _draw(rows, where)},
    )


def one_of_each_kind(models: Sequence[EvalModel]) -> list[EvalModel]:
    """Keep the first model of each architecture, image size and number of classes; weights do not affect the cost."""
    kinds = {(model.arch, model.num_classes, tuple(model.data_config['input_size'])): model for model in models[::-1]}
    return list(kinds.values())[::-1]


def network_for(model: EvalModel, mix: str, model_kwargs: dict[str, Any]) -> nn.Module:
    """Create a network like that of a model for training with a mix; for dense mixing, without the class token."""
    network = model.network.network
    extra = dense_model_kwargs(model.arch) if mix == 'densemultimix' else {}
    if not extra or getattr(network, 'global_pool', None) != 'token':
        return copy.deepcopy(network).requires_grad_(True)
    sides = model.data_config['input_size'][1:]
    kwargs = {'img_size': sides, 'num_classes': model.num_classes, **extra, **model_kwargs}
    return timm.create_model(model.arch, **kwargs).to(next(network.parameters()).device)


def build_steps(
        create: Callable[[str], nn.Module], mixes: Sequence[str], images: torch.Tensor, target: torch.Tensor,
        **options: Any) -> tuple[dict[str, TrainingStep], dict[str, str]]:
    """Build the steps of several mixes, and the reasons why other mixes do not support the network.

    `create` returns a new network for a mix, on the device; `options` are those of :class:`TrainingStep`.
    """
    steps, refused = {}, {}
    for mix in mixes:
        try:
            steps[mix] = TrainingStep(create(mix), mix, images, target, **options)
        except ValueError as e:
            refused[mix] = str(e)
            _logger.warning(f'cost of {mix} is left out: {e}')
    return steps, refused


def _row(label: str, mix: str, cost: StepCost, base: StepCost, batch: int) -> dict[str, Any]:
    ratio = cost.step.over(base.step)
    return {
        'model': label,
        'mix': mix,
        'images_s': batch / cost.step.spread.median,
        'ms': 1000 * cost.step.spread.median,
        **{key: 100 * (value - 1) if mix != BASE else None
           for key, value in (('overhead', ratio.median), ('low', ratio.low), ('high', ratio.high))},
        'mib': cost.memory / 2 ** 20,
        'more_mib': (cost.memory - base.memory) / 2 ** 20 if mix != BASE else None,
    }


def _draw(rows: list[dict[str, Any]], where: str) -> Figure:
    labels = list(dict.fromkeys(row['model'] for row in rows))
    fig, axes = panels(2 * len(labels), 2, size=(4.6, 0.9 + 0.3 * len(rows) / len(labels)))
    for i, label in enumerate(labels):
        mine = [row for row in rows if row['model'] == label]
        for ax, key, title in zip(
                axes[2 * i:2 * i + 2], ('ms', 'mib'), ('time of a training step (ms)', 'memory (MiB)'), strict=True):
            bars(ax, [row['mix'] for row in mine], [row[key] for row in mine])
            ax.set_title(f'{label}: {title}')
    fig.supxlabel(where, fontsize=9)
    return fig
