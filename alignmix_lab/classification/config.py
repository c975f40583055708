"""Options of a classification run, shared by flags, YAML files and `args.yaml`."""
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
from timm.task import ClassificationEvaluator
from timm.task import MultiLabelClassificationEvaluator as MultiLabelEvaluator

from alignmix_lab.data.options import INTERPOLATIONS, TrainDataOptions
from alignmix_lab.runs.config import RunConfig, aug_, data_, device_, model_, norm_, run_, sched_
from alignmix_lab.runs.options import Weights, blaming, config_option, flag, read_yaml
from timm_alignmix import MixTask
from timm_alignmix.mixes import create_mix, with_probability

_logger = logging.getLogger(__name__)
mix_ = partial(config_option, 'Mixing')

# Settings for the built-in sample.
SAMPLE_DEFAULTS = {
    'model': 'resnet18',
    'img_size': 64,
    'batch_size': 64,
    'epochs': 14,
    'opt': 'adamw',
    'lr': 2e-3,
    'weight_decay': 0.05,
    'sched': 'cosine',
    'sched_on_updates': True,  # an epoch has 22 updates: stepping by epoch would waste the first
    'warmup_epochs': 1,
    'hflip': 0.0,  # a mirrored digit is another shape
    'scale': [0.8, 1.0],
    'ratio': [0.9, 1.1],
    'crop_pct': 1.0,
    'workers': 2,
}
RESOLUTION_STEP = 32  # intermediate sides of progressive resizing are multiples of this


