"""Runs whose weights, gradients, optimizer states and averages are held in shards: torch's FSDP2, through Accelerate.

Sharded tensors are torch's DTensors, which know their whole shape. A checkpoint keeps them in a folder beside its file,
into which each process writes its own shards; in the file stand tensors without values (on the meta device) for them.
"""
import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, empty

SHARDS = 'shards'


def sharding_asked_for() -> bool:
    """Return whether accelerate launch was told to shard the model."""
    return os.environ.get('ACCELERATE_USE_FSDP', '').lower() in ('true', '1')


def is_sharded(accelerator: Any) -> bool:
    """Return whether a run is sharded."""
    return getattr(accelerator, 'is_fsdp2', False)  # older releases of Accelerate never shard here


def sharding_arguments(precision: str) -> dict[str, Any]:
    """Check the settings of accelerate launch, and collect the arguments of `Accelerator` for a sharded run.

    The weights are gathered, and the forward pass computed, in the precision of the run; gradients are summed in
    float32.

    Raises:
        ValueError: Accelerate or torch is too old, there is one process, or a setting does not go with these runs.
    """
    try:
        from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401, the newest of what is needed
        from torch.distributed.fsdp import MixedPrecisionPolicy
    except ImportError as e:
        raise ValueError(f'FSDP needs newer releases of torch and accelerate ({e}); update them') from e
    _check_settings()
    processes = int(os.environ.get('WORLD_SIZE', 1))
    replicas = int(os.environ.get('PARALLELISM_CONFIG_DP_REPLICATE_SIZE', 1))
    shards = int(os.environ.get('PARALLELISM_CONFIG_DP_SHARD_SIZE', 0)) or processes // replicas
    if shards < 2 or replicas * shards != processes:
        raise ValueError(
            f'FSDP: {processes} processes cannot hold {replicas} x {shards} shards; launch at least 2, and with '
            'replicas a multiple of them')
    if precision == 'fp16':
        raise ValueError('FSDP: float16 has not been tested with shards; pass --amp-dtype bfloat16')
    dtype = torch.bfloat16 if precision == 'bf16' else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, mixed_precision_policy=policy, auto_wrap_policy='transformer_based_wrap',
        transformer_cls_names_to_wrap=[], cpu_ram_efficient_loading=False)
    return dict(
        fsdp_plugin=plugin, parallelism_config=ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards))


def _check_settings() -> None:
    for variable, neutral, instead in (
            ('FSDP_VERSION', ('2',), 'launch with --fsdp_version 2'),
            ('FSDP_OFFLOAD_PARAMS', ('', 'false'), 'the shards stay on the devices; leave it out'),
            ('FSDP_ACTIVATION_CHECKPOINTING', ('', 'false'), 'pass --grad-checkpointing to the training instead'),
            ('FSDP_TRANSFORMER_CLS_TO_WRAP', ('',), "the groups are the model's own blocks; leave it out"),
            ('FSDP_AUTO_WRAP_POLICY', ('', 'no_wrap', 'transformer_based_wrap'),
             "the groups are the model's own blocks; leave it out"),
            ('FSDP_IGNORED_MODULES', ('',), 'the whole model is sharded; leave it out'),
            *((f'PARALLELISM_CONFIG_{kind}_SIZE', ('', '1'), 'images are not divided; leave it out')
              for kind in ('TP', 'CP', 'SP'))):
        value = os.environ.get(variable, '1' if variable == 'FSDP_VERSION' else '')
        if value.lower() not in neutral:
            raise ValueError(f'FSDP: {variable.lower()} {value} of accelerate launch is not supported: {instead}')


def share_task(accelerator: Accelerator, build: Callable[[], TrainingTask]) -> tuple[TrainingTask, dict]:
    """Build a task on the CPU of the first process alone, and hand it to the others without values.

    Returns:
        The task, whose trainable module is on the meta device, and its parameters and buffers on the first process.

    Raises:
        ValueError: Building raised it, on all processes.
    """
    message, values = [None, None], {}
    if accelerator.is_main_process:
        try:
            task = build()
            module = task.get_trainable_module()
            values = {name: tensor.detach() for name, tensor in _tensors(module)}
            module.to('meta')
            message[0] = task
        except ValueError as e:
            message[1] = str(e)
    broadcast_object_list(message)
    if message[1] is not None:
        raise ValueError(message[1])
    return message[0], values


