"""`import timm_alignmix`: its names, and what it does without in timm."""
import subprocess
import sys
from pathlib import Path

import pytest

import timm_alignmix

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_there_and_listed():
    assert all(getattr(timm_alignmix, name) is not None for name in timm_alignmix.__all__)
    assert set(timm_alignmix.__all__) <= set(dir(timm_alignmix))
    from timm_alignmix import MixTask
    assert timm_alignmix.MixTask is MixTask is timm_alignmix.task.MixTask
    with pytest.raises(AttributeError, match="module 'timm_alignmix' has no attribute 'MixTsk'"):
        timm_alignmix.MixTsk  # noqa: B018


def test_mixup_functions_do_without_timms_tasks():
    """Releases of timm before timm.task."""
    code = """
import sys
sys.modules['timm.task'] = None  # any import of it raises
import timm, torch
import timm_alignmix
model = timm.create_model('test_resnet', num_classes=5)
x, target = timm_alignmix.create_mixup('alignmix', model, img_size=64)(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
assert model(x).shape == target.shape
assert 'MixTask' in dir(timm_alignmix) and timm_alignmix.weights.export and timm_alignmix.models.PreActResNet
try:
    timm_alignmix.MixTask
    raise SystemExit('MixTask was imported without timm.task')
except ModuleNotFoundError as e:
    assert 'timm.task' in str(e), e
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
