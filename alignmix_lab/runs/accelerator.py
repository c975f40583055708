"""Start of the processes and the device of a run, through Accelerate."""
import logging
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from .config import RunConfig
from .optim import check_optimizer
from .trackers import check_trackers

_logger = logging.getLogger(__name__)


def start_processes(config: RunConfig) -> Accelerator:
    """Start Accelerate for a training run, after checking the options that need no data.

    Raises:
        ValueError: There is no such optimizer or tracker, the device does not support an option, or the launcher's
            processes would train separately.
    """
    check_optimizer(config.opt)
    check_trackers(config.log_trackers)
    accelerator = create_accelerator(
        config.device, config.amp, config.amp_dtype, config.dist_timeout, not config.no_ddp_bb)
    if config.sync_bn and accelerator.device.type == 'cpu':
        raise ValueError('--sync-bn needs GPUs: PyTorch has no synchronized batch norm on CPUs')
    return accelerator


def create_accelerator(
        device: str = 'auto',
        amp: bool = False,
        amp_dtype: str = 'float16',
        dist_timeout: int = 600,
        broadcast_buffers: bool = True,
) -> Accelerator:
    """Start Accelerate and check that it sees all processes of the launcher.

    Args:
        device: 'cpu' ignores accelerators.
        amp: Mixed precision; False leaves it to accelerate launch --mixed_precision.
        amp_dtype: 'float16' or 'bfloat16'.
        dist_timeout: Seconds a process waits for the others before it fails.
        broadcast_buffers: Whether DDP broadcasts buffers.

    Raises:
        ValueError: The launcher's processes would run separately.
    """
    accelerator = Accelerator(
        cpu=device == 'cpu',
        mixed_precision={'float16': 'fp16', 'bfloat16': 'bf16'}[amp_dtype] if amp else None,
        kwargs_handlers=[
            # Bucket views save a copy of the gradients. The graph is not static: it changes with the mode of the mix
            # and with accumulation.
            DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=dist_timeout)),
        ],
    )
    launched = int(os.environ.get('WORLD_SIZE', 1))
    if accelerator.num_processes != launched:
        raise ValueError(
            f'the launcher started {launched} processes, but each would train alone (Accelerate sees '
            f'{accelerator.num_processes}, {accelerator.distributed_type}). On CPUs launch with '
            f'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {launched}')
    if not accelerator.is_main_process:
        for name in ('timm', 'timm_alignmix', 'alignmix_lab', 'detection'):
            logging.getLogger(name).setLevel(logging.WARNING)
    _use_all_cores(accelerator)
    # TF32 stays off for matrix products: transport costs need full float32 precision.
    torch.backends.cudnn.benchmark = True
    return accelerator


def _use_all_cores(accelerator: Accelerator) -> None:
    """Override `accelerate launch`'s default of one thread for processes that train on the CPU."""
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if accelerator.device.type != 'cpu' or not launched or torch.get_num_threads() > 1:
        return
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    _logger.info(
        f'Using {torch.get_num_threads()} CPU threads instead of the one set by accelerate launch; choose with '
        'accelerate launch --num_cpu_threads_per_process N (2 or more)')
