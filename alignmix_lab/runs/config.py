"""Options that every kind of training has, under timm's names."""
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from .options import Options, config_option

SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')

_data = partial(config_option, 'Data')
_opt = partial(config_option, 'Optimizer')
_sched = partial(config_option, 'Learning rate schedule')
_norm = partial(config_option, 'Batch norm and weight averaging')
_device = partial(config_option, 'Speed and device')
_run = partial(config_option, 'Run, logs and checkpoints', affects_result=False)


@dataclass
class RunConfig(Options):
    """Options that every kind of training has: optimizer, schedule, averaging, device, logs and checkpoints.

    Attributes:
        metrics: What an evaluation measures, in the order of summary.csv; the first ranks checkpoints by default.
        arch: Name of the network, kept in checkpoints.
    """

    metrics: ClassVar[tuple[str, ...]]

    workers: int = _data(4, 'loader threads (ffcv) or processes (others) per process', int, low=0, flags=('-j',),
                         affects_result=False)
    pin_mem: bool = _data(False, 'pin host memory (not ffcv)', bool, affects_result=False)

    batch_size: int = _opt(128, 'training batch size per process', int, low=1, flags=('-b',))
    validation_batch_size: int | None = _opt(
        None, 'evaluation batch size per process; default: --batch-size', int, low=1, flags=('-vb',))
    grad_accum_steps: int = _opt(1, 'batches per optimizer update', int, low=1)
    opt: str = _opt('sgd', 'timm optimizer name')
    opt_eps: float | None = _opt(None, "epsilon; default: the optimizer's", float, low=0)
    opt_betas: list[float] | None = _opt(None, "betas; default: the optimizer's", float, nargs='+')
    momentum: float = _opt(0.9, 'momentum', float, low=0)
    weight_decay: float = _opt(2e-5, 'weight decay (not on biases and norms)', float, low=0)
    clip_grad: float | None = _opt(None, 'clip gradients at this value; default: no clipping', float, low=0)
    clip_mode: str = _opt('norm', 'how to clip', choices=('norm', 'value', 'agc'))
    layer_decay: float | None = _opt(None, 'layer-wise learning rate decay', float, low=0)
    layer_decay_min_scale: float = _opt(0.0, 'smallest layer-wise scale', float, low=0)
    layer_decay_no_opt_scale: float | None = _opt(None, 'freeze layers whose scale is smaller', float, low=0)
    opt_foreach: bool | None = _opt(
        None, "multi-tensor updates; default: the optimizer's, fused for SGD, Adam and AdamW on GPUs", bool)
    opt_kwargs: dict = _opt({}, 'further arguments of the optimizer, e.g. --opt-kwargs fused=True', dict)

    sched: str = _sched('cosine', 'schedule', choices=SCHEDULERS)
    sched_on_updates: bool = _sched(False, 'change the learning rate at every update instead of every epoch', bool)
    lr: float | None = _sched(None, 'learning rate; overrides --lr-base', float, low=0)
    lr_base: float = _sched(0.1, 'learning rate at --lr-base-size: lr = lr-base * scale(global batch / base size)',
                            float, low=0)
    lr_base_size: int = _sched(256, 'global batch size that --lr-base belongs to', int, low=1)
    lr_base_scale: str | None = _sched(
        None, 'scale with the global batch; default: sqrt for ada* and lamb optimizers, else linear',
        choices=('linear', 'sqrt'))
    lr_noise: list[float] | None = _sched(None, 'learning rate noise on and off, parts of the run', float, nargs='+')
    lr_noise_pct: float = _sched(0.67, 'learning rate noise limit', float)
    lr_noise_std: float = _sched(1.0, 'learning rate noise standard deviation', float)
    lr_cycle_mul: float = _sched(1.0, 'cycle length multiplier', float)
    lr_cycle_decay: float = _sched(0.5, 'learning rate factor per cycle', float)
    lr_cycle_limit: int = _sched(1, 'number of cycles', int, low=1)
    lr_k_decay: float = _sched(1.0, 'k-decay of cosine and poly', float)
    lr_decay_fn: str | None = _sched(None, 'decay phase of wsd and rsqrt')
    lr_stable_timescale: float | None = _sched(None, 'timescale of rsqrt, in epochs', float)
    warmup_lr: float = _sched(1e-5, 'learning rate where the warm-up starts', float, low=0)
    min_lr: float = _sched(0.0, 'learning rate where the schedule ends', float, low=0)
    epochs: int = _sched(300, 'epochs of the schedule', int, low=1)
    stop_epoch: int | None = _sched(None, 'stop after this many epochs, to be resumed later', int, low=1,
                                     affects_result=False)
    start_epoch: int | None = _sched(None, 'first epoch; default: 0, or where --resume continues', int, low=0,
                                      affects_result=False)
    decay_milestones: list[int] = _sched([90, 180, 270], 'epochs where multistep decays', int, nargs='+')
    decay_epochs: float | None = _sched(
        None, 'epochs between decays of step (default: 90); length of the decay of wsd and rsqrt, in epochs or, below '
        '1, as a part of the schedule (default: 0.2)', float, low=0)
    decay_rate: float = _sched(0.1, 'decay factor of step and multistep, power of poly', float, flags=('--dr',))
    warmup_epochs: int = _sched(5, 'epochs of linear warm-up', int, low=0)
    warmup_prefix: bool = _sched(False, 'do not count the warm-up in --epochs', bool)
    cooldown_epochs: int = _sched(0, 'epochs at --min-lr after the schedule', int, low=0)

    sync_bn: bool = _norm(False, 'batch norm statistics over all processes', bool)
    dist_bn: str = _norm('reduce', 'before evaluation: average the running statistics of all processes, take those of '
                         "the first, or ('') leave them", choices=('reduce', 'broadcast', ''))
    model_ema: bool = _norm(False, 'keep a moving average of the weights and evaluate it too', bool)
    model_ema_decay: float = _norm(0.9998, 'decay of the moving average', float, low=0)
    model_ema_warmup: bool = _norm(False, 'let the decay grow from 0', bool)
    model_ema_force_cpu: bool = _norm(False, 'keep the moving average on the CPU: saved, not evaluated', bool)

    amp: bool = _device(False, 'mixed precision', bool)
    amp_dtype: str = _device('float16', 'type of mixed precision', choices=('float16', 'bfloat16'))
    channels_last: bool = _device(False, 'channels-last memory format', bool)
    no_ddp_bb: bool = _device(False, 'do not broadcast buffers in distributed training', bool)
    dist_timeout: int = _device(
        600, 'seconds that a process waits for the others before it ends with an error', int, low=1,
        affects_result=False)
    device: str = _device(
        'auto', 'cpu keeps off an accelerator; which GPUs to use is said to accelerate launch (--gpu_ids)',
        choices=('auto', 'cpu'), affects_result=False)

    seed: int = _run(42, 'random seed', int, low=0, affects_result=True)
    output: str = _run('./output/train', 'folder that holds the folders of runs')
    experiment: str = _run('', "name of this run's folder; default: time-model-size-mix")
    resume: str = _run('', "continue from this checkpoint; 'auto': from the newest whole one of --experiment, if any")
    no_resume_opt: bool = _run(False, 'resume without the optimizer state', bool)
    checkpoint_hist: int = _run(10, 'best checkpoints to keep', int, low=1)
    checkpoint_steps: int = _run(
        0, 'updates between checkpoints within an epoch (recovery-EPOCH-UPDATE.pth.tar, of which the newest two are '
        'kept); 0: only at the ends of epochs', int, low=0)
    max_nonfinite: int = _run(
        10, 'stop after this many updates in a row that were skipped because the loss was not finite', int, low=1)
    val_interval: int = _run(1, 'epochs between evaluations; the last epoch is always evaluated', int, low=1)
    log_interval: int = _run(50, 'updates between log lines', int, low=1)
    log_trackers: list[str] = _run(
        [], 'also log to these, through Accelerate', choices=('tensorboard', 'wandb'), nargs='+')
    curves: bool = _run(True, 'draw curves.png after each epoch', bool)
    progress: bool = _run(False, 'progress bar even where the output is no terminal', bool)
    dry_run: bool = _run(False, 'print the resolved configuration, steps and parameter groups, and stop', bool)

    @property
    def arch(self) -> str:
        raise NotImplementedError

    def train_side(self, epoch: int) -> int | None:
        """Side of the training images of an epoch, None where it never changes."""
        return None

    def __post_init__(self):
        super().__post_init__()
        if self.resume == 'auto' and not self.experiment:
            raise ValueError('--resume auto looks into the folder of --experiment: name one')
        if self.model_ema and not self.model_ema_decay < 1:
            raise ValueError(f'--model-ema-decay must be smaller than 1, got {self.model_ema_decay}')
