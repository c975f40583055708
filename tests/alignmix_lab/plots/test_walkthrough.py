"""The notebook runs from top to bottom, as a reader would run it, and what it stores is of such a run."""
import json
from pathlib import Path

import pytest

pytest.importorskip('accelerate')
matplotlib = pytest.importorskip('matplotlib')

DOCS = Path(__file__).resolve().parents[3] / 'docs'


def test_walkthrough_runs_from_top_to_bottom(monkeypatch, capsys, one_thread):
    """In one namespace, without a kernel: the cells are plain Python."""
    monkeypatch.chdir(DOCS)
    matplotlib.use('Agg')
    cells = json.loads((DOCS / 'walkthrough.ipynb').read_text(encoding='utf-8'))['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    namespace = {}
    for i, cell in enumerate(code):
        exec(compile(''.join(cell['source']), f'cell {i}', 'exec'), namespace)
        stored = [output for output in cell['outputs'] if output['output_type'] == 'error']
        assert not stored, f'cell {i} stores an error'
    assert len(code) > 10 and any(cell['outputs'] for cell in code)
    printed = capsys.readouterr().out
    assert all(f'{name} ' in printed for name in namespace['timm_alignmix'].list_mixes())
    clean = namespace['modes']['clean']
    assert clean[-1] < clean[0] / 2  # the decoder learns the photos
