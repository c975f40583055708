#!/usr/bin/env python3
"""Sinkhorn plans: this package's against the loop of AlignMixup's release, and the error of both against float64.

    python benchmarks/sinkhorn.py --threads 1              # a CPU
    python benchmarks/sinkhorn.py --output results         # a GPU where there is one
"""
import argparse
import time

import torch
from report import add_arguments, milliseconds, prepare, report

from alignmix_lab.runs.timing import peak_memory, time_interleaved
from timm_alignmix.functional import sinkhorn_plan, transport, transport_cost
from timm_alignmix.kernels import register


def release_plan(cost_BRR: torch.Tensor, eps: float = 0.1, iterations: int = 100) -> torch.Tensor:
    """The loop that AlignMixup's release runs, written from the paper's equations (7)-(8): two log-sum-exp updates.

    u and v are in units of the cost, marginals are 1/R, and each half-step builds (u + v - cost) / eps anew. Its early
    stop, a device sync in each iteration, is left out.
    """
    B, R, _ = cost_BRR.shape
    u = v = cost_BRR.new_zeros(B, R)
    log_marginal = -torch.log(cost_BRR.new_tensor(float(R)))

    def exponent() -> torch.Tensor:
        return (u.unsqueeze(2) + v.unsqueeze(1) - cost_BRR) / eps

    for _ in range(iterations):
        u = eps * (log_marginal - torch.logsumexp(exponent(), dim=2)) + u
        v = eps * (log_marginal - torch.logsumexp(exponent(), dim=1)) + v
    return exponent().exp()


def error(plan_BRR: torch.Tensor, exact_BRR: torch.Tensor) -> float:
    """Largest error of an entry relative to the largest entry, of any sample."""
    return ((plan_BRR - exact_BRR).abs().amax((1, 2)) / exact_BRR.amax((1, 2))).max().item()


def cases(args: argparse.Namespace) -> tuple[list[list], dict]:
    """Rows of the table, and the seconds of every round."""
    device = torch.device(args.device)
    clock = time.process_time if device.type == 'cpu' else time.perf_counter
    rows, details = [], {}
    for R in args.positions:
        generator = torch.Generator().manual_seed(0)
        feat_a_BDR, feat_b_BDR = (
            torch.randn(args.batch, 512, R, generator=generator).relu().to(device) for _ in range(2))
        cost_BRR = transport_cost(feat_a_BDR, feat_b_BDR)
        ours = {'this package': lambda cost=cost_BRR: sinkhorn_plan(cost, final_marginal='columns')}
        if device.type == 'cuda':
            ours['PyTorch form'] = lambda cost=cost_BRR: transport.plan_matrix(cost, 0.1, 100, 1, None)
        functions = {'release': lambda cost=cost_BRR: release_plan(cost), **ours}
        exact_BRR = sinkhorn_plan(cost_BRR.double(), final_marginal='columns')
        timings = time_interleaved(functions, device, args.rounds, 1, clock=clock)
        for name, function in functions.items():
            plan_BRR = function()
            rows.append([
                R, name, milliseconds(timings[name].spread), timings['release'].over(timings[name]),
                f'{error(plan_BRR, exact_BRR):.1e}', f'{cost_BRR.max() / 0.1 * 2 ** -24:.1e}',
                f'{peak_memory(function, device) / 2 ** 20:.0f}',
            ])
            details[f'{R} {name}'] = timings[name].seconds
    return rows, details


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--positions', type=int, nargs='+', default=[49, 196])
    args = parser.parse_args()
    prepare(args)
    if args.quick:
        args.batch, args.positions, args.rounds = 4, [9, 16], 2
    register()
    rows, details = cases(args)
    report(
        'sinkhorn', 'Sinkhorn, 100 iterations',
        ['R', 'loop', 'ms', 'release / this', 'error', 'bound', 'peak MiB'], rows,
        [
            f'Batch {args.batch}, float32, eps 0.1, no early stop; costs of random features of 512 channels after a '
            'ReLU (about 230 to 510).',
            f'Median (quartiles) of {args.rounds} interleaved rounds; on a CPU process time, which leaves out what '
            'other programs take.',
            'Error: largest of an entry relative to the largest, against float64 after as many iterations; bound: '
            'cost / eps * 2^-24.',
        ],
        args, details)


if __name__ == '__main__':
    main()
