"""Build everything a run needs from its configuration, and refuse what cannot work before anything is trained."""
import logging
import os
import pickle
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import random_seed
from torch import nn

import timm_alignmix
from timm_alignmix.data import Loaders, create_loaders

from .agreement import StopSignals
from .config import RunConfig, TrainConfig
from .param_groups import classifier_parameters, scale_head_lr
from .resolution import train_resolutions
from .resolve import near_names
from .totals import LossTotals, MixTotals
from .watch import check_trackers

_logger = logging.getLogger(__name__)
# timm's names of torch's own classes that have such an update.
_FUSED_OPTIMIZERS = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')


@dataclass
class Run:
    """The parts of a training run.

    Attributes:
        loaders: `train` and `val` loaders and a `description`.
        data_config: What is said of the images.
        totals: What is summed over the steps of an epoch.
        start_epoch: First epoch.
        start_update: Updates of it that a resumed run has done, with the totals `resumed_totals`.
        nonfinite: Updates left out in a row, up to now.
        seconds_before: Time that the run took before it was resumed.
        stop: Whether the run was asked to stop.
    """

    config: RunConfig
    accelerator: Accelerator
    loaders: Any
    task: TrainingTask
    data_config: dict[str, Any]
    totals: type[LossTotals]
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Scheduler | None = None
    num_epochs: int = 0
    start_epoch: int = 0
    start_update: int = 0
    resumed_totals: dict[str, Any] | None = None
    nonfinite: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    stop: StopSignals = field(default_factory=StopSignals)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of an epoch; batches left over at its end make a smaller last update."""
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
        """What the global batch is made of."""
        return dict(
            processes=self.accelerator.num_processes,
            batch_size=self.config.batch_size,
            grad_accum_steps=self.config.grad_accum_steps,
        )

    @property
    def seconds(self) -> float:
        """Time that the run has taken, with what it took before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.started


def create_accelerator(config: RunConfig) -> Accelerator:
    """Start Accelerate and check that it runs as many processes as the launcher started.

    Raises:
        ValueError: The launcher's processes would each train on their own, or the device cannot do what the options
            ask for.
    """
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[config.amp_dtype] if config.amp else None
    if config.opt.lower() not in list_optimizers():
        raise ValueError(f'--opt {config.opt}: timm has no such optimizer{near_names(config.opt, list_optimizers())}')
    check_trackers(config.log_trackers)
    accelerator = Accelerator(
        cpu=config.device == 'cpu',
        mixed_precision=precision,  # None leaves it to accelerate launch --mixed_precision
        kwargs_handlers=[
            # Gradients live in the buckets that are reduced: one copy of them less. The graph is never static: modes
            # of a mix and accumulation change it.
            DistributedDataParallelKwargs(broadcast_buffers=not config.no_ddp_bb, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.dist_timeout)),
        ],
    )
    launched = int(os.environ.get('WORLD_SIZE', 1))
    if accelerator.num_processes != launched:
        raise ValueError(
            f'the launcher started {launched} processes, but each would train alone (Accelerate sees '
            f'{accelerator.num_processes}, {accelerator.distributed_type}). On CPUs launch with '
            f'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {launched}')
    if config.sync_bn and accelerator.device.type == 'cpu':
        raise ValueError('--sync-bn needs GPUs: PyTorch has no synchronized batch norm on CPUs')
    if not accelerator.is_main_process:
        for name in ('timm', 'timm_alignmix'):
            logging.getLogger(name).setLevel(logging.WARNING)
    _use_all_cores(accelerator)
    # TF32 stays off for matrix products: transport costs need the full float32.
    torch.backends.cudnn.benchmark = True
    return accelerator


def _use_all_cores(accelerator: Accelerator) -> None:
    """Undo `accelerate launch`'s default of one thread for a process that computes on the CPU."""
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if accelerator.device.type != 'cpu' or not launched or torch.get_num_threads() > 1:
        return
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    _logger.info(
        f'Using {torch.get_num_threads()} CPU threads instead of the one that accelerate launch sets; '
        'accelerate launch --num_cpu_threads_per_process N (2 or more) decides otherwise')


