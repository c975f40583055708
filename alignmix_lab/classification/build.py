"""Build the parts of a classification run, and refuse options that cannot work before training starts."""
import logging
import os
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import load_checkpoint
from timm.utils import random_seed
from torch import nn

import timm_alignmix
from alignmix_lab.data.loaders import Loaders, open_loaders
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.runs.accelerator import start_processes
from alignmix_lab.runs.models import classifier_parameters, create_model, fit_img_size, freeze, size_error
from alignmix_lab.runs.options import blaming, near_names
from alignmix_lab.runs.run import Run, average_arguments
from alignmix_lab.runs.sharding import check_steps, is_sharded, shard_task, share_task

from .config import TrainConfig
from .totals import MixTotals

_logger = logging.getLogger(__name__)

def model_arguments(config: TrainConfig) -> dict[str, Any]:
    """Collect the arguments of `timm.create_model` except `pretrained`, `num_classes` and `checkpoint_path`.

    Networks that were built for another image size than the run's get `img_size`, if they take it.

    Raises:
        ValueError: There is no such model, or it does not take an argument.
    """
    arguments = _chosen_arguments(config)
    return _fit(config, arguments)[0] if _says_size(config, arguments) else arguments


def resolve_model(config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Resolve the model's arguments, and input size, mean, std, interpolation and crop of its images.

    That the model accepts such images is checked on the meta device, which takes no time and memory.

    Returns:
        The result of :func:`model_arguments`, and that of timm's `resolve_data_config`.

    Raises:
        ValueError: As of :func:`model_arguments`, or the model was built for another image size.
    """
    name = config.model
    arguments, probe, size, error = _fit(config, _chosen_arguments(config))
    for side in config.train_sides():
        e = size_error(probe, (size[0], side, side))
        if e is not None:
            raise ValueError(
                f'{name} does not accept images of {side} pixels; leave out --min-res and --max-res (model error: '
                f'{e})') from e
    if error is not None:
        built_for = resolve_data_config({}, model=probe)['input_size']
        raise ValueError(
            f'{name} was built for {_by(built_for)}, got {_by(size)}; pass --img-size {built_for[-1]} '
            f'(model error: {error})') from error
    return arguments, resolve_data_config(config.to_dict(), model=probe)


def _chosen_arguments(config: TrainConfig) -> dict[str, Any]:
    if ':' not in config.model and not timm.is_model(config.model):
        raise ValueError(
            f'--model {config.model}: timm has no such model{near_names(config.model, timm.list_models())}')
    extra = {}
    if 'densemultimix' in timm_alignmix.create_mix(config.mix, **config.mix_kwargs).name.split('+'):
        extra = timm_alignmix.dense_model_kwargs(config.model)
        if config.pretrained:
            extra.pop('class_token', None)  # pretrained weights have it; what counts is that it is not classified
        if extra:
            _logger.info(f'{config.model} is built with {extra}: dense mixing trains the classifier on every position')
    arguments = dict(
        in_chans=config.in_chans, drop_rate=config.drop, drop_path_rate=config.drop_path,
        drop_block_rate=config.drop_block, global_pool=config.gp, bn_momentum=config.bn_momentum, bn_eps=config.bn_eps)
    arguments = {
        **extra, **{key: value for key, value in arguments.items() if value is not None}, **config.model_kwargs}
    return arguments


def _says_size(config: TrainConfig, arguments: dict[str, Any]) -> bool:
    return 'img_size' not in arguments and bool(config.img_size or config.input_size)


def _fit(
        config: TrainConfig, arguments: dict[str, Any],
) -> tuple[dict[str, Any], nn.Module, tuple[int, int, int], Exception | None]:
    """Build the model without memory for its weights, for the images of the run.

    Returns:
        The arguments, with `img_size` if it is needed; the model; the size of the images; the error that they cause.
    """
    def build(**needed: Any) -> nn.Module:
        with torch.device('meta'):
            return create_model(config.model, f'--model {config.model}', **arguments, **needed)

    options = ('model', 'model_kwargs', 'gp', 'in_chans', 'drop', 'drop_path', 'drop_block', 'bn_momentum', 'bn_eps')
    with blaming(config, *options):
        probe = build()
    with blaming(config, 'input_size', 'in_chans', 'mean', 'std'):
        size = resolve_data_config(config.to_dict(), model=probe)['input_size']
    if not _says_size(config, arguments):
        return arguments, probe, size, size_error(probe, size)
    needed, probe, error = fit_img_size(build, probe, size)
    return {**needed, **arguments}, probe, size, error


def _by(size: tuple[int, int, int]) -> str:
    return f'{size[-2]}x{size[-1]}' + (f' with {size[0]} channels' if size[0] != 3 else '')


def create_data(
        config: TrainConfig,
        data_config: dict[str, Any],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
) -> Loaders:
    """Create the loaders of a process for the input of the model."""
    images = {key: data_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    return open_loaders(LoaderOptions.of(config, **images, device=device, rank=rank, world_size=world_size))


def create_task(
        config: TrainConfig, arguments: dict[str, Any], data_config: dict[str, Any], num_classes: int,
        device: torch.device, rank: int | None = 0, world_size: int = 1,
        class_weights: torch.Tensor | None = None) -> timm_alignmix.MixTask:
    """Create the model on the run's device, inside its training task.

    `class_weights` (num_classes,) float32 weigh the loss. Without `rank` the draws ask torch.distributed for it.
    """
    if config.initial_checkpoint and not os.path.isfile(config.initial_checkpoint):
        raise ValueError(f'--initial-checkpoint {config.initial_checkpoint}: no such file')
    random_seed(config.seed)
    model = create_model(
        config.model, f'--model {config.model}', 'pass a file of weights as --initial-checkpoint, or leave '
        '--pretrained out', config.pretrained, num_classes=num_classes, **arguments)
    if config.initial_checkpoint:
        _load_initial(model, config.initial_checkpoint)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except AssertionError as e:  # raised by timm's models without it
            raise ValueError(f'--grad-checkpointing: {config.model} does not have it; leave it out') from e
    if config.sync_bn and world_size > 1:
        model = convert_sync_batchnorm(model)
    if config.freeze:
        freeze(model, config.freeze, config.model)  # after sync_bn, which replaces the norms
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    bce = dict(loss_type='bce', bce_sum=config.bce_sum, bce_target_thresh=config.bce_target_thresh)
    criterion = create_classification_loss(
        multi_label=config.multi_label, smoothing=config.smoothing, **(bce if config.bce_loss else {}))
    if class_weights is not None:
        criterion = nn.CrossEntropyLoss(class_weights.to(device), label_smoothing=config.smoothing)
    mix, mix_kwargs = config.mixing()
    task = timm_alignmix.MixTask(
        model, mix=mix, mix_kwargs=mix_kwargs, criterion=criterion, seed=config.seed, rank=rank,
        img_size=data_config['input_size'][-2:], device=device, verbose=not rank)
    task.mix.set_normalization(data_config['mean'], data_config['std'])
    if not rank and (remark := task.mix.remark(config.batch_size, num_classes)):
        _logger.warning(remark)
    return task


def _load_initial(model: nn.Module, path: str) -> None:
    """Load the weights of a file into a model; code in the file is never executed."""
    try:
        load_checkpoint(model, path)
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError,
            SafetensorError) as e:  # foreign content raises any of these
        reason = ' '.join(str(e).split())
        raise ValueError(
            f'--initial-checkpoint {path} has no weights for this model ({reason[:300]}); a model of other classes is '
            'taken from its exported folder: --model local-dir:FOLDER --pretrained') from e


def build_run(config: TrainConfig) -> Run:
    """Build and check the parts of a run, without resuming it or wrapping it for its devices.

    Raises:
        ValueError: An option, the data or the model does not fit; the message suggests a remedy.
    """
    accelerator = start_processes(config, may_shard=True)
    if is_sharded(accelerator):
        _check_sharded(config)
    arguments, data_config = resolve_model(config)
    place = accelerator.device, accelerator.process_index, accelerator.num_processes
    with accelerator.local_main_process_first():  # the first process of each machine writes the shared files
        loaders = create_data(config, data_config, *place)
    data_config.update(loader=loaders.kind, class_names=loaders.class_names)
    weights = balanced_weights(loaders.train.labels(), loaders.num_classes) if config.class_weights != 'none' else None
    if is_sharded(accelerator):
        task, values = share_task(accelerator, lambda: create_task(
            replace(config, channels_last=False), arguments, data_config, loaders.num_classes, torch.device('cpu'),
            None, accelerator.num_processes, weights))
        shard_task(accelerator, task, values, data_config['input_size'], average_arguments(config))
    else:
        task = create_task(config, arguments, data_config, loaders.num_classes, *place, class_weights=weights)
    run = Run(config, accelerator, loaders, task, data_config, MixTotals)
    run.add_optimizer(scaled=classifier_parameters(task.get_eval_model()), scale=config.head_lr_scale)
    if is_sharded(accelerator):
        check_steps(run.optimizer, config.opt)
    if config.num_processes not in (None, accelerator.num_processes):
        _logger.warning(
            f'The settings are meant for {config.num_processes} processes, this run has {accelerator.num_processes}: '
            f'global batch {run.global_batch_size}, learning rate {run.config.lr:.4g}')
    return run


def _check_sharded(config: TrainConfig) -> None:
    for option, given, why in (
            ('--model-ema-force-cpu', config.model_ema_force_cpu, 'keeps the average in one piece'),
            ('--clip-mode agc', config.clip_grad is not None and config.clip_mode == 'agc', 'measures whole layers')):
        if given:
            raise ValueError(f'{option} {why}, which FSDP divides; leave out one')


def balanced_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """Weights (num_classes,) inverse to the frequencies of classes, as scikit-learn's 'balanced'; absent ones get 0.

    Example:
        >>> balanced_weights(np.array([0, 0, 0, 2]), 3)
        tensor([0.6667, 0.0000, 2.0000])
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.divide(len(labels), np.count_nonzero(counts) * counts, where=counts > 0, out=np.zeros(num_classes))
    return torch.from_numpy(weights).float()