def shard_task(
        accelerator: Accelerator, task: TrainingTask, values: dict[str, torch.Tensor], input_size: tuple[int, ...],
        average: dict[str, Any] | None) -> None:
    """Shard the trainable module of a task of :func:`share_task`, and its moving average, and fill them.

    `average` are the arguments of timm's ModelEmaV3; None for no average. `input_size` is (C, H, W) of an image.

    Raises:
        ValueError: torch cannot shard the model.
    """
    module, device = task.get_trainable_module(), accelerator.device
    modules = [module] if average is None else [module, copy.deepcopy(module)]  # shards cannot be copied
    for part in modules:
        _shard(accelerator, part)
        part.to_empty(device=device)
    _fill(modules, values, device)
    task.to(device)
    if average is not None:
        task.trainable_module_ema = _ShardedAverage(modules[1], **average)
    with torch.no_grad():  # after the whole has run once, parts may run alone, in evaluation and clean passes
        module.eval()(torch.zeros(1, *input_size, device=device))
    reshard(module)


class _ShardedAverage(ModelEmaV3):
    """timm's average, of a module that is a sharded copy already, made shard by shard."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(nn.Linear(1, 1), **kwargs)  # a stand-in, since it copies what it is given
        self.module = module.eval()

    def _foreach_lerp_(
            self, ema_values: list[torch.Tensor], model_values: list[torch.Tensor], weight: float) -> None:
        super()._foreach_lerp_([own_part(v) for v in ema_values], [own_part(v) for v in model_values], weight)


def _shard(accelerator: Accelerator, module: nn.Module) -> None:
    """Make shard groups of the network's blocks, of its other layers, and of the method's layers beside it."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    network, plugin = module.model, accelerator.state.fsdp_plugin
    name, policy = type(network).__name__, plugin.mixed_precision_policy
    # Kernels of batch norm want weights in the type of its statistics.
    has_statistics = any('running_mean' in part._buffers for part in network.modules())
    try:
        plugin.mixed_precision_policy = replace(policy, param_dtype=None) if has_statistics else policy
        plugin.transformer_cls_names_to_wrap = block_classes(network)
        fsdp2_prepare_model(accelerator, network)
        plugin.transformer_cls_names_to_wrap = []
        # Its inputs keep their type: among them are targets and the numbers of a draw.
        plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False)
        fsdp2_prepare_model(accelerator, module)
    except (ValueError, NotImplementedError) as e:
        raise ValueError(f'FSDP: torch cannot shard {name} ({e})') from e
    finally:
        plugin.mixed_precision_policy = policy
    # Methods apply the classifier once more after the forward pass.
    network.set_reshard_after_forward(False, recurse=False)


def block_classes(model: nn.Module) -> list[str]:
    """Names of the classes of a timm network's blocks: modules that are a layer group of its own, more than once.

    Example:
        >>> import timm
        >>> block_classes(timm.create_model('test_resnet')), block_classes(timm.create_model('test_vit'))
        (['BasicBlock'], ['Block'])
    """
    if not hasattr(model, 'group_matcher'):
        return []
    groups: dict[int, list[list[str]]] = {}
    for name, group in group_parameters(model, model.group_matcher(coarse=False), reverse=True).items():
        groups.setdefault(group, []).append(name.split('.')[:-1])
    owners = ('.'.join(os.path.commonprefix(paths)) for paths in groups.values())
    modules = [model.get_submodule(owner) for owner in owners if owner]
    counts = Counter(
        type(part).__name__ for part in modules
        if any(part.children()) and not isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)))
    return sorted(name for name, count in counts.items() if count > 1)


@torch.no_grad()
def _fill(modules: list[nn.Module], values: dict[str, torch.Tensor], device: torch.device) -> None:
    """Send the tensors of the first process to all, one after the other; each process keeps its shard."""
    targets = [dict(_tensors(module)) for module in modules]
    for name, first in targets[0].items():
        value = values.pop(name).to(device).contiguous() if values else torch.empty(
            first.shape, dtype=first.dtype, device=device)
        distributed.broadcast(value, src=0)
        for target in targets:
            target[name].copy_(_place(value, first))


