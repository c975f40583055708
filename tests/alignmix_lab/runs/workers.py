"""What test_processes.py runs on each of several processes; see its fixture `on_processes`."""
import copy
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import timm_alignmix
from alignmix_lab.classification import TrainConfig, prepare
from alignmix_lab.classification.validate import validate
from alignmix_lab.runs.fit import fit


def begin(rank: int, processes: int, port: int, target: Any, *args: Any) -> None:
    """Be one of the processes that a launcher would start, and run the target."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR='127.0.0.1', ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    target(*args)


def fingerprints(loader: Any) -> list[str]:
    return [hashlib.sha1(image.numpy().tobytes()).hexdigest() for images, _ in loader for image in images]


def evaluate(options: dict[str, Any], weights: Path, folder: Path) -> None:
    """Save the metrics of some weights, and which images this process evaluated."""
    run, _ = prepare(TrainConfig(**options))
    run.task.get_eval_model().load_state_dict(torch.load(weights, weights_only=True))
    metrics = validate(run, run.task.get_eval_model())
    torch.save({'metrics': dict(metrics), 'seen': fingerprints(run.loaders.val)},
               folder / f'{run.accelerator.process_index}.pt')


def start_apart(options: dict[str, Any], outputs: list[str], folder: Path) -> None:
    """Start with an output folder that each process sees by itself; save why that is refused."""
    rank = int(os.environ['RANK'])
    try:
        prepare(TrainConfig(**{**options, 'output': outputs[rank]}))
    except ValueError as e:
        (folder / f'{rank}.txt').write_text(str(e))


def train_all(jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Train one configuration after the other in the same processes; save what this process saw and ended with.

    A job with the key 'at' acts in a step of the task: 'die' on all processes, 'signal' or 'spoil' on the second.
    """
    forward = timm_alignmix.MixTask.forward
    for name, options in jobs.items():
        options = copy.deepcopy(options)
        at, act = options.pop('at', (-1, None))
        run, saver = prepare(TrainConfig(**options))
        rank, seen, reduced = run.accelerator.process_index, [], []

        def step(task, images, target, at=at, act=act, rank=rank, seen=seen):
            number = task.step
            result = forward(task, images, target)
            lam = None if result['lam'] is None else float(result['lam'].mean())
            seen.append((result['mode'], lam, hashlib.sha1(images.numpy().tobytes()).hexdigest()))
            if number == at and act == 'die':
                raise KeyboardInterrupt
            if number == at and act == 'signal' and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if number == at and act == 'spoil' and rank == 1:
                result['loss'] = result['loss'] * float('inf')
            return result

        def count(state, bucket, reduced=reduced):
            if bucket.is_last():
                reduced.append(len(reduced))
            return allreduce_hook(state, bucket)

        run.task.trainable_module.register_comm_hook(None, count)
        timm_alignmix.MixTask.forward = step
        result, code = None, None
        try:
            result = fit(run, saver, validate)
        except KeyboardInterrupt:
            code = 'died'
        except SystemExit as e:
            code = e.code
        finally:
            timm_alignmix.MixTask.forward = forward
        ema = run.task.get_eval_model(ema=True) if run.task.has_ema() else None
        torch.save({
            'processes': run.accelerator.num_processes,
            'history': result and result['history'],
            'steps': seen,
            'reductions': len(reduced),
            'code': code,
            'state_dict': run.task.get_eval_model().state_dict(),
            'state_dict_ema': ema and ema.state_dict(),
        }, folder / f'{name}-{rank}.pt')