def scaled_lr(config: RunConfig, global_batch_size: int) -> float:
    """Learning rate of a run: `lr`, or `lr_base` scaled to the global batch as timm scales it."""
    if config.lr is not None:
        return config.lr
    scale = config.lr_base_scale
    if scale is None:
        scale = 'sqrt' if any(name in config.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = global_batch_size / config.lr_base_size
    return config.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def model_arguments(config: TrainConfig) -> dict[str, Any]:
    """Arguments of `timm.create_model` except `pretrained`, `num_classes` and `checkpoint_path`."""
    extra = {}
    if timm_alignmix.create_mix(config.mix, **config.mix_kwargs).name == 'densemultimix':
        extra = timm_alignmix.dense_model_kwargs(config.model)
        if extra:
            _logger.info(f'{config.model} is built with {extra}: dense mixing trains the classifier on every position')
    arguments = dict(
        in_chans=config.in_chans,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
        drop_block_rate=config.drop_block,
        global_pool=config.gp,
        bn_momentum=config.bn_momentum,
        bn_eps=config.bn_eps,
    )
    return {**extra, **{key: value for key, value in arguments.items() if value is not None}, **config.model_kwargs}


def resolve_data(config: TrainConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop of the model, after checking that it takes such images.

    The model is built without memory (on the meta device), so that a wrong name or size costs no time.

    Raises:
        ValueError: No such model, or one that is built for another image size.
    """
    name = config.model
    if ':' not in name and not timm.is_model(name):
        raise ValueError(f'--model {name}: timm has no such model{near_names(name, timm.list_models())}')
    with torch.device('meta'):
        probe = timm.create_model(name, **arguments)
    data_config = resolve_data_config(config.to_dict(), model=probe)
    for side in train_resolutions(config):
        try:
            _probe_forward(probe, (data_config['input_size'][0], side, side))
        except (RuntimeError, AssertionError, ValueError) as e:
            raise ValueError(
                f'{name} does not take images of {side} pixels; leave --min-res and --max-res out (the model says: '
                f'{e})') from e
    size = data_config['input_size']
    try:
        _probe_forward(probe, size)
    except (RuntimeError, AssertionError, ValueError) as e:
        built_for = resolve_data_config({}, model=probe)['input_size']
        remedy = f'--img-size {built_for[-1]}'
        with suppress(Exception), torch.device('meta'):  # whatever stops this, the model cannot be told its size
            _probe_forward(timm.create_model(name, **{**arguments, 'img_size': size[-1]}), size)
            remedy = f'--model-kwargs img_size={size[-1]}, or {remedy}'
        raise ValueError(
            f'{name} was built for {_by(built_for)}, got {_by(size)}; pass {remedy} (the model says: {e})') from e
    return data_config


def _probe_forward(probe: nn.Module, size: tuple[int, int, int]) -> None:
    with torch.no_grad():
        probe.eval()(torch.empty(2, *size, device='meta'))


def _by(size: tuple[int, int, int]) -> str:
    return f'{size[-2]}x{size[-1]}' + (f' with {size[0]} channels' if size[0] != 3 else '')


def create_data(config: TrainConfig, data_config: dict[str, Any], accelerator: Accelerator) -> Loaders:
    """Loaders of the run; on each machine the first process goes first, to write what is written once."""
    with accelerator.local_main_process_first():
        return create_loaders(
            data_dir=config.data_dir,
            dataset=config.dataset,
            train_split=config.train_split,
            val_split=config.val_split,
            class_map=config.class_map,
            dataset_download=config.dataset_download,
            loader=config.loader,
            input_size=data_config['input_size'],
            batch_size=config.batch_size,
            val_batch_size=config.validation_batch_size,
            mean=data_config['mean'],
            std=data_config['std'],
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'],
            crop_resize=config.crop_resize,
            crop_padding=config.crop_padding,
            scale=tuple(config.scale),
            ratio=tuple(config.ratio),
            hflip=config.hflip,
            train_interpolation=config.train_interpolation,
            no_aug=config.no_aug,
            color_jitter=config.color_jitter,
            aa=config.aa,
            reprob=config.reprob,
            remode=config.remode,
            recount=config.recount,
            workers=config.workers,
            pin_mem=config.pin_mem,
            device=accelerator.device,
            channels_last=config.channels_last,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_classes=config.num_classes,
        )


def create_task(
        config: TrainConfig,
        arguments: dict[str, Any],
        input_size: tuple[int, int, int],
        num_classes: int,
        accelerator: Accelerator,
) -> timm_alignmix.MixTask:
    """The model, on the run's device, inside its training task."""
    if config.initial_checkpoint and not os.path.isfile(config.initial_checkpoint):
        raise ValueError(f'--initial-checkpoint {config.initial_checkpoint}: no such file')
    random_seed(config.seed)
    model = timm.create_model(
        config.model,
        pretrained=config.pretrained,
        num_classes=num_classes,
        **arguments,
    )
    if config.initial_checkpoint:
        _load_initial(model, config.initial_checkpoint)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except AssertionError as e:  # how timm's models say that they cannot
            raise ValueError(f'--grad-checkpointing: {config.model} does not have it; leave it out') from e
    if config.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    criterion = dict(smoothing=config.smoothing)
    if config.bce_loss:
        criterion.update(loss_type='bce', bce_sum=config.bce_sum, bce_target_thresh=config.bce_target_thresh)
    task = timm_alignmix.MixTask(
        model,
        mix=config.mix,
        mix_kwargs=config.mix_kwargs,
        criterion_kwargs=criterion,
        seed=config.seed,
        rank=accelerator.process_index,
        img_size=input_size[-2:],
        device=accelerator.device,
        verbose=accelerator.is_main_process,
    )
    if config.grad_checkpointing and task.mix.layers:
        raise ValueError(
            f'--grad-checkpointing would compute {", ".join(task.mix.layers)} again without the features that '
            f'--mix {config.mix} mixed there; leave it out')
    return task


def _load_initial(model: nn.Module, path: str) -> None:
    """Put the weights of a file into a model; nothing in the file is executed."""
    try:
        load_checkpoint(model, path)
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError,
            SafetensorError) as e:  # of any foreign content
        reason = ' '.join(str(e).split())
        raise ValueError(f'--initial-checkpoint {path} has no weights for this model ({reason[:300]})') from e


def build_run(config: TrainConfig) -> Run:
    """Build and check the parts of a run; nothing is wrapped for several processes or resumed yet.

    Raises:
        ValueError: An option, the data or the model does not fit, with the remedy.
    """
    accelerator = create_accelerator(config)
    arguments = model_arguments(config)
    data_config = resolve_data(config, arguments)
    loaders = create_data(config, data_config, accelerator)
    data_config.update(loader=loaders.kind, class_names=loaders.class_names)
    task = create_task(config, arguments, data_config['input_size'], loaders.num_classes, accelerator)
    run = Run(config, accelerator, loaders, task, data_config, MixTotals)
    add_optimizer(run, head=classifier_parameters(task.get_eval_model()))
    if config.num_processes not in (None, accelerator.num_processes):
        _logger.warning(
            f'The settings are meant for {config.num_processes} processes, this run has {accelerator.num_processes}: '
            f'global batch {run.global_batch_size}, learning rate {run.config.lr:.4g}')
    return run


def add_optimizer(run: Run, parameters: Any = None, head: list[nn.Parameter] | None = None) -> None:
    """Give a run its learning rate, optimizer and schedule.

    Args:
        run: The run; its configuration gets the learning rate that is used.
        parameters: What timm's `create_optimizer_v2` takes as model or parameter groups; None is the trainable module.
        head: Parameters whose learning rate is scaled by --head-lr-scale.
    """
    run.config = config = replace(run.config, lr=scaled_lr(run.config, run.global_batch_size))
    run.optimizer = create_optimizer_v2(
        run.task.get_trainable_module() if parameters is None else parameters,
        **optimizer_kwargs(config),
        **fused_update(config, run.accelerator.device),
        **config.opt_kwargs,
    )
    if head and config.head_lr_scale != 1:
        scale_head_lr(run.optimizer, head, config.head_lr_scale)
    run.scheduler, run.num_epochs = create_scheduler_v2(
        run.optimizer, **scheduler_kwargs(config), updates_per_epoch=run.updates_per_epoch)


def fused_update(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Argument of torch's own optimizers that makes an update one kernel per type of tensor, on GPUs, unless
    --opt-foreach or --opt-kwargs choose otherwise."""
    chosen = config.opt_foreach is not None or {'fused', 'foreach'} & config.opt_kwargs.keys()
    return {'fused': True} if device.type == 'cuda' and config.opt in _FUSED_OPTIMIZERS and not chosen else {}


def describe_run(run: Run) -> str:
    """What the run will do: processes, steps, batch, learning rate and parameter groups."""
    config, groups = run.config, run.optimizer.param_groups
    shown = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
    lines = [
        f'Data: {run.loaders.description}',
        'Images: ' + ', '.join(f'{key} {run.data_config[key]}' for key in shown if key in run.data_config),
        f'Processes: {run.accelerator.num_processes} on {run.accelerator.device.type}, '
        f'mixed precision {run.accelerator.mixed_precision}',
        f'Global batch: {run.global_batch_size} = {config.batch_size} per process x {config.grad_accum_steps} '
        f'accumulated x {run.accelerator.num_processes} processes',
        f'Steps: {run.num_epochs} epochs x {run.updates_per_epoch} updates ({len(run.loaders.train)} batches)',
        f'Learning rate: {config.lr:.4g}, {config.sched} schedule',
        f'Parameter groups ({config.opt}):',
    ]
    for group in groups:
        lines.append(
            f'  {len(group["params"])} tensors, {sum(p.numel() for p in group["params"]):,} values, '
            f'weight decay {group.get("weight_decay", 0.0):g}, learning rate x{group.get("lr_scale", 1.0):g}')
    return '\n'.join(lines)
