"""Write a trained model as a folder that plain timm loads, with the facts of its own training."""
import inspect
import json
import os
import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, save_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..mixes import create_mix
from ..version import __version__
from .card import PAPERS, make_card
from .folder import CARD, CONFIG, WEIGHTS, key_problems, verify

# Entries of a pretrained_cfg that describe the network and its images. All others say where weights came from, and
# would be the source's, not ours.
_KEPT = (
    'num_classes', 'input_size', 'fixed_input_size', 'min_input_size', 'pool_size', 'interpolation', 'crop_pct',
    'crop_mode', 'mean', 'std', 'first_conv', 'classifier',
)
# Options that the network and its images depend on.
_MODEL_OPTIONS = (
    'model', 'model_kwargs', 'mix', 'mix_kwargs', 'num_classes', 'gp', 'in_chans', 'drop', 'drop_path', 'drop_block',
    'bn_momentum', 'bn_eps', 'img_size', 'input_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation',
)
# Options that say where and how a run was watched or stored, not what it computed.
_RUN_OPTIONS = (
    'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'stop_epoch', 'checkpoint_hist', 'val_interval',
    'log_interval', 'progress', 'dry_run', 'export', 'workers', 'pin_mem', 'dataset_download', 'device', 'config',
    'dataset_size', 'num_processes',
)


def export(
        source: str | Path | nn.Module,
        folder: str | Path,
        ema: bool | None = None,
        *,
        dataset: str | None = None,
        license: str = 'unknown',
        data_config: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors`, `config.json` and a model card, for `timm.create_model('local-dir:FOLDER')`.

    Arguments the network was built with are kept, so timm builds the same one. The files appear only when they are
    proved to fit each other.

    Args:
        source: A training checkpoint of train_imagenet.py or of timm's train.py, or a timm model.
        folder: Where to write; files of an earlier export are replaced.
        ema: Of a checkpoint, the moving average (True), the raw weights (False), or the moving average where there is
            one (None).
        dataset: Short name of the data set, for the tag; None takes it from the checkpoint.
        license: Licence of the weights. Nothing is inherited: whoever trained them decides.
        data_config: Of a model, its preprocessing (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`); None
            takes what timm resolves for it.
        training: Of a model, facts to record, such as `mix`, `mix_options`, `recipe`.

    Returns:
        The folder.

    Raises:
        ValueError: A damaged or partial checkpoint (the keys are named), or one without what was asked for.
    """
    if isinstance(source, nn.Module):
        model = unwrap_model(source)
        facts = {**({'dataset': dataset} if dataset else {}), **(training or {})}
        class_names = None
    else:
        model, data_config, facts, class_names = _open_checkpoint(Path(source), ema, dataset)
    return _write(Path(folder), model, data_config, facts, class_names, license)


def _open_checkpoint(
        path: Path,
        ema: bool | None,
        dataset: str | None,
) -> tuple[nn.Module, dict[str, Any], dict[str, Any], list[str] | None]:
    # Here, not above: reading and using exported weights must not need what training needs.
    from ..training.build import model_arguments
    from ..training.checkpoint import read_checkpoint
    from ..training.config import TrainConfig

    with torch.serialization.safe_globals([Namespace]):  # plain data; timm's train.py saves its arguments as one
        state = read_checkpoint(path)
    if 'args' not in state:
        raise ValueError(f'{path} does not hold the arguments it was trained with; export the model itself instead')
    args = state['args'] if isinstance(state['args'], dict) else vars(state['args'])
    if ema and 'state_dict_ema' not in state:
        raise ValueError(f'{path} has no moving average: the run was without --model-ema; export the raw weights')
    key = 'state_dict' if ema is False or 'state_dict_ema' not in state else 'state_dict_ema'
    weights = clean_state_dict(state[key])

    config = TrainConfig(**{name: args[name] for name in _MODEL_OPTIONS if args.get(name) is not None})
    arguments = model_arguments(config)
    num_classes = config.num_classes or _count_classes(config.model, arguments, weights, path)
    model = timm.create_model(config.model, num_classes=num_classes, **arguments)
    problems = key_problems(model.state_dict(), weights)
    if problems:
        raise ValueError(f'{path} does not fit {config.model}: {problems}')
    model.load_state_dict(weights)

    class_names = state.get('data_config', {}).get('class_names')
    data_config = resolve_data_config(config.to_dict(), model=model)
    facts = _facts(path, state, args, 'raw' if key == 'state_dict' else 'ema')
    facts['dataset'] = dataset or _dataset_name(args, class_names)
    return model, data_config, facts, class_names


def _count_classes(name: str, arguments: dict[str, Any], weights: dict[str, torch.Tensor], path: Path) -> int:
    """Rows of the classifier in a checkpoint."""
    with torch.device('meta'):
        classifier = timm.create_model(name, **arguments).pretrained_cfg.get('classifier')
    key = f'{classifier if isinstance(classifier, str) else classifier[0]}.weight'
    if key not in weights:
        raise ValueError(f'{path} does not fit {name}: missing keys: {key}')
    return len(weights[key])


def _facts(path: Path, state: dict[str, Any], args: dict[str, Any], weights: str) -> dict[str, Any]:
    """What is known of a training run, without a path of the machine it ran on."""
    mix = create_mix(args.get('mix', 'none'), **args.get('mix_kwargs', {}))
    defaults = {name: p.default for name, p in inspect.signature(type(mix)).parameters.items()}
    facts = {
        'package': f'timm-alignmix {__version__}',
        'mix': mix.name,
        'mix_options': {**defaults, **mix.options},
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
    """Metrics of the exported epoch and of the best one, each by name."""
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
    """The options that computed something and are not empty; of paths only the last part."""
    recipe = {
        key: value for key, value in args.items()
        if key not in _RUN_OPTIONS and value is not False and value not in (None, '', {})
    }
    for key in ('data_dir', 'model', 'initial_checkpoint', 'class_map'):
        if key in recipe:
            recipe[key] = _base_name(recipe[key])
    return recipe


def _base_name(value: str) -> str:
    """The last part of a path; names of timm models and of the hub as they are."""
    if value.startswith('hf-hub:'):
        return value
    return os.path.basename(os.path.abspath(value.removeprefix('local-dir:')))


def _dataset_name(args: dict[str, Any], class_names: list[str] | None) -> str:
    if class_names and len(class_names) == 1000 and all(re.fullmatch(r'n\d{8}', name) for name in class_names):
        return 'in1k'
    if args.get('dataset'):
        return args['dataset'].rstrip('/').rsplit('/')[-1]
    return _base_name(args['data_dir']) if args.get('data_dir') else 'digits'


def make_tag(facts: dict[str, Any]) -> str | None:
    """`{mix}_{dataset}` in the characters of timm's tags, or None where one of them is not known."""
    if not facts.get('mix') or not facts.get('dataset'):
        return None
    return re.sub(r'[^a-z0-9]+', '_', f'{facts["mix"]}_{facts["dataset"]}'.lower()).strip('_')