def _place(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Take the own part of a tensor that every process has, where another is sharded."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def compile_blocks(task: TrainingTask, backend: str) -> None:
    """Compile the forward pass of each block of a sharded network, and of its average.

    Gathering and freeing, and what a method does to a block's output, are hooks around it and stay outside of the
    graphs. So do blocks with hooks inside: those that hold other blocks, and the one whose attention a method reads.
    Blocks of one class share their graphs where nothing but weights differs. torch stops at so many graphs a class
    as it allows a function, so it is allowed as many for each block.

    Raises:
        ValueError: The network has no such blocks.
    """
    for network in (task.get_eval_model(ema=ema) for ema in (False, True) if not ema or task.has_ema()):
        blocks = [
            part for part in network.modules() if hasattr(part, 'reshard') and any(part.children())
            and not any(inner._forward_hooks for inner in part.modules() if inner is not part)]
        if not blocks:
            raise ValueError(
                f'--torchcompile compiles the blocks of models in shards, and {type(network).__name__} has none; leave '
                'it out')
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend)


def check_steps(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Let an optimizer step on shards of zeros, before its first step; must be called on all processes.

    Raises:
        ValueError: It cannot.
    """
    groups = optimizer.param_groups
    like = groups[0]['params'][0]
    shapes = (256, 256), (256,)  # some optimizers treat small matrices as vectors
    probes = [_place(torch.zeros(shape), like).requires_grad_() for shape in shapes]
    for probe in probes:
        probe.grad = torch.zeros_like(probe)
    optimizer.param_groups = [{**groups[0], 'params': probes}]
    try:
        optimizer.step()
    except Exception as e:  # of any type
        raise ValueError(f'--opt {name} cannot train a model in shards (FSDP; {" ".join(str(e).split())[:200]})') from e
    finally:
        optimizer.param_groups = groups
        optimizer.state.clear()


def reshard(model: nn.Module) -> None:
    """Free what the forward passes of an evaluation have gathered."""
    for module in model.modules():
        if hasattr(module, 'reshard'):
            module.reshard()


def match_forwards(accelerator: Accelerator, model: nn.Module, done: int, input_size: tuple[int, ...]) -> None:
    """Run a sharded model as often as the process that has the most batches: every forward pass needs all processes.

    Args:
        done: Forward passes of this process.
        input_size: (C, H, W) of an image.
    """
    if not is_sharded(accelerator):
        return
    most = int(accelerator.gather(torch.tensor([done], device=accelerator.device)).max())
    for _ in range(most - done):
        with accelerator.autocast():
            model(torch.zeros(1, *input_size, device=accelerator.device))
    reshard(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor from its shards, on all processes; others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard, maybe empty; tensors that are not sharded are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_shards(
        accelerator: Accelerator, state: dict[str, Any], parent: Path, epoch: int, updates: int = 0) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint into a folder, each process its own; must be called on all.

    The folder `shards-EPOCH-UPDATES` appears when it is complete. States without sharded tensors are returned as they
    are.

    Returns:
        The state for the checkpoint's file, with tensors without values instead.

    Raises:
        RuntimeError: A process could not write.
    """
    found: dict[str, torch.Tensor] = {}

    def take(path: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        found[path] = value
        return torch.empty(value.shape, dtype=value.dtype, device='meta')

    state = _replaced(state, take)
    if not found:
        return state
    from torch.distributed import checkpoint

    name, folders = f'{SHARDS}-{epoch}-{updates}', [parent]
    broadcast_object_list(folders)  # the first process names the folder of the run
    target = folders[0] / name
    temporary = target.with_name(f'tmp.{SHARDS}')
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        writer = checkpoint.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        checkpoint.save(found, storage_writer=writer)
    except checkpoint.CheckpointException as e:
        reason = next(iter(e.failures.values()))[0]
        raise RuntimeError(
            f'{target} could not be written: {reason}. The checkpoints before it are intact; free disk space or make '
            'the folder writable, and continue with --resume auto') from e
    sizes = None
    if accelerator.is_main_process:
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    return {**state, SHARDS: {'folder': name, 'sizes': sizes}}


def check_shards(state: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a file of a checkpoint's shards is missing or not as long as it was."""
    if SHARDS not in state:
        return
    folder = path.parent / state[SHARDS]['folder']
    for name, size in state[SHARDS]['sizes'].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f'{file} is missing or cut off')


def copy_shards(path: Path, folder: Path) -> None:
    """Copy the shards of a checkpoint, if it has any, to the folder that its file will be copied to."""
    if shards := _shards_of(path):
        shutil.copytree(path.parent / shards, folder / shards, dirs_exist_ok=True)


def remove_shards(folder: Path, files: Iterable[Path]) -> None:
    """Remove the shards in a folder that belong to none of its checkpoint files."""
    present = {path.name for path in folder.glob(f'{SHARDS}-*')}
    for name in present and present - {_shards_of(path) for path in files}:
        shutil.rmtree(folder / name)


def _shards_of(path: Path) -> str | None:
    try:
        return torch.load(path, map_location='cpu', weights_only=True)[SHARDS]['folder']
    except Exception:  # none, or a damaged file, which raises errors of almost any type
        return None


def read_shards(state: dict[str, Any], path: Path, *keys: str) -> dict[str, Any]:
    """Put whole tensors on the CPU for the sharded ones of a checkpoint (of some of its entries), on this process."""
    return _read(state, path, lambda place, value: torch.empty(value.shape, dtype=value.dtype), keys or tuple(state))


def read_own_shards(
        state: dict[str, Any], path: Path, like: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Put this process's shards for the tensors of a checkpoint; must be called on all processes.

    Args:
        state: A checkpoint of a sharded run on any number of processes, or of one that was not sharded.
        path: Its file.
        like: The same entries of the present run: `state_dict`, `state_dict_ema`, `task_state`, `task_state_ema`.
        parameters: Those of the optimizer, by number as in `optimizer['state']`.

    Returns:
        The state; its tensors of the model are those of `like`, with the values read. What the present run does not
        have, such as an average, stays without values.
    """
    targets: dict[str, torch.Tensor] = {}
    _replaced(like, targets.setdefault)

    def find(place: str, value: torch.Tensor) -> torch.Tensor | None:
        if not place.startswith('optimizer/state/'):
            return targets.get(place)
        parameter = parameters[int(place.split('/')[2])]
        if value.shape == parameter.shape:
            return torch.empty_like(parameter)
        mesh = parameter.device_mesh
        return empty(*value.shape, dtype=value.dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)

    def place_whole(place: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_meta or not value.ndim:
            return value
        own = find(place, value)
        return value if own is None else _place(value, own)

    return _read(_replaced(state, place_whole), path, find, tuple(state))


def _read(
        state: dict[str, Any], path: Path, target: Callable[[str, torch.Tensor], torch.Tensor | None],
        keys: tuple[str, ...]) -> dict[str, Any]:
    """Read the shards of a checkpoint into the tensors that `target` gives for the ones without values.

    Those for which it gives None are left alone.
    """
    if SHARDS not in state:
        return state
    from torch.distributed import checkpoint

    found: dict[str, torch.Tensor] = {}

    def fill(place: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_meta or place.partition('/')[0] not in keys:
            return value
        own = target(place, value)
        if own is None:
            return value
        found[place] = own
        return own

    state = _replaced(state, fill)
    alone = not any(isinstance(tensor, DTensor) for tensor in found.values())
    with torch.no_grad():
        checkpoint.load(
            found, storage_reader=checkpoint.HuggingFaceStorageReader(str(path.parent / state[SHARDS]['folder'])),
            no_dist=alone)
    return state


def _replaced(value: Any, replace: Callable[[str, Any], Any], path: str = '') -> Any:
    """Rebuild nested dicts with each leaf replaced by a function of its path ('a/b/c') and itself."""
    if not isinstance(value, dict):
        return replace(path, value)
    return type(value)(
        (key, _replaced(entry, replace, f'{path}/{key}' if path else str(key))) for key, entry in value.items())
