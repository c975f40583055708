"""Every option of a training run, under timm's names: the one list that flags, YAML files and `args.yaml` share."""
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from .resolution import train_resolution

# Headings of --help, in order; others follow as they come.
GROUPS = (
    'Data', 'Mixing', 'Detector', 'Model', 'Optimizer', 'Learning rate schedule', 'Augmentation and regularization',
    'Batch norm and weight averaging', 'Speed and device', 'Run, logs and checkpoints',
)
SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')


def config_option(
        group: str,
        default: Any,
        text: str,
        type: type = str,
        *,
        choices: tuple | None = None,
        nargs: str | int | None = None,
        const: Any = None,
        low: float | None = None,
        below: float | None = None,
        flags: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that knows its flag.

    Args:
        group: Heading in `--help`.
        default: Default value; None = decided later, as `text` says.
        text: What the option does.
        type: Type of the value, or of each of its values with `nargs`; dict = key=value pairs.
        choices: Allowed values.
        nargs: As in argparse: a number or '+' makes the value a list, '?' lets the flag stand alone for `const`.
        const: Value of a flag that stands alone.
        low: Smallest allowed number.
        below: Every allowed number is smaller than this.
        flags: Short forms.
    """
    metadata = dict(
        group=group, help=text, type=type, choices=choices, nargs=nargs, const=const, low=low, below=below, flags=flags)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


_data = partial(config_option, 'Data')
_mix = partial(config_option, 'Mixing')
_model = partial(config_option, 'Model')
_opt = partial(config_option, 'Optimizer')
_sched = partial(config_option, 'Learning rate schedule')
_aug = partial(config_option, 'Augmentation and regularization')
_norm = partial(config_option, 'Batch norm and weight averaging')
_device = partial(config_option, 'Speed and device')
_run = partial(config_option, 'Run, logs and checkpoints')


@dataclass
class Options:
    """A configuration whose fields are made by :func:`config_option`: its values are checked and given their types."""

    def __post_init__(self):
        for option in fields(self):
            setattr(self, option.name, _convert(option, getattr(self, option.name)))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for files."""
        return asdict(self)


@dataclass
class RunConfig(Options):
    """Options that every kind of training has: optimizer, schedule, averaging, device, logs and checkpoints.

    Attributes:
        metrics: What an evaluation measures, in the order of summary.csv; the first ranks checkpoints by default.
        arch: Name of the network, kept in checkpoints.
    """

    metrics: ClassVar[tuple[str, ...]]

    workers: int = _data(4, 'loader threads (ffcv) or processes (others) per process', int, low=0, flags=('-j',))
    pin_mem: bool = _data(False, 'pin host memory (not ffcv)', bool)

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
    stop_epoch: int | None = _sched(None, 'stop after this many epochs, to be resumed later', int, low=1)
    start_epoch: int | None = _sched(None, 'first epoch; default: 0, or where --resume continues', int, low=0)
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
        600, 'seconds that a process waits for the others before it ends with an error', int, low=1)
    device: str = _device(
        'auto', 'cpu keeps off an accelerator; which GPUs to use is said to accelerate launch (--gpu_ids)',
        choices=('auto', 'cpu'))

    seed: int = _run(42, 'random seed', int, low=0)
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


