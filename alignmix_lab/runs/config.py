"""Options shared by all training runs, under timm's names."""
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from timm.task import TrainingTask

from .options import Options, config_option

SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')

# One function per heading of --help. The underscore keeps them apart from options such as `model` and `opt`.
data_ = partial(config_option, 'Data')
model_ = partial(config_option, 'Model')
opt_ = partial(config_option, 'Optimizer')
sched_ = partial(config_option, 'Learning rate schedule')
aug_ = partial(config_option, 'Augmentation and regularization')
norm_ = partial(config_option, 'Batch norm and weight averaging')
device_ = partial(config_option, 'Speed and device')
run_ = partial(config_option, 'Run, logs and checkpoints', affects_result=False)


@dataclass
class RunConfig(Options):
    """Options shared by all training runs: optimizer, schedule, averaging, device, logs and checkpoints."""

    metrics: ClassVar[tuple[str, ...]]  # of an evaluation, in the order of summary.csv

    workers: int = data_(4, 'loader threads (ffcv) or processes (others) per process', int, low=0, flags=('-j',),
                         affects_result=False)
    pin_mem: bool = data_(False, 'pin host memory (not ffcv)', bool, affects_result=False)

    batch_size: int = opt_(128, 'training batch size per process', int, low=1, flags=('-b',))
    validation_batch_size: int | None = opt_(
        None, 'evaluation batch size per process; default: --batch-size', int, low=1, flags=('-vb',))
    grad_accum_steps: int = opt_(1, 'batches per optimizer update', int, low=1)
    opt: str = opt_('sgd', 'timm optimizer name')
    opt_eps: float | None = opt_(None, "epsilon; default: the optimizer's", float, low=0)
    opt_betas: list[float] | None = opt_(None, "betas; default: the optimizer's", float, nargs='+')
    momentum: float = opt_(0.9, 'momentum', float, low=0)
    weight_decay: float = opt_(2e-5, 'weight decay (not on biases and norms)', float, low=0)
    clip_grad: float | None = opt_(None, 'clip gradients at this value; default: no clipping', float, low=0)
    clip_mode: str = opt_('norm', 'how to clip', choices=('norm', 'value', 'agc'))
    layer_decay: float | None = opt_(None, 'layer-wise learning rate decay', float, low=0)
    layer_decay_min_scale: float = opt_(0.0, 'smallest layer-wise scale', float, low=0)
    layer_decay_no_opt_scale: float | None = opt_(None, 'freeze layers whose scale is smaller', float, low=0)
    opt_foreach: bool | None = opt_(
        None, "multi-tensor updates; default: the optimizer's, fused for SGD, Adam and AdamW on GPUs", bool)
    opt_kwargs: dict = opt_({}, 'further arguments of the optimizer, e.g. --opt-kwargs fused=True', dict)

    sched: str = sched_('cosine', 'schedule', choices=SCHEDULERS)
    sched_on_updates: bool = sched_(False, 'change the learning rate at every update instead of every epoch', bool)
    lr: float | None = sched_(None, 'learning rate; overrides --lr-base', float, low=0)
    lr_base: float = sched_(0.1, 'learning rate at --lr-base-size: lr = lr-base * scale(global batch / base size)',
                            float, low=0)
    lr_base_size: int = sched_(256, 'global batch size that --lr-base belongs to', int, low=1)
    lr_base_scale: str | None = sched_(
        None, 'scale with the global batch; default: sqrt for ada* and lamb optimizers, else linear',
        choices=('linear', 'sqrt'))
    lr_noise: list[float] | None = sched_(None, 'start and end of learning rate noise, 0-1', float, nargs='+')
    lr_noise_pct: float = sched_(0.67, 'learning rate noise limit', float)
    lr_noise_std: float = sched_(1.0, 'learning rate noise standard deviation', float)
    lr_cycle_mul: float = sched_(1.0, 'cycle length multiplier', float)
    lr_cycle_decay: float = sched_(0.5, 'learning rate factor per cycle', float)
    lr_cycle_limit: int = sched_(1, 'number of cycles', int, low=1)
    lr_k_decay: float = sched_(1.0, 'k-decay of cosine and poly', float)
    lr_decay_fn: str | None = sched_(None, 'decay phase of wsd and rsqrt')
    lr_stable_timescale: float | None = sched_(None, 'timescale of rsqrt, in epochs', float)
    warmup_lr: float = sched_(1e-5, 'learning rate at the start of the warm-up', float, low=0)
    min_lr: float = sched_(0.0, 'learning rate at the end of the schedule', float, low=0)
    epochs: int = sched_(300, 'epochs of the schedule', int, low=1)
    stop_epoch: int | None = sched_(None, 'stop after this many epochs, to be resumed later', int, low=1,
                                     affects_result=False)
    start_epoch: int | None = sched_(None, 'first epoch; default: 0, or where --resume continues', int, low=0,
                                      affects_result=False)
    decay_milestones: list[int] = sched_([90, 180, 270], 'epochs at which multistep decays', int, nargs='+')
    decay_epochs: float | None = sched_(
        None, 'step: epochs between decays (default: 90); wsd, rsqrt: length of the decay in epochs or, below 1, as a '
        'fraction of the schedule (default: 0.2)', float, low=0)
    decay_rate: float = sched_(0.1, 'decay factor of step and multistep, power of poly', float, flags=('--dr',))
    warmup_epochs: int = sched_(5, 'epochs of linear warm-up', int, low=0)
    warmup_prefix: bool = sched_(False, 'do not count the warm-up in --epochs', bool)
    cooldown_epochs: int = sched_(0, 'epochs at --min-lr after the schedule', int, low=0)

    sync_bn: bool = norm_(False, 'batch norm statistics over all processes', bool)
    dist_bn: str = norm_('reduce', 'running statistics before evaluation: average those of all processes, broadcast '
                         "the first's, or ('') leave them alone", choices=('reduce', 'broadcast', ''))
    model_ema: bool = norm_(False, 'keep a moving average of the weights and evaluate it too', bool)
    model_ema_decay: float = norm_(0.9998, 'decay of the moving average', float, low=0)
    model_ema_warmup: bool = norm_(False, 'increase the decay from 0', bool)
    model_ema_force_cpu: bool = norm_(False, 'keep the moving average on the CPU: saved but not evaluated', bool)

    amp: bool = device_(False, 'mixed precision', bool)
    amp_dtype: str = device_('float16', 'type of mixed precision', choices=('float16', 'bfloat16'))
    channels_last: bool = device_(False, 'channels-last memory format', bool)
    no_ddp_bb: bool = device_(False, 'do not broadcast buffers in distributed training', bool)
    dist_timeout: int = device_(
        600, 'seconds a process waits for the others before it fails', int, low=1,
        affects_result=False)
    device: str = device_(
        'auto', 'cpu ignores accelerators; choose GPUs with accelerate launch --gpu_ids',
        choices=('auto', 'cpu'), affects_result=False)

    seed: int = run_(42, 'random seed', int, low=0, affects_result=True)
    output: str = run_('./output/train', 'parent folder of the run folders')
    experiment: str = run_('', "name of this run's folder; default: time-model-size-mix")
    resume: str = run_('', "checkpoint to continue from; 'auto': the newest intact one of --experiment, if any")
    no_resume_opt: bool = run_(False, 'resume without the optimizer state', bool)
    checkpoint_hist: int = run_(10, 'best checkpoints to keep', int, low=1)
    checkpoint_steps: int = run_(
        0, 'updates between checkpoints within an epoch (recovery-EPOCH-UPDATE.pth.tar; the newest two are kept); '
        '0: save at the end of each epoch only', int, low=0)
    max_nonfinite: int = run_(
        10, 'stop after this many consecutive updates with a loss that is not finite', int, low=1)
    val_interval: int = run_(1, 'epochs between evaluations; the last epoch is always evaluated', int, low=1)
    log_interval: int = run_(50, 'updates between log lines', int, low=1)
    log_trackers: list[str] = run_(
        [], 'also log to these, through Accelerate', choices=('tensorboard', 'wandb'), nargs='+')
    wandb_project: str = run_('timm-alignmix', "project in wandb, and folder of TensorBoard's files")
    wandb_entity: str | None = run_(None, "user or team of wandb; default: that of wandb's login")
    wandb_group: str | None = run_(None, 'group of the run in wandb')
    wandb_tags: list[str] = run_([], 'tags of the run in wandb', nargs='+')
    curves: bool = run_(True, 'draw curves.png after each epoch', bool)
    progress: bool = run_(False, 'show the progress bar even if the output is not a terminal', bool)
    dry_run: bool = run_(False, 'print the resolved configuration, steps and parameter groups, then stop', bool)

    @property
    def arch(self) -> str:
        """Name of the network, saved in checkpoints."""
        raise NotImplementedError

    def train_side(self, epoch: int) -> int | None:
        """Return the side of the training images of an epoch, None if it never changes."""
        return None

    def prepare_epoch(self, task: TrainingTask, epoch: int) -> None:
        """Change the task as the settings say, before an epoch or the rest of it."""

    def __post_init__(self):
        super().__post_init__()
        if self.resume == 'auto' and not self.experiment:
            raise ValueError('--resume auto looks in the folder of --experiment: name one')
        if (self.wandb_entity or self.wandb_group or self.wandb_tags) and 'wandb' not in self.log_trackers:
            raise ValueError('--wandb-entity, --wandb-group and --wandb-tags need --log-trackers wandb')
        if self.decay_milestones != sorted(self.decay_milestones):
            raise ValueError(f'--decay-milestones must increase, got {self.decay_milestones}')
        if self.model_ema and not self.model_ema_decay < 1:
            raise ValueError(f'--model-ema-decay must be smaller than 1, got {self.model_ema_decay}')
