"""Export of a training checkpoint to a folder that plain timm loads."""
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict

from alignmix_lab.runs.checkpoint import load_weights, read_checkpoint
from alignmix_lab.runs.options import result_options
from alignmix_lab.runs.sharding import read_shards
from timm_alignmix import create_mix, weights
from timm_alignmix.version import __version__

from .build import model_arguments
from .config import TrainConfig

# Options that determine the network and its input.
_MODEL_OPTIONS = (
    'model', 'model_kwargs', 'mix', 'mix_kwargs', 'num_classes', 'gp', 'in_chans', 'drop', 'drop_path', 'drop_block',
    'bn_momentum', 'bn_eps', 'img_size', 'input_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation')


def export_checkpoint(
        checkpoint: str | Path, folder: str | Path, ema: bool | None = None, *, dataset: str | None = None,
        license: str = 'unknown') -> Path:
    """Write the weights of a training checkpoint as :func:`timm_alignmix.weights.export` does; returns the folder.

    Takes checkpoints of train_imagenet.py and of timm's train.py.

    Args:
        ema: Export the moving average (True), the raw weights (False), or the moving average if there is one (None).
        dataset: Short name of the data set for the tag; None takes it from the checkpoint.

    Raises:
        ValueError: The checkpoint is damaged, lacks keys (listed in the message), or lacks the requested weights.
    """
    path = Path(checkpoint)
    with torch.serialization.safe_globals([Namespace]):  # plain data, in which timm's train.py saves its arguments
        state = read_checkpoint(path)
    if 'args' not in state:
        raise ValueError(f'{path} does not hold the arguments it was trained with; export the model itself instead')
    args = state['args'] if isinstance(state['args'], dict) else vars(state['args'])
    if ema and 'state_dict_ema' not in state:
        raise ValueError(f'{path} has no moving average: the run did not use --model-ema; export the raw weights')
    key = 'state_dict' if ema is False or 'state_dict_ema' not in state else 'state_dict_ema'
    state_dict = clean_state_dict(read_shards(state, path, key)[key])

    config = TrainConfig(**{name: args[name] for name in _MODEL_OPTIONS if args.get(name) is not None})
    arguments = model_arguments(config)
    num_classes = config.num_classes or _count_classes(config.model, arguments, state_dict, path)
    model = timm.create_model(config.model, num_classes=num_classes, **arguments)
    load_weights(model, state_dict, path, config.model)

    class_names = state.get('data_config', {}).get('class_names')
    data_config = resolve_data_config(config.to_dict(), model=model)
    facts = _facts(path, state, args, 'raw' if key == 'state_dict' else 'ema')
    facts['dataset'] = dataset or _dataset_name(args, class_names)
    return weights.export(
        model, folder, license=license, data_config=data_config, training=facts, class_names=class_names)


def _count_classes(name: str, arguments: dict[str, Any], weights: dict[str, torch.Tensor], path: Path) -> int:
    """Count the rows of the classifier in a checkpoint."""
    with torch.device('meta'):
        classifier = timm.create_model(name, **arguments).pretrained_cfg.get('classifier')
    key = f'{classifier if isinstance(classifier, str) else classifier[0]}.weight'
    if key not in weights:
        raise ValueError(f'{path} does not fit {name}: missing keys: {key}')
    return len(weights[key])


def _facts(path: Path, state: dict[str, Any], args: dict[str, Any], weights: str) -> dict[str, Any]:
    """Collect the facts of a training run, without paths of its machine."""
    mix = create_mix(args.get('mix', 'none'), **args.get('mix_kwargs', {}))
    defaults = {name: p.default for name, p in mix.signature().items()}
    facts = {
        'package': f'timm-alignmix {__version__}',
        'mix': mix.name,
        'mix_options': {**defaults, **mix.options},
        'mix_weights': args['mix'] if isinstance(args.get('mix'), dict) else None,
        # Where a run does not mix at each step; the names are train_imagenet.py's and timm's.
        'mix_prob': next((args[name] for name in ('mix_prob', 'mixup_prob') if args.get(name, 1) != 1), None),
        'mix_off_epoch': args.get('mix_off_epoch') or args.get('mixup_off_epoch') or None,
        'multi_label': args.get('multi_label') or None,
        'dataset': None,
        'weights': weights,
        'loader': state.get('data_config', args).get('loader'),
        'epochs': args.get('epochs'),
        'global_batch_size': state.get('global_batch_size'),
        'accuracy': _accuracy(path, state, args),
        'initial_weights': None,
        'recipe': _recipe(args),
    }
    if args.get('pretrained'):
        facts['initial_weights'] = _base_name(args['model'])
    elif args.get('initial_checkpoint'):
        facts['initial_weights'] = _base_name(args['initial_checkpoint'])
    return {key: value for key, value in facts.items() if value is not None}


def _accuracy(path: Path, state: dict[str, Any], args: dict[str, Any]) -> dict[str, Any] | None:
    """Collect the metrics of the exported epoch and of the best one."""
    metric = state.get('metric')
    if metric is None:
        return None
    best = state.get('saver', {}).get('best')
    if path.name.startswith('last'):
        name = 'last'
    else:
        name = 'best' if best and best['epoch'] == state['epoch'] else f'epoch {state["epoch"]}'
    metrics = state.get('metrics') or {args.get('eval_metric', 'top1'): metric}
    averaged = 'state_dict_ema' in state and not args.get('model_ema_force_cpu')
    return {
        'measured_on': 'ema' if averaged else 'raw',
        'exported': name,
        name: {'epoch': state['epoch'], **metrics},
        **({'best': best} if best else {}),
    }


def _recipe(args: dict[str, Any]) -> dict[str, Any]:
    """Collect the options that affect the result and are not empty, with only the last part of paths."""
    values = {name: args.get(name) for name in result_options(TrainConfig)}
    recipe = {
        name: value for name, value in values.items()
        if value is not None and value is not False and value not in ('', {}, [])  # but 0 is kept
    }
    for key in ('data_dir', 'model', 'initial_checkpoint', 'class_map'):
        if key in recipe:
            recipe[key] = _base_name(recipe[key])
    return recipe


def _base_name(value: str) -> str:
    """Return the last part of a path; names of timm models and of the hub are unchanged."""
    if value.startswith('hf-hub:'):
        return value
    return os.path.basename(os.path.abspath(value.removeprefix('local-dir:')))


def _dataset_name(args: dict[str, Any], class_names: list[str] | None) -> str:
    if class_names and len(class_names) == 1000 and all(re.fullmatch(r'n\d{8}', name) for name in class_names):
        return 'in1k'
    if args.get('dataset'):
        return args['dataset'].rstrip('/').rsplit('/')[-1]
    return _base_name(args['data_dir']) if args.get('data_dir') else 'digits'
