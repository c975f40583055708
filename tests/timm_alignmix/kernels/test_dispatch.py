"""When the kernels are used, and that importing them needs neither Triton nor a GPU."""
import subprocess
import sys

import pytest
import torch

from timm_alignmix import kernels
from timm_alignmix.functional import dense_multimix_loss, losses, sinkhorn_plan, transport, transport_cost

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def test_import_without_triton_and_the_operators_on_a_cpu():
    """A finder that refuses Triton stands for a machine without it."""
    program = (
        'import sys\n'
        'class Refuse:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name.split(".")[0] == "triton": raise ModuleNotFoundError("refused", name=name)\n'
        'sys.meta_path.insert(0, Refuse())\n'
        'import torch, timm_alignmix\n'
        'from timm_alignmix.functional import align\n'
        'assert align(torch.randn(2, 3, 4), torch.randn(2, 3, 4))[0].isfinite().all()\n'
        'assert "triton" not in sys.modules\n')
    subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


@pytest.mark.parametrize('case', ('cuda', 'no triton', 'old triton', 'no cuda', 'old gpu', 'switched off'))
def test_usable(monkeypatch, case):
    monkeypatch.setattr(torch.version, 'cuda', None if case == 'no cuda' else '13.2')
    versions = {'no triton': (), 'old triton': (3, 5)}
    monkeypatch.setattr(kernels, 'triton_version', lambda: versions.get(case, (3, 10)))
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda device: (7, 5) if case == 'old gpu' else (9, 0))
    if case == 'switched off':
        monkeypatch.setenv('TIMM_ALIGNMIX_TRITON', '0')
    assert kernels.usable(torch.device('cuda')) == (case == 'cuda')


def test_what_the_kernels_do_not_cover_runs_in_pytorch():
    """Float64, other types, tolerance, no iteration and the attention's gradient; nothing here asks for a GPU."""
    cost_BRR = torch.rand(2, 5, 5)
    for cost, iterations, tolerance in ((cost_BRR.double(), 3, None), (cost_BRR, 0, None), (cost_BRR, 3, 0.1)):
        assert torch.equal(
            kernels.plan_matrix(cost, 0.1, iterations, 2, tolerance),
            transport.plan_matrix(cost, 0.1, iterations, 2, tolerance))
    price, weight = torch.randint(-9, 9, (2, 3, 3, 2)), torch.zeros(4, 3, 3, 2, dtype=torch.int64)
    assert torch.equal(kernels.cut_source_side(price, weight), price <= 0)  # 64 bits
    assert torch.equal(kernels.cost_matrix(cost_BRR, cost_BRR), transport.cost_matrix(cost_BRR, cost_BRR))
    logits_BRC, target, weights_RNB = torch.randn(3, 2, 4), torch.tensor([0, 1, 2]), torch.full((2, 5, 3), 1 / 3)
    for logits, attention_grad in ((logits_BRC.double(), False), (logits_BRC, True)):
        arguments = (logits, target, weights_RNB, torch.rand(3, 2), 0.1, 1, True, attention_grad)
        for got, want in zip(kernels.loss_and_grads(*arguments), losses.loss_and_grads(*arguments), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@CUDA
def test_operators_take_the_kernels_on_a_gpu(monkeypatch):
    """Public functions on the GPU, with the kernels and without: the same to their stated accuracy, no host sync."""
    pytest.importorskip('triton')
    generator = torch.Generator().manual_seed(0)
    feat_BDR = torch.randn(4, 64, 49, generator=generator).cuda().bfloat16()
    logits_BRC = torch.randn(16, 4, 30, generator=generator).cuda()
    weights_RNB = torch.rand(4, 64, 16, generator=generator).softmax(2).cuda()
    target = torch.arange(16).cuda()

    def compute():
        cost_BRR = transport_cost(feat_BDR, feat_BDR.flip(0))
        logits = logits_BRC.clone().requires_grad_()
        loss = dense_multimix_loss(logits, target, weights_RNB)
        return cost_BRR, sinkhorn_plan(cost_BRR), loss, torch.autograd.grad(loss, logits)[0]

    compute()  # compiles
    torch.cuda.set_sync_debug_mode('error')
    try:
        fast = compute()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    monkeypatch.setenv('TIMM_ALIGNMIX_TRITON', '0')
    for got, want, tolerance in zip(fast, compute(), (1e-5, 1e-2, 1e-5, 1e-5), strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
