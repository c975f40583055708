#!/usr/bin/env python3
"""Train on two nodes, lose one within an epoch, and go on: on one machine, each node in a network of its own.

    python tools/two_nodes.py --output FOLDER [--loopback]

Each node is a launcher of its own, `accelerate launch --num_machines 2 --machine_rank 0|1`, in its own network
namespace, connected by a pair of virtual interfaces (needs root and `ip`; with --loopback both nodes share the network
of the machine, and the cable cannot be cut). The runs train on the built-in sample with timm's loader, on the CPU:

1. both nodes, to the end;
2. both again into another folder; within the first epoch the cable is cut, so that nothing says that the other node is
   gone: the first must end within --dist-timeout, with an error that says so;
3. both go on with --resume auto; within the second epoch the second node is killed with SIGKILL: the first must end;
4. both go on with --resume auto: the end must be that of 1, bit by bit.
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
PORT, TIMEOUT = 29613, 15
OPTIONS = f"""
    --mix alignmix --loader timm --model test_resnet --img-size 64 --batch-size 24 --grad-accum-steps 3 --drop 0.1
    --model-ema --model-ema-decay 0.9 --epochs 2 --warmup-epochs 0 --opt adamw --lr 0.003 --log-interval 1 --workers 1
    --checkpoint-steps 3 --dist-timeout {TIMEOUT} --export none --experiment run --resume auto""".split()
LOST = re.compile(r'process \d lost contact with the others.*')


def ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True)


class Network:
    """Two network namespaces joined by a pair of virtual interfaces, or the machine's own network."""

    def __init__(self, loopback: bool):
        self.loopback = loopback
        self.address = '127.0.0.1' if loopback else '10.213.77.1'
        self.names = [f'node{rank}-{os.getpid()}' for rank in (0, 1)]

    def __enter__(self) -> 'Network':
        if self.loopback:
            return self
        for name in self.names:
            ip('netns', 'add', name)
        ip('link', 'add', 'cable0', 'netns', self.names[0], 'type', 'veth', 'peer', 'name', 'cable1', 'netns',
           self.names[1])
        for rank, name in enumerate(self.names):
            ip('-n', name, 'addr', 'add', f'10.213.77.{rank + 1}/24', 'dev', f'cable{rank}')
            ip('-n', name, 'link', 'set', 'lo', 'up')
            ip('-n', name, 'link', 'set', f'cable{rank}', 'up')
        return self

    def __exit__(self, *ended: object) -> None:
        if not self.loopback:
            for name in self.names:
                subprocess.run(['ip', 'netns', 'delete', name], check=False)

    def cable(self, state: str) -> None:
        ip('-n', self.names[1], 'link', 'set', 'cable1', state)

    def start(self, rank: int, folder: Path) -> subprocess.Popen:
        """Start the launcher of a node; its output goes to a file."""
        command = [
            sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '2', '--num_processes',
            '2', '--machine_rank', str(rank), '--main_process_ip', self.address, '--main_process_port', str(PORT),
            '--mixed_precision', 'no', '--dynamo_backend', 'no', str(ROOT / 'train_imagenet.py'),
            '--output', str(folder), *OPTIONS]
        env = {**os.environ, 'ACCELERATE_USE_CPU': '1', 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
        if not self.loopback:
            command = ['ip', 'netns', 'exec', self.names[rank], *command]
            env['GLOO_SOCKET_IFNAME'] = f'cable{rank}'
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f'node{rank}.log', 'ab') as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def kill(node: subprocess.Popen) -> None:
    """End a launcher and all that it started; launchers give their processes sessions of their own."""
    started = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    for process in [*started, node]:
        process.kill()
    node.wait()


def train(network: Network, folder: Path) -> None:
    """Both nodes to their end."""
    codes = [process.wait() for process in [network.start(rank, folder) for rank in (0, 1)]]
    if codes != [0, 0]:
        sys.exit(f'the nodes ended with codes {codes}; see {folder}')


def lose(network: Network, folder: Path, epoch: int, update: int, cut: bool) -> tuple[float, int, str]:
    """Lose the second node after an update; seconds until the first ended, its code, and what it said."""
    nodes, log = [network.start(rank, folder) for rank in (0, 1)], folder / 'node0.log'
    seen = log.stat().st_size
    line = re.compile(rf'Train: {epoch} \[ *{update}/')
    while not line.search(log.read_text(errors='replace')[seen:]):
        time.sleep(0.02)
        if nodes[0].poll() is not None:
            sys.exit(f'the first node ended early; see {log}')
    if cut:
        network.cable('down')
    else:
        kill(nodes[1])
    start = time.perf_counter()
    code = nodes[0].wait(timeout=600)
    seconds = time.perf_counter() - start
    if cut:
        network.cable('up')
    kill(nodes[1])
    said = LOST.search(log.read_text(errors='replace')[seen:])
    return seconds, code, said[0] if said else 'nothing of it'


def same(found: Path, expected: Path) -> str:
    """Whether two runs ended alike: summary.csv and every tensor of the last checkpoint."""
    one, other = (torch.load(folder / 'run' / 'last.pth.tar', weights_only=True) for folder in (found, expected))
    differ = [
        key for part in ('state_dict', 'state_dict_ema') for key, value in other[part].items()
        if not torch.equal(one[part][key], value)]
    if (found / 'run' / 'summary.csv').read_bytes() != (expected / 'run' / 'summary.csv').read_bytes():
        differ.append('summary.csv')
    return 'bit-identical' if not differ else f'DIFFERS: {differ[:4]}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='new folder for the runs and logs')
    parser.add_argument('--loopback', action='store_true', help='both nodes in the network of the machine')
    args = parser.parse_args()
    whole, lossy = args.output / 'whole', args.output / 'lossy'
    with Network(args.loopback) as network:
        train(network, whole)
        print('both nodes: ended', flush=True)
        losses = [(1, 1, False)] if args.loopback else [(0, 3, True), (1, 1, False)]
        for epoch, update, cut in losses:
            lossy.mkdir(parents=True, exist_ok=True)
            (lossy / 'node0.log').touch()
            seconds, code, said = lose(network, lossy, epoch, update, cut)
            what = 'cable cut' if cut else 'second node killed'
            print(f'{what} at {epoch}:{update}: the first node ended after {seconds:.1f} s with code {code}, saying: '
                  f'{said}', flush=True)
        train(network, lossy)
    print(f'continued to the end: {same(lossy, whole)} with the run that lost no node')


if __name__ == '__main__':
    main()
