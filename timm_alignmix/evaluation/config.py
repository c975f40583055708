"""Options that every evaluation has: models, data, device and output."""
from dataclasses import dataclass
from functools import partial

from timm_alignmix.training.config import Options, config_option

_data = partial(config_option, 'Data')
_model = partial(config_option, 'Model')
_device = partial(config_option, 'Speed and device')
_run = partial(config_option, 'Run, logs and checkpoints')


@dataclass
class EvalConfig(Options):
    """Options of any protocol; each protocol adds its own."""

    model: list[str] | None = _model(
        None, 'what to evaluate, one or several: timm model name, folder of exported weights (local-dir:DIR or DIR), '
        'training checkpoint, or folder of a training run (its last and best epoch)', nargs='+')
    checkpoint: list[str] | None = _model(
        None, 'weights of the timm models named by --model, one each, or several for one name', nargs='+')
    labels: list[str] | None = _model(
        None, 'short names for tables and pictures, one per model; default: what differs between their names',
        nargs='+')
    pretrained: bool = _model(
        True, "timm's weights for a name without --checkpoint; --no-pretrained: random ones", bool)
    ema: bool | None = _model(
        None, 'of training checkpoints the moving average (--ema) or the raw weights (--no-ema); default: the moving '
        'average where there is one', bool)
    num_classes: int | None = _model(
        None, "number of classes of a timm model with --checkpoint; default: the model's", int, low=1)
    model_kwargs: dict = _model({}, 'further arguments of timm.create_model', dict)
    img_size: int | None = _model(None, "image side in pixels; default: the model's", int, low=1)
    crop_pct: float | None = _model(None, "part of the image kept by the centre crop; default: the model's", float,
                                    low=0)
    interpolation: str = _model('', "resize interpolation (timm loader); default: the model's")

    data_dir: str | None = _data(
        None, 'folder with the split inside (ImageFolder), or with train.beton and val.beton; without --data-dir and '
        '--dataset the built-in sample is used')
    dataset: str = _data('', "timm dataset name, e.g. torch/cifar10, hfds/<repo>; '' = --data-dir decides")
    split: str = _data('validation', 'split to evaluate')
    dataset_download: bool = _data(False, 'let torch/ datasets download themselves', bool)
    class_map: str = _data('', 'file that maps class names to indices, for folders with some of the classes only')
    loader: str = _data('auto', 'ffcv, timm, or ffcv where it is installed and fits', choices=('auto', 'ffcv', 'timm'))
    batch_size: int = _data(128, 'images per batch and process', int, low=1, flags=('-b',))
    workers: int = _data(4, 'loader threads (ffcv) or processes (others) per process', int, low=0, flags=('-j',))
    pin_mem: bool = _data(False, 'pin host memory (not ffcv)', bool)

    amp: bool = _device(False, 'mixed precision; attacks stay in float32', bool)
    amp_dtype: str = _device('float16', 'type of mixed precision', choices=('float16', 'bfloat16'))
    channels_last: bool = _device(False, 'channels-last memory format', bool)
    device: str = _device('auto', 'cpu keeps off an accelerator', choices=('auto', 'cpu'))

    output: str = _run('./output/evaluate', 'folder for results and for the state of what was interrupted')
    redo: bool = _run(False, 'compute results anew that are in --output for the same models, data and options', bool)
    seed: int = _run(42, 'random seed', int, low=0)
    progress: bool = _run(False, 'progress bar even where the output is no terminal', bool)

    def __post_init__(self):
        super().__post_init__()
        models, checkpoints = len(self.model or []), len(self.checkpoint or [])
        if checkpoints and models not in (1, checkpoints):
            raise ValueError(
                f'{models} models and {checkpoints} checkpoints: give one --checkpoint per --model, or one --model for '
                'all; training checkpoints need no name, pass them as --model')


# Options that say where and how fast, not what is computed.
SPEED_OPTIONS = (
    'model', 'checkpoint', 'labels', 'batch_size', 'workers', 'pin_mem', 'channels_last', 'device', 'output', 'redo',
    'progress', 'dataset_download',
)