@dataclass
class TrainConfig(RunConfig):
    """Options of a training run. Names and defaults are those of timm's train.py wherever timm has the option."""
    metrics: ClassVar[tuple[str, ...]] = ('loss', 'top1', 'top5')

    data_dir: str | None = _data(
        None, 'ImageFolder root (train/ and val/ or validation/ inside), or a folder with train.beton and val.beton; '
        'without --data-dir, --dataset and --config the built-in sample is used')
    dataset: str = _data('', "timm dataset name, e.g. torch/cifar10, hfds/<repo>, wds/<name>; '' = --data-dir decides")
    train_split: str = _data('train', 'training split')
    val_split: str = _data('validation', 'evaluation split')
    dataset_download: bool = _data(False, 'let torch/ datasets download themselves', bool)
    class_map: str = _data('', 'file that maps class names to indices')
    loader: str = _data('auto', 'ffcv, timm, or ffcv where it is installed and fits', choices=('auto', 'ffcv', 'timm'))
    dataset_size: list[int] | None = _data(
        None, 'training and validation images, for --dry-run where the data is not at hand', int, nargs=2, low=1)

    mix: str = _mix('none', 'mixing method, see timm_alignmix.list_mixes(): alignmix, alignmix_ae, cutmix, '
                    "densemultimix, manifold, mixup, multimix, none; matched without case, '-' and '_'")
    mix_kwargs: dict = _mix({}, 'options of the method, e.g. --mix-kwargs alpha=1.0 align_at=layer3', dict)

    model: str = _model('resnet50', 'timm model name')
    pretrained: bool = _model(False, "start from the model's pretrained weights", bool)
    initial_checkpoint: str = _model('', 'start from the weights of this file')
    num_classes: int | None = _model(None, 'number of classes; default: as many as the data has', int, low=1)
    gp: str | None = _model(None, "global pooling (avg, max, ...); default: the model's")
    in_chans: int = _model(3, 'input channels', int, low=1)
    img_size: int | None = _model(None, "image side in pixels; default: the model's", int, low=1)
    input_size: list[int] | None = _model(None, 'input as channels height width; overrides --img-size', int, nargs=3)
    crop_pct: float | None = _model(None, "part of the image kept in evaluation; default: the model's", float, low=0)
    crop_mode: str | None = _model(
        None, "crop in evaluation: center, squash (the whole image, resized; timm loader); default: the model's",
        choices=('center', 'squash'))
    mean: list[float] | None = _model(None, "pixel mean, 0-1 scale; default: the model's", float, nargs='+')
    std: list[float] | None = _model(
        None, "pixel standard deviation, 0-1 scale; default: the model's", float, nargs='+')
    interpolation: str = _model('', "resize interpolation in evaluation; default: the model's")
    model_kwargs: dict = _model({}, 'further arguments of timm.create_model, e.g. --model-kwargs img_size=300', dict)
    grad_checkpointing: bool = _model(False, 'recompute activations in the backward pass to save memory', bool)

    min_res: int | None = _aug(
        None, 'progressive resizing: side of training images until --start-ramp; evaluation keeps --img-size; default: '
        '--img-size throughout', int, low=1)
    max_res: int | None = _aug(None, 'progressive resizing: side of training images from --end-ramp on', int, low=1)
    start_ramp: int = _aug(0, 'progressive resizing: last epoch at --min-res', int, low=0)
    end_ramp: int = _aug(0, 'progressive resizing: first epoch at --max-res; between, the nearest multiple of 32', int,
                         low=0)
    no_aug: bool = _aug(False, 'no training augmentation', bool)
    scale: list[float] = _aug([0.08, 1.0], 'area of the random crop', float, nargs=2, low=0)
    ratio: list[float] = _aug([3 / 4, 4 / 3], 'aspect ratio of the random crop', float, nargs=2, low=0)
    crop_resize: int | None = _aug(
        None, 'random crop of the image resized to a square of this side, instead of the random resized crop (timm '
        'loader)', int, low=1)
    crop_padding: int = _aug(
        0, 'random crop of the image padded with this many black pixels, instead of the random resized crop (timm '
        'loader)', int, low=0)
    hflip: float = _aug(0.5, 'probability of a horizontal flip', float, low=0)
    train_interpolation: str | None = _aug(None, "resize interpolation in training; default: the loader's")
    color_jitter: float = _aug(0.0, "colour jitter (timm loader; timm's own default is 0.4)", float, low=0)
    aa: str | None = _aug(None, 'AutoAugment or RandAugment policy, e.g. rand-m9-mstd0.5 (timm loader)')
    reprob: float = _aug(0.0, 'probability of random erasing (timm loader)', float, low=0)
    remode: str = _aug('pixel', 'fill of random erasing', choices=('const', 'rand', 'pixel'))
    recount: int = _aug(1, 'regions of random erasing', int, low=1)
    smoothing: float = _aug(0.0, "label smoothing; the papers use none (timm's own default is 0.1)", float,
                            low=0, below=1)
    bce_loss: bool = _aug(False, 'binary cross-entropy; refused by multimix and densemultimix', bool)
    bce_sum: bool = _aug(False, 'sum binary cross-entropy over classes', bool)
    bce_target_thresh: float | None = _aug(None, 'make soft targets binary at this value', float)
    drop: float = _aug(0.0, 'dropout before the classifier', float, low=0, below=1)
    drop_path: float | None = _aug(None, "stochastic depth; default: the model's", float, low=0, below=1)
    drop_block: float | None = _aug(None, "drop block; default: the model's", float, low=0, below=1)
    bn_momentum: float | None = _norm(None, "batch norm momentum; default: the model's", float)
    bn_eps: float | None = _norm(None, "batch norm epsilon; default: the model's", float)

    head_lr_scale: float = _sched(1.0, "the classifier's learning rate, relative to that of the rest", float, low=0)
    num_processes: int | None = _run(
        None, 'processes the settings are meant for: --dry-run assumes as many; a run with another number says so', int,
        low=1)
    torchcompile: str | None = _device(
        None, 'compile with this backend; the flag alone means inductor', nargs='?', const='inductor')
    eval_metric: str = _run('top1', 'metric that ranks checkpoints', choices=('top1', 'top5', 'loss'))
    export: str = _run(
        'auto', "weights in the run's folder export/, for timm, at the end: the moving average (ema), those "
        'trained (raw), the moving average where there is one (auto), or none', choices=('auto', 'ema', 'raw', 'none'))

    @property
    def arch(self) -> str:
        return self.model

    def train_side(self, epoch: int) -> int | None:
        return train_resolution(self, epoch)

    def __post_init__(self):
        super().__post_init__()
        if self.bce_target_thresh is not None and not self.bce_loss:
            raise ValueError('--bce-target-thresh needs --bce-loss')
        if self.export == 'ema' and not self.model_ema:
            raise ValueError('--export ema needs --model-ema')
        self._check_resolutions()
        if self.head_lr_scale != 1 and self.sched == 'none':
            raise ValueError('--head-lr-scale acts through the schedule; --sched none has none, use --sched constant')

    def _check_resolutions(self) -> None:
        if (self.min_res is None) != (self.max_res is None):
            raise ValueError('--min-res and --max-res go together')
        if self.min_res is None:
            return
        if self.min_res > self.max_res or self.start_ramp > self.end_ramp:
            raise ValueError(
                f'progressive resizing goes from small to large: --min-res {self.min_res} --max-res {self.max_res} '
                f'--start-ramp {self.start_ramp} --end-ramp {self.end_ramp}')
        if self.crop_resize or self.crop_padding:
            raise ValueError('--min-res and --max-res size the random resized crop; leave --crop-resize and '
                             '--crop-padding out')


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return '--' + name.replace('_', '-')


