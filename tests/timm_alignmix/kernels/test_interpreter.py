"""The kernels' tests in Triton's interpreter, in a process of their own: the choice holds for the whole process."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip('triton', '3.6', 'needs Triton 3.6 or later, else its kernels are not used either')


def version_of(module):
    return tuple(int(part) for part in module.__version__.split('.')[:2])


@pytest.mark.skipif(
    version_of(triton) < (3, 7) and version_of(np) >= (2, 4),
    reason="Triton's interpreter before 3.7 turns arrays into Python scalars in a way that numpy 2.4 refuses")
@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='this is the process under the interpreter')
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(here / 'test_kernels.py')],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}, cwd=here.parents[2],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert 'skipped' not in result.stdout.splitlines()[-1]
