"""Host memory that a process takes while a model is built, whole or in shards, against the size of its weights.

    python benchmarks/shard_memory.py --model vit_large_patch16_224 --processes 2
    python benchmarks/shard_memory.py --model vit_base_patch16_224 --mix none --train 8 [--whole] [--grad-checkpointing]

With --train, of three updates with that many images a process, AdamW and a moving average, to compare with the estimate
of a dry run. On CPUs, where shards lie in host memory too. Linux only: peaks are read from /proc. What loaders
and libraries take is left out: a small model is built first.
"""
import argparse
import os
import socket
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import multiprocessing

from alignmix_lab.classification import TrainConfig
from alignmix_lab.classification.build import build_run
from alignmix_lab.runs.engine import train_one_epoch
from alignmix_lab.runs.fit import wrap_run


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (now) or VmHWM (at most since the last reset)."""
    lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def build(rank: int, processes: int, port: int, model: str, mix: str, in_shards: bool, images: int, less: bool) -> None:
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR='127.0.0.1')
    os.environ.update(ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1')
    if in_shards:
        os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')
    torch.set_num_threads(1)
    settings = dict(mix=mix, img_size=224, batch_size=2, device='cpu', workers=0)
    build_run(TrainConfig(model='test_vit', **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')  # resets VmHWM
    before = memory('VmRSS')
    if images:
        settings |= dict(
            batch_size=images, loader='timm', opt='adamw', model_ema=True, grad_checkpointing=less,
            train_samples=(3 * images * processes + 9) // 10)
    run = build_run(TrainConfig(model=model, **settings))
    if images:
        wrap_run(run)
        train_one_epoch(run, 0, lambda *_: None)
    taken = memory('VmHWM') - before
    size = sum(p.numel() * p.element_size() for p in run.task.get_eval_model().parameters())
    for turn in range(processes):
        run.accelerator.wait_for_everyone()
        if turn == rank:
            how = ('shards' if in_shards else 'whole') + f', {images} images' * bool(images) + ', checkpointing' * less
            print(f'{model}, {mix}, {how}, process {rank}: at most {taken / 2**30:.2f} GiB more than before, '
                  f'{taken / size:.2f} of the weights ({size / 2**30:.2f} GiB)', flush=True)
    run.accelerator.state.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default='vit_large_patch16_224')
    parser.add_argument('--mix', nargs='+', default=['cutmix', 'alignmix'])
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--whole', action='store_true', help='every process holds the model, for comparison')
    parser.add_argument('--train', type=int, default=0, metavar='IMAGES', help='train too, on batches of this size')
    parser.add_argument('--grad-checkpointing', action='store_true')
    args = parser.parse_args()
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '131072'  # freed tensors go back to the system at once
    for mix in args.mix:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(build, (
            args.processes, port, args.model, mix, not args.whole, args.train, args.grad_checkpointing),
            nprocs=args.processes)


if __name__ == '__main__':
    main()
