"""Options of all evaluations: models, data, device and output."""
from dataclasses import dataclass
from functools import partial

from alignmix_lab.data.options import SourceOptions
from alignmix_lab.runs.options import config_option

_data = partial(config_option, 'Data')
_model = partial(config_option, 'Model')
_device = partial(config_option, 'Speed and device')
_run = partial(config_option, 'Run, logs and checkpoints', affects_result=False)


@dataclass
class EvalConfig(SourceOptions):
    """Options shared by all protocols; each protocol adds its own."""

    model: list[str] | None = _model(
        None, 'one or more models: timm model name, folder of exported weights (local-dir:DIR or DIR), training '
        'checkpoint, or folder of a training run (its last and best epoch)', nargs='+', affects_result=False)
    checkpoint: list[str] | None = _model(
        None, 'weights for the timm models of --model: one per model, or several for a single model', nargs='+',
        affects_result=False)
    labels: list[str] | None = _model(
        None, 'short names for tables and pictures, one per model; default: the parts in which their names differ',
        nargs='+', affects_result=False)
    pretrained: bool = _model(
        True, "load timm's weights for a model name without --checkpoint; --no-pretrained: random weights", bool)
    ema: bool | None = _model(
        None, 'moving average (--ema) or raw weights (--no-ema) of training checkpoints; default: the moving average '
        'if there is one', bool)
    num_classes: int | None = _model(
        None, "number of classes of a timm model with --checkpoint; default: the model's", int, low=1)
    model_kwargs: dict = _model({}, 'extra arguments of timm.create_model', dict)
    img_size: int | None = _model(None, "image side in pixels; default: the model's", int, low=1)
    crop_pct: float | None = _model(None, "share of the image that the centre crop keeps; default: the model's", float,
                                    low=0)
    interpolation: str = _model('', "resize interpolation (timm loader); default: the model's")

    split: str = _data('validation', 'split to evaluate')
    batch_size: int = _data(128, 'images per batch and process', int, low=1, flags=('-b',), affects_result=False)
    workers: int = _data(4, 'loader threads (ffcv) or processes (timm) per process', int, low=0, flags=('-j',),
        affects_result=False)
    pin_mem: bool = _data(False, 'pin host memory (timm loader)', bool, affects_result=False)

    amp: bool = _device(False, 'mixed precision; attacks stay in float32', bool)
    amp_dtype: str = _device('float16', 'mixed precision type', choices=('float16', 'bfloat16'))
    channels_last: bool = _device(False, 'channels-last memory format', bool, affects_result=False)
    device: str = _device('auto', 'cpu ignores any accelerator', choices=('auto', 'cpu'), affects_result=False)

    output: str = _run('./output/evaluate', 'folder for results and for the progress of interrupted runs')
    redo: bool = _run(False, 'recompute results that --output already has for the same models, data and options', bool)
    seed: int = _run(42, 'random seed', int, low=0, affects_result=True)
    progress: bool = _run(False, 'show progress bars even if the output is not a terminal', bool)

    def __post_init__(self):
        super().__post_init__()
        models, checkpoints = len(self.model or []), len(self.checkpoint or [])
        if checkpoints and models not in (1, checkpoints):
            raise ValueError(
                f'{models} models and {checkpoints} checkpoints: pass one --checkpoint per --model, or a single '
                '--model; training checkpoints need no model name, pass them as --model')


@dataclass
class AllConfig(EvalConfig):
    """Options of `all`; those of the protocols are added."""

    skip: list[str] | None = _run(None, 'protocols to leave out, e.g. cost robustness', nargs='+')
