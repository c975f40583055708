"""The kernels as a GPU would run them: compiled to machine code by Triton's own toolchain, which needs no GPU."""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton', '3.6', 'needs Triton 3.6 or later, else its kernels are not used either')
CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
pytestmark = pytest.mark.skipif(
    os.environ.get('TRITON_INTERPRET') == '1' or not CUOBJDUMP.exists(),
    reason='needs Triton with its NVIDIA tools, outside the interpreter')
FEW = 64  # spilled bytes a thread, of accumulators that are touched once or in each round of the outer loop


def compiled(kernel, config, tmp_path, pointers, constants, unit_strides=(), capability=90):
    """PTX, bytes of shared memory and spilled bytes of a thread; other arguments are 32-bit integers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: config.pop(name) for name in ('num_warps', 'num_stages')}
    constants = {**config, **constants, **dict.fromkeys(unit_strides, 1)}
    signature = {
        name: 'constexpr' if name in constants else pointers.get(name, 'i32') for name in kernel.arg_names}
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    cubin = tmp_path / 'kernel.cubin'
    cubin.write_bytes(result.asm['cubin'])
    usage = subprocess.run([CUOBJDUMP, '--dump-resource-usage', cubin], capture_output=True, text=True, check=True)
    return result.asm['ptx'], result.metadata.shared, int(re.search(r'STACK:(\d+)', usage.stdout)[1])


@pytest.mark.parametrize('R', (49, 196))
def test_sinkhorn_stays_in_registers(R, tmp_path):
    from timm_alignmix.kernels.sinkhorn import _potentials_kernel, launch_config

    pointers = dict(lines_ptr='*fp32', first_ptr='*fp32', max_move='fp32')
    _, shared, spilled = compiled(_potentials_kernel, launch_config(R), tmp_path, pointers, {})
    assert spilled == 0 and shared < 2 ** 16


@pytest.mark.parametrize('K, nodes', ((1, 4), (2, 64), (2, 256), (3, 256)))
def test_cuts_stay_in_registers(K, nodes, tmp_path):
    from timm_alignmix.kernels.level_cut import _cut_kernel, launch_config

    pointers = dict(price_ptr='*i32', weight_ptr='*i32', above_ptr='*i1')
    _, shared, spilled = compiled(_cut_kernel, launch_config(K, nodes), tmp_path, pointers, dict(K=K))
    assert spilled <= (FEW if K < 3 else 2 * FEW) and shared <= 2 ** 16


def test_cost_uses_tensor_cores(tmp_path):
    from timm_alignmix.kernels.cost import _cost_kernel, launch_config

    pointers = dict(a_ptr='*bf16', b_ptr='*bf16', norm_a_ptr='*fp32', norm_b_ptr='*fp32', out_ptr='*fp32')
    ptx, shared, spilled = compiled(
        _cost_kernel, launch_config(196), tmp_path, pointers, {}, ('a_stride_d', 'b_stride_d'))
    assert 'wgmma.mma_async' in ptx and spilled <= FEW and shared <= 227 * 1024


@pytest.mark.parametrize('B, attended', ((128, True), (256, True), (128, False), (512, True), (512, False)))
def test_mixed_logits_use_tensor_cores(B, attended, tmp_path):
    from timm_alignmix.kernels.mixed_logits import _logsumexp_kernel, _weighted_sum_kernel, launch_config

    pointers = dict.fromkeys(
        ('weights_ptr', 'attention_ptr', 'sums_ptr', 'lse_ptr', 'share_ptr', 'out_ptr'), '*fp32')
    pointers['logits_ptr'] = '*bf16'
    constants = dict(HAS_ATTENTION=attended)
    if not attended:
        constants['attention_ptr'] = None
    sums = ((_weighted_sum_kernel, dict(PAIRS=pairs)) for pairs in (False, True))
    for kernel, more in ((_logsumexp_kernel, {}), *sums):
        mine = {name: kind for name, kind in pointers.items() if name in kernel.arg_names and name not in constants}
        config = launch_config(B, torch.bfloat16, total=bool(more), hopper=True)
        ptx, shared, spilled = compiled(kernel, config, tmp_path, mine, {**constants, **more})
        assert spilled <= FEW and shared <= 227 * 1024
        assert 'wgmma.mma_async' in ptx


@pytest.mark.parametrize('B', (128, 256))
def test_float32_logits_compile(B, tmp_path):
    from timm_alignmix.kernels.mixed_logits import _logsumexp_kernel, _weighted_sum_kernel, launch_config

    for kernel, constants, total in ((_logsumexp_kernel, {}, False), (_weighted_sum_kernel, dict(PAIRS=False), True)):
        pointers = {name: '*fp32' for name in kernel.arg_names if name.endswith('_ptr')}
        config = launch_config(B, torch.float32, total, hopper=True)
        _, shared, spilled = compiled(kernel, config, tmp_path, pointers, dict(constants, HAS_ATTENTION=True))
        assert spilled <= FEW and shared <= 227 * 1024
