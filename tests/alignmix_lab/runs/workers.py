"""What tests run on each of several processes; see the fixture `on_processes`."""
import copy
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import timm_alignmix
from alignmix_lab.classification import TrainConfig, fit_and_export, prepare
from alignmix_lab.classification.validate import validate
from alignmix_lab.runs.fit import fit
from alignmix_lab.runs.sharding import whole


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


def train_in_shards(jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    """Train one configuration after the other in the same processes, in shards or not; save what this process saw.

    A job with the key 'launcher' has these environment variables. With 'at' it acts in a step of the task: 'signal', or
    'spoil' the disk, both on the second process.
    """
    forward, write = timm_alignmix.MixTask.forward, checkpoint.HuggingFaceStorageWriter.write_data
    for name, options in jobs.items():
        options = copy.deepcopy(options)
        (at, act), launcher = options.pop('at', (-1, None)), options.pop('launcher', {})
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(launcher)
        saved = dict(losses=[], gradients=[], graphs=[], code=None, history=None)
        counters.clear()
        try:
            run, saver = prepare(TrainConfig(**options))
            second = run.accelerator.process_index == 1
            saved['kinds'] = sorted({type(p).__name__ for p in run.task.get_trainable_module().parameters()})
            saved['local'] = sum(
                (p.to_local() if launcher else p).numel() for p in run.task.get_trainable_module().parameters())
            saved['start'] = weights(run)

            def step(task, images, target, at=at, act=act, second=second, saved=saved):
                number = task.step
                result = forward(task, images, target)
                saved['losses'].append((result['mode'], float(result['loss'].detach())))
                saved['graphs'].append(counters['stats']['unique_graphs'])
                if number == at and act == 'signal' and second:
                    os.kill(os.getpid(), signal.SIGTERM)
                if number == at and act == 'spoil' and second:
                    checkpoint.HuggingFaceStorageWriter.write_data = refuse
                return result

            def keep(optimizer, *_, saved=saved):
                if not saved['gradients']:
                    saved['gradients'] = [
                        whole(p.grad).clone() for group in optimizer.param_groups for p in group['params']]

            run.optimizer.optimizer.register_step_pre_hook(keep)
            timm_alignmix.MixTask.forward = step
            result = fit_and_export(run, saver)
            saved['history'] = result and result['history']
        except SystemExit as e:
            saved['code'] = e.code
        except (RuntimeError, ValueError) as e:
            saved['code'] = str(e)
        finally:
            timm_alignmix.MixTask.forward, checkpoint.HuggingFaceStorageWriter.write_data = forward, write
            for variable in launcher:
                del os.environ[variable]
        if 'start' in saved:
            saved['end'] = weights(run)
        torch.save(saved, folder / f'{name}-{os.environ["RANK"]}.pt')


def refuse(*_: Any) -> None:
    raise OSError('no space left on device')


def weights(run: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Gathered weights of a run's model and of its moving average, if any."""
    models = {'state_dict': run.task.get_eval_model()}
    if run.task.has_ema():
        models['state_dict_ema'] = run.task.get_eval_model(ema=True)
    return {key: {name: whole(value).clone() for name, value in model.state_dict().items()}
            for key, model in models.items()}
