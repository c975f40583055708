"""The benchmarks whose figures wait for a GPU still run, at tiny sizes on a CPU, and fill all their tables."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = {'ceilings', 'accuracy', 'sinkhorn_gpu', 'dense_loss_gpu', 'draws_gpu', 'steps_gpu', 'syncs', 'timm_gpu'}


@pytest.mark.parametrize('script, tables', (('gpu_suite.py', SUITE), ('breakdown.py', {'breakdown'})))
def test_every_table_is_filled(script, tables, tmp_path):
    words = ['--device', 'cpu', '--quick', '--threads', '1', '--output', tmp_path]
    result = subprocess.run(
        [sys.executable, ROOT / 'benchmarks' / script, *words], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.stem for path in tmp_path.glob('*.json')} == tables
    for name in tables:
        table = json.loads((tmp_path / f'{name}.json').read_text())
        assert table['rows'] and all(len(row) == len(table['columns']) for row in table['rows'])
        medians = [cell['median'] for row in table['rows'] for cell in row if isinstance(cell, dict)]
        assert all(map(math.isfinite, medians))
        assert f'# {table["title"]}' in (tmp_path / f'{name}.md').read_text()
