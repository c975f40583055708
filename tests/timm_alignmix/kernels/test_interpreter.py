"""The kernels' tests in Triton's interpreter, in a process of their own: the choice holds for the whole process."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='Triton is not installed: its kernels are not used either')


@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='this is the process under the interpreter')
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(here / 'test_kernels.py')],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}, cwd=here.parents[2],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert 'skipped' not in result.stdout.splitlines()[-1]