def _convert(option: Field, value: Any) -> Any:
    """Check one value and give it its type; YAML reads 1e-3 as text and 1 as int, where a flag reads a float."""
    kind, nargs, default = option.metadata['type'], option.metadata['nargs'], option.default
    if value is None and default is None:
        return None
    if nargs not in (None, '?'):
        values = [_convert_one(option, v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if isinstance(nargs, int) and len(values) != nargs:
            raise ValueError(f'{flag(option.name)} takes {nargs} values, got {value!r}')
        return values
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f'{flag(option.name)} takes key=value pairs (a mapping in YAML), got {value!r}')
        return dict(value)
    return _convert_one(option, value)


def _convert_one(option: Field, value: Any) -> Any:
    kind, meta = option.metadata['type'], option.metadata
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number is not None and (kind is float or number.is_integer()):
            value = kind(number)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'{flag(option.name)} takes {kind.__name__} values, got {value!r}')
    if meta['choices'] and value not in meta['choices']:
        raise ValueError(f'{flag(option.name)} must be one of {", ".join(map(repr, meta["choices"]))}, got {value!r}')
    if meta['low'] is not None and value < meta['low']:
        raise ValueError(f'{flag(option.name)} must be at least {meta["low"]}, got {value}')
    if meta['below'] is not None and value >= meta['below']:
        raise ValueError(f'{flag(option.name)} must be smaller than {meta["below"]}, got {value}')
    return value