def _describe(architecture: str, facts: dict[str, Any]) -> str:
    mix = {None: '', 'none': ' without mixing'}.get(facts.get('mix'), f' with {facts.get("mix")}')
    return f'{architecture} trained{mix}' + (f' on {facts["dataset"]}' if 'dataset' in facts else '') + '.'


def _for_safetensors(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
    """Make a state dict of tensors that share no memory and lie in plain order, as the safetensors format asks."""
    for key, value in state.items():
        state[key] = value.detach().clone(memory_format=torch.contiguous_format).cpu()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as timm does."""
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _write(
        folder: Path,
        model: nn.Module,
        data_config: dict[str, Any] | None,
        facts: dict[str, Any],
        class_names: list[str] | None,
        license: str,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export.', dir=folder) as temporary:
        draft = Path(temporary)
        hook = model.register_state_dict_post_hook(_for_safetensors)
        try:
            save_for_hf(model, draft, model_config={'label_names': class_names}, safe_serialization=True,
                        data_config=data_config)
        finally:
            hook.remove()
        config = json.loads((draft / CONFIG).read_text(encoding='utf-8'))
        kept = {key: value for key, value in config['pretrained_cfg'].items() if key in _KEPT}
        own = {
            'tag': make_tag(facts),
            'description': _describe(config['architecture'], facts),
            'license': license,
            'paper_ids': f'arXiv:{PAPERS[facts["mix"]][0]}' if facts.get('mix') in PAPERS else None,
        }
        config['pretrained_cfg'] = {**kept, **{key: value for key, value in own.items() if value}}
        config['training'] = json.loads(json.dumps(facts, default=str))  # as it will be read
        write_json(draft / CONFIG, config)
        (draft / CARD).write_text(make_card(config), encoding='utf-8')
        verify(draft)
        (draft / WEIGHTS).chmod(0o644)  # safetensors writes files for their owner only
        for name in (WEIGHTS, CONFIG, CARD):
            os.replace(draft / name, folder / name)
    return folder
