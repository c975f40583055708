"""Start of the processes and the device of a run, through Accelerate."""
import logging
import os
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, PartialState

from .config import RunConfig
from .optim import check_optimizer
from .sharding import sharding_arguments, sharding_asked_for
from .trackers import check_trackers

_logger = logging.getLogger(__name__)
_LAUNCHED = 'ACCELERATE_MIXED_PRECISION'  # set by accelerate launch, whatever the precision


def start_processes(config: RunConfig, may_shard: bool = False) -> Accelerator:
    """Start Accelerate for a training run, after checking the options that need no data.

    With `may_shard` the launcher may ask for FSDP.

    Raises:
        ValueError: There is no such optimizer or tracker, the device does not support an option, or the launcher's
            processes would train separately.
    """
    check_optimizer(config.opt)
    check_trackers(config.log_trackers)
    accelerator = create_accelerator(
        config.device, config.amp, config.amp_dtype, config.dist_timeout, not config.no_ddp_bb, may_shard)
    if config.sync_bn and accelerator.device.type == 'cpu':
        raise ValueError('--sync-bn needs GPUs: PyTorch has no synchronized batch norm on CPUs')
    return accelerator


def create_accelerator(
        device: str = 'auto', amp: bool = False, amp_dtype: str = 'float16', dist_timeout: int = 600,
        broadcast_buffers: bool = True, may_shard: bool = False) -> Accelerator:
    """Start Accelerate and check that it sees all processes of the launcher.

    Without `amp` the precision is that of accelerate launch --mixed_precision. After `dist_timeout` seconds without the
    others a process fails. With `may_shard` the launcher may ask for FSDP.

    Raises:
        ValueError: The launcher's processes would run separately, or it asks for what the run does not do.
    """
    _check_launch_settings(may_shard)
    precision, group = choose_precision(amp, amp_dtype), InitProcessGroupKwargs(timeout=timedelta(seconds=dist_timeout))
    sharding = {}
    if sharding_asked_for():
        sharding = sharding_arguments(precision)
        _let_shard(PartialState(cpu=device == 'cpu', **group.to_kwargs()))
    accelerator = Accelerator(
        cpu=device == 'cpu',
        mixed_precision=precision,
        kwargs_handlers=[
            # Bucket views save a copy of the gradients. The graph is not static: it changes with the mode of the mix
            # and with accumulation.
            DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=True),
            group,
        ],
        **sharding,
    )
    # A launcher that starts several tells each its rank; a number alone is left over from something else.
    launched = int(os.environ.get('WORLD_SIZE', 1)) if 'RANK' in os.environ else 1
    if accelerator.num_processes != launched:
        raise ValueError(
            f'the launcher started {launched} processes, but each would train alone (Accelerate sees '
            f'{accelerator.num_processes}, {accelerator.distributed_type}). On CPUs launch with '
            f'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {launched}')
    if accelerator.num_processes == 1 and _several_asked_for():
        raise ValueError(
            'accelerate launch was asked for several processes (it set MASTER_ADDR) but started one. Launch with '
            'accelerate launch --multi_gpu --num_processes N, on CPUs without --cpu and with ACCELERATE_USE_CPU=1 '
            'before it; for a single process with --num_processes 1')
    if not accelerator.is_main_process:
        for name in ('timm', 'timm_alignmix', 'alignmix_lab', 'detection'):
            logging.getLogger(name).setLevel(logging.WARNING)
    _use_all_cores(accelerator)
    # TF32 stays off for matrix products: transport costs need full float32 precision.
    torch.backends.cudnn.benchmark = True
    return accelerator


def _let_shard(state: PartialState) -> None:
    """Let CPUs shard, which torch can and Accelerate does not offer; refuse devices that cannot."""
    if state.device.type not in ('cpu', 'cuda', 'xpu', 'npu', 'hpu'):
        raise ValueError(f'{state.device.type} devices cannot shard a model (FSDP); launch without --use_fsdp')
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU  # what Accelerate makes FSDP of


def _several_asked_for() -> bool:
    """Check whether accelerate launch was asked for several processes.

    It then sets the address of the first, but without --multi_gpu starts it alone. An address that the launcher found
    in its own environment says nothing.
    """
    if not {_LAUNCHED, 'MASTER_ADDR'} <= os.environ.keys():
        return False
    for ancestor in psutil.Process().parents():
        try:
            found = ancestor.environ()
        except psutil.Error:  # of another user
            return False
        if _LAUNCHED not in found:  # the launcher
            return any(found.get(name) != os.environ.get(name) for name in ('MASTER_ADDR', 'MASTER_PORT'))
    return False


def choose_precision(amp: bool, amp_dtype: str) -> str:
    """Return Accelerate's name of the precision: that of --amp, else the launcher's.

    Raises:
        ValueError: They differ.
    """
    launched = os.environ.get(_LAUNCHED, 'no').lower()
    chosen = {'float16': 'fp16', 'bfloat16': 'bf16'}[amp_dtype] if amp else launched
    if launched not in ('no', chosen):
        raise ValueError(
            f'--amp --amp-dtype {amp_dtype} contradicts mixed_precision {launched} of accelerate launch; leave out one')
    return chosen


def _check_launch_settings(may_shard: bool) -> None:
    """Refuse settings of accelerate launch that a run would ignore or apply a second time."""
    unknown = ('DEEPSPEED', 'MEGATRON_LM')
    if not (may_shard and sharding_asked_for()):
        unknown += ('FSDP', 'PARALLELISM_CONFIG')
    for name in unknown:
        if os.environ.get(f'ACCELERATE_USE_{name}', '').lower() in ('true', '1'):
            raise ValueError(
                f'accelerate launch was configured for {name}, which is not supported: every process holds the whole '
                f'model. Launch with accelerate launch --multi_gpu --num_processes N, and without use_{name.lower()}')
    for name, neutral, ours in (
            ('gradient_accumulation_steps', '1', '--grad-accum-steps N'),
            ('dynamo_backend', 'NO', '--torchcompile BACKEND (classifiers only)')):
        value = os.environ.get(f'ACCELERATE_{name.upper()}', neutral)
        if value.upper() != neutral:
            raise ValueError(
                f'{name} {value} of accelerate launch has no effect here; remove it there (or unset '
                f'ACCELERATE_{name.upper()}) and pass {ours}')


def _use_all_cores(accelerator: Accelerator) -> None:
    """Override `accelerate launch`'s default of one thread for processes that train on the CPU."""
    if accelerator.device.type != 'cpu' or _LAUNCHED not in os.environ or torch.get_num_threads() > 1:
        return
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    _logger.info(
        f'Using {torch.get_num_threads()} CPU threads instead of the one set by accelerate launch; choose with '
        'accelerate launch --num_cpu_threads_per_process N (2 or more)')
