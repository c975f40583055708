"""Where the Triton kernels run in these tests: a GPU, or Triton's interpreter, to be chosen before it is imported."""
import os

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


@pytest.fixture(scope='session')
def kernel_device():
    """'cuda' where there is a GPU, 'cpu' under the interpreter; else a skip: test_interpreter.py runs these there."""
    if INTERPRETED:
        _multiply_bfloat16_as_numbers()
        return torch.device('cpu')
    if torch.cuda.is_available():
        return torch.device('cuda')
    pytest.skip('no CUDA device; the kernels run under TRITON_INTERPRET=1 in test_interpreter.py')


def _multiply_bfloat16_as_numbers():
    """Triton 3.9's interpreter keeps bfloat16 as raw 16-bit integers, and its dot product multiplies those."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, 'raw_dot'):
        return
    builder.raw_dot = builder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return self.raw_dot(a, b, d, input_precision, max_num_imprecise_acc)

    builder.create_dot = create_dot