@dataclass
class TrainConfig(RunConfig, TrainDataOptions):
    """Options of a classification run. Options of timm's train.py have its names and defaults."""

    dataset_size: list[int] | None = data_(
        None, 'numbers of training and validation images, for --dry-run without the data', int, nargs=2, low=1,
        affects_result=False)

    mix: Weights = mix_('none', 'mixing method, see timm_alignmix.list_mixes(): alignmix, alignmix_ae, comixup, '
                    'cutmix, cutout, densemultimix, fmix, guidedmixup, manifold, mixup, multimix, none, puzzlemix, '
                    'regmixup, resizemix, saliencymix, snapmix, tokenmix, transmix, zeta; or a name that the recipe '
                    'has under mixes; '
                    "matched without case, '-' and '_'; or several methods, of which each step draws one: mixup=0.5 "
                    'cutmix=0.3 none=0.2', Weights)
    mix_kwargs: dict = mix_({}, 'options of the method, e.g. --mix-kwargs alpha=1.0 align_at=layer3; with several, '
                            'mixup.alpha=0.8 cutmix.alpha=1.0', dict)
    mix_prob: float = mix_(1.0, 'probability that a step mixes; the others are clean', float, low=0)
    mix_off_epoch: int = mix_(0, 'train without mixing from this epoch on; 0: never', int, low=0)

    model: str = model_('resnet50', 'timm model name')
    pretrained: bool = model_(False, "start from the model's pretrained weights", bool)
    initial_checkpoint: str = model_('', 'file of weights to start from')
    freeze: str = model_('', "part of the model to keep as it is: 'backbone', all but the classifier; or a number, the "
                         'stem and the first so many stages (of transformers: blocks)')
    num_classes: int | None = model_(None, 'number of classes; default: those of the data', int, low=1)
    gp: str | None = model_(None, "global pooling (avg, max, ...); default: the model's")
    in_chans: int = model_(3, 'input channels', int, low=1)
    img_size: int | None = model_(None, "image side in pixels; default: the model's", int, low=1)
    input_size: list[int] | None = model_(None, 'input as channels height width; overrides --img-size', int, nargs=3)
    crop_pct: float | None = model_(None, "fraction of the image evaluated; default: the model's", float, above=0)
    crop_mode: str | None = model_(
        None, "crop in evaluation: center, squash (the whole image, resized; timm loader); default: the model's",
        choices=('center', 'squash'))
    mean: list[float] | None = model_(None, "pixel mean, 0-1 scale; default: the model's", float, nargs='+')
    std: list[float] | None = model_(
        None, "pixel standard deviation, 0-1 scale; default: the model's", float, nargs='+', above=0)
    interpolation: str = model_(
        '', "resize interpolation in evaluation; default: the model's", choices=('', *INTERPOLATIONS))
    model_kwargs: dict = model_({}, 'further arguments of timm.create_model, e.g. --model-kwargs img_size=300', dict)
    grad_checkpointing: bool = model_(False, 'recompute activations in the backward pass to save memory', bool)

    min_res: int | None = aug_(
        None, 'progressive resizing: side of training images until --start-ramp; default: --img-size throughout; '
        'evaluation always uses --img-size', int, low=1)
    max_res: int | None = aug_(None, 'progressive resizing: side of training images from --end-ramp on', int, low=1)
    start_ramp: int = aug_(0, 'progressive resizing: last epoch at --min-res', int, low=0)
    end_ramp: int = aug_(0, 'progressive resizing: first epoch at --max-res; multiples of 32 in between', int,
                         low=0)
    smoothing: float = aug_(0.0, "label smoothing; the papers use none (timm's own default is 0.1)", float,
                            low=0, below=1)
    bce_loss: bool = aug_(False, 'binary cross-entropy; implied by --multi-label', bool)
    bce_sum: bool = aug_(False, 'sum binary cross-entropy over classes', bool)
    bce_target_thresh: float | None = aug_(
        None, 'threshold that makes soft targets binary; hardly any class of a mixture of a whole batch (multimix, '
        'densemultimix) reaches one', float)
    class_weights: str = aug_(
        'none', 'weigh the loss of each class: balanced, by the inverse of its number of training images; not for '
        'densemultimix, whose loss is a closed form', choices=('none', 'balanced'))
    drop: float = aug_(0.0, 'dropout before the classifier', float, low=0, below=1)
    drop_path: float | None = aug_(None, "stochastic depth; default: the model's", float, low=0, below=1)
    drop_block: float | None = aug_(None, "drop block; default: the model's", float, low=0, below=1)
    bn_momentum: float | None = norm_(None, "batch norm momentum; default: the model's", float)
    bn_eps: float | None = norm_(None, "batch norm epsilon; default: the model's", float)

    head_lr_scale: float = sched_(1.0, "the classifier's learning rate, relative to that of the rest", float, low=0)
    num_processes: int | None = run_(
        None, 'number of processes the settings are meant for: assumed by --dry-run, checked by other runs', int,
        low=1)
    torchcompile: str | None = device_(
        None, 'compile with this backend; the flag alone means inductor', nargs='?', const='inductor')
    eval_metric: str | None = run_(
        None, 'metric that ranks checkpoints; default: top1, or map with --multi-label', affects_result=True,
        choices=tuple(dict.fromkeys((*ClassificationEvaluator.metric_names, *MultiLabelEvaluator.metric_names))))
    export: str = run_(
        'auto', "weights to export for timm into the run's folder export/: the moving average (ema), the trained "
        'weights (raw), the moving average if there is one (auto), or none', choices=('auto', 'ema', 'raw', 'none'))

    @property
    def arch(self) -> str:
        return self.model

    @property
    def evaluator(self) -> type[ClassificationEvaluator]:
        """timm's measurement of the validation set."""
        return MultiLabelEvaluator if self.multi_label else ClassificationEvaluator

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.evaluator.metric_names

    @property
    def mix_name(self) -> str:
        """Name of the method, or of all that may be drawn."""
        return self.mix if isinstance(self.mix, str) else '+'.join(sorted(self.mix))

    def mixing(self) -> tuple[str | Mapping[str, float], dict[str, Any]]:
        """Arguments of `create_mix`, with the steps that are not mixed."""
        return with_probability(self.mix, self.mix_kwargs, self.mix_prob)

    def prepare_epoch(self, task: MixTask, epoch: int) -> None:
        task.mix_enabled = not self.mix_off_epoch or epoch < self.mix_off_epoch

    def train_side(self, epoch: int) -> int | None:
        """Return the side of the training images of an epoch, None if it never changes.

        Follows ffcv-imagenet's `get_resolution`: `min_res` up to and including `start_ramp`, `max_res` from `end_ramp`
        on, and in between a straight line rounded to the nearest multiple of 32.
        """
        if self.min_res is None:
            return None
        if epoch <= self.start_ramp:
            return self.min_res
        if epoch >= self.end_ramp:
            return self.max_res
        side = np.interp(epoch, [self.start_ramp, self.end_ramp], [self.min_res, self.max_res])
        return int(np.round(side / RESOLUTION_STEP)) * RESOLUTION_STEP

    def train_sides(self) -> list[int]:
        """Return every side of the training images of a run, in order of first use."""
        sides = [self.train_side(epoch) for epoch in range(max(self.epochs, self.end_ramp + 1))]
        return [side for side in dict.fromkeys(sides) if side is not None]

    def __post_init__(self):
        self.freeze = str(self.freeze)  # a number in YAML
        super().__post_init__()
        if self.freeze not in ('', 'backbone') and not self.freeze.isdecimal():
            raise ValueError(f"--freeze takes 'backbone' or a number of stages, got {self.freeze!r}")
        self._check_mix()
        self.bce_loss = self.bce_loss or self.multi_label
        self.eval_metric = self.eval_metric or self.evaluator.default_metric
        if self.eval_metric not in self.metrics:
            raise ValueError(
                f'--eval-metric {self.eval_metric}: with{"" if self.multi_label else "out"} --multi-label the metrics '
                f'are {", ".join(self.metrics)}')
        self._check_class_weights()
        if self.multi_label and self.balanced_sampling:
            raise ValueError('--balanced-sampling needs one class for each image: leave it or --multi-label out')
        if self.bce_target_thresh is not None and not self.bce_loss:
            raise ValueError('--bce-target-thresh needs --bce-loss')
        if self.export == 'ema' and not self.model_ema:
            raise ValueError('--export ema needs --model-ema')
        self._check_resolutions()
        if self.head_lr_scale != 1 and self.sched == 'none':
            raise ValueError('--head-lr-scale acts through the schedule: replace --sched none by --sched constant')

    def _check_mix(self) -> None:
        with blaming(self, 'mix', 'mix_kwargs', 'mix_prob'):
            self.mixing()
            mix = create_mix(self.mix, **self.mix_kwargs)
        parameters = mix.signature()
        for name, value in mix.options.items():
            kind = parameters[name].annotation
            kinds = {get_origin(part) or part for part in (get_args(kind) if isinstance(kind, UnionType) else [kind])}
            kinds |= {other for given, other in ((float, int), (tuple, list)) if given in kinds}
            is_known = kinds.isdisjoint({Any, inspect.Parameter.empty})
            if is_known and not (isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))):
                raise ValueError(f'--mix-kwargs {name} takes {inspect.formatannotation(kind)}, got {value!r}')

    def _check_class_weights(self) -> None:
        if self.class_weights == 'none':
            return
        if self.bce_loss:
            raise ValueError('--class-weights weighs softmax cross-entropy: leave --bce-loss out')
        mix = create_mix(self.mix, **self.mix_kwargs)
        if mix.closed_form:
            raise ValueError(
                f'--class-weights {self.class_weights}: the loss of --mix {mix.name} is a closed form without class '
                'weights; pass --balanced-sampling instead, which works with all methods')

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


def resolve_config(flags: dict[str, Any], config_file: str | None = None) -> TrainConfig:
    """Merge flags, recipe (a YAML file or the name of one) and defaults, in this order of precedence.

    Without a data directory, data set or recipe, the run trains on the built-in sample with the sample's own settings.

    Raises:
        ValueError: An option does not exist or does not accept its value; the message names it.
    """
    if config_file:
        base = read_yaml(config_file, TrainConfig, flags.get('mix'))
        flags = {key: value for key, value in flags.items() if key != 'mix'}  # already applied to the recipe
    elif flags.get('data_dir') or flags.get('dataset'):
        base = {}
    else:
        base = dict(SAMPLE_DEFAULTS)
        used = ' '.join(f'{flag(key)} {value}' for key, value in base.items() if key not in flags)
        _logger.info(f'No --data-dir, --dataset or --config: training on the built-in sample with {used}')
    return TrainConfig(**{**base, **flags})
