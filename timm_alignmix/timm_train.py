"""Mixing methods in timm's own train.py, whose file stays as it is.

    python -m timm_alignmix.timm_train PATH/TO/train.py --mix densemultimix --mix-kwargs n=1000 [flags of train.py]
    torchrun --nproc-per-node 8 -m timm_alignmix.timm_train PATH/TO/train.py --mix alignmix [flags of train.py]
    python -m timm_alignmix.timm_train PATH/TO/train.py --mix mixup=0.5 cutmix=0.5 --mix-kwargs mixup.alpha=0.8 [...]

timm ships train.py in its repository only, so its path is the first argument. The script is imported, --mix and
--mix-kwargs are added to its flags (and to its args.yaml and --config files), and its ClassificationTask is replaced by
timm_alignmix.MixTask, but for --mix none. Its --mixup-prob and --mixup-off-epoch hold for --mix too. Data, optimizer,
schedule, EMA, checkpoints and logs are train.py's own.
"""
import importlib.metadata
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.utils import ParseKwargs

from . import MixTask, create_mix
from .mixes import ParseMix, with_probability
from .step_random import StepRandom

# Names that are used of train.py. timm 1.0.31's own tests use them too.
NAMES_USED = ('parser', '_parse_args', 'ClassificationTask', 'train_one_epoch', 'main')

# Flags of timm's own mixing that --mix replaces, and how it says the same.
MIXING = dict(
    mixup='--mix mixup --mix-kwargs alpha=ALPHA',
    cutmix='--mix cutmix --mix-kwargs alpha=ALPHA',
    cutmix_minmax='nothing: cutmix draws the size of its box from alpha alone',
    mixup_switch_prob='--mix mixup=0.5 cutmix=0.5',
    mixup_mode='--mix-kwargs per_example=True, with several methods METHOD.per_example=True',
)
# Flags that no method goes with, and why.
REFUSED = dict(
    kd_model_name='trains with a distillation task, which --mix cannot replace',
    naflex_loader='loads sequences of patches, which --mix cannot mix',
    jsd_loss='compares augmented copies of an image and takes no soft targets',
    torchscript='makes a model that takes no hooks, with which --mix works',
)


def load_train_script(path: Path) -> ModuleType:
    """Import timm's train.py as the module `train`.

    Its folder is not put on sys.path: in a clone of timm's repository it holds another copy of timm.

    Args:
        path: train.py of timm's repository.

    Returns:
        The module, also entered in sys.modules, where data loader workers look for it.

    Raises:
        ValueError: The file does not exist, or lacks a name that is needed here.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of train.py in a clone of timm's repository.")
    spec = importlib.util.spec_from_file_location('train', path)
    train = importlib.util.module_from_spec(spec)
    sys.modules['train'] = train
    spec.loader.exec_module(train)
    missing = [name for name in NAMES_USED if not hasattr(train, name)]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: it is not a train.py of timm that this version of timm_alignmix "
            f'knows (timm {timm.__version__} is installed). train_imagenet.py does not need it.')
    return train


def check_timm_is_the_installed_one() -> None:
    """Raise RuntimeError if a `timm` folder hides the installed timm.

    `python -m` looks in the working directory first, and in a clone of timm's repository finds the clone's timm.
    """
    installed = Path(str(importlib.metadata.distribution('timm').locate_file('timm/__init__.py')))
    imported = Path(timm.__file__)
    if installed.exists() and not installed.samefile(imported):
        raise RuntimeError(
            f'timm was imported from {imported.parent}, which hides the installed timm {installed.parent}: '
            'run the command from another folder.')


def check_args(args: Namespace, defaults: dict[str, Any]) -> None:
    """Raise ValueError for flags that contradict --mix, and for methods and options that do not exist.

    Args:
        args: Values of the flags.
        defaults: Defaults of timm's mixing flags, before a --config file changed them.
    """
    mix = create_mix(args.mix, **args.mix_kwargs)
    if mix.name == 'none':
        return
    with_probability(args.mix, args.mix_kwargs, args.mixup_prob)  # refuses what is no probability
    StepRandom(args.seed)  # refuses negative ones
    for name, why in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f'--{name.replace("_", "-")} {why}: drop one.')
    loss = 'bce' if getattr(args, 'bce_loss', False) else getattr(args, 'loss', None) or 'ce'
    if loss in ('jsd', 'asl') or mix.closed_form and loss not in ('ce', 'bce'):
        raise ValueError(f'--mix {mix.name} cannot train with the {loss} loss: drop one, or take the ce or bce loss.')
    task = getattr(args, 'task', 'classification')
    if task != 'classification':
        raise ValueError(f'--mix needs --task classification, got --task {task}.')
    given = [name for name, default in defaults.items() if getattr(args, name, default) != default]
    if given:
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in given)
        instead = '; '.join(f'instead of --{name.replace("_", "-")}, {MIXING[name]}' for name in given)
        raise ValueError(f"--mix {mix.name} takes the place of timm's mixing: drop it or {flags} ({instead}).")


def install(train: Any) -> None:
    """Add --mix and --mix-kwargs to a train script and replace its task by MixTask.

    Args:
        train: The module of load_train_script().
    """
    group = train.parser.add_argument_group('timm_alignmix')
    group.add_argument(
        '--mix', default='none', nargs='+', action=ParseMix, metavar='NAME',
        help='mixing method (default: none), or several with weights, of which each step draws one: mixup=0.5 '
        'cutmix=0.5; works with --mixup-prob and --mixup-off-epoch')
    group.add_argument(
        '--mix-kwargs', default={}, nargs='*', action=ParseKwargs, metavar='KEY=VALUE',
        help='options of the method; with several, mixup.alpha=0.8')
    parse_args, train_one_epoch = train._parse_args, train.train_one_epoch
    defaults = {name: train.parser.get_default(name) for name in MIXING}

    def parse_args_and_install_task():
        args, args_text = parse_args()
        try:
            check_args(args, defaults)
        except ValueError as e:
            train.parser.error(str(e))

        def create_task(model, **kwargs):
            # Read here and not above: train.py finds its rank and makes its model after parsing its flags.
            images = resolve_data_config(vars(args), model=model)
            mix, mix_kwargs = with_probability(args.mix, args.mix_kwargs, args.mixup_prob)
            task = MixTask(
                model, mix, mix_kwargs, seed=args.seed, rank=args.rank, img_size=images['input_size'][-2:], **kwargs)
            task.mix.set_normalization(images['mean'], images['std'])
            return task

        def train_one_epoch_mixed_or_not(epoch, *positional, task, **kwargs):
            task.mix_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
            return train_one_epoch(epoch, *positional, task=task, **kwargs)

        if create_mix(args.mix, **args.mix_kwargs).name != 'none':
            train.ClassificationTask, train.train_one_epoch = create_task, train_one_epoch_mixed_or_not
        return args, args_text

    train._parse_args = parse_args_and_install_task


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith('-'):
        sys.exit(__doc__)
    try:
        check_timm_is_the_installed_one()
        train = load_train_script(Path(argv[0]))
    except (RuntimeError, ValueError) as e:
        sys.exit(f'timm_alignmix.timm_train: {e}')
    install(train)
    sys.argv = argv  # train.py reads its flags there
    train.main()


if __name__ == '__main__':
    main()
