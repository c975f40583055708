"""The examples: each runs as a reader runs it, learns, and leaves a plain model; resumed runs draw as whole ones.

Those also evaluate between their steps: an evaluation that mixed would count as a step.
"""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms

from alignmix_lab.data import sample_dir

pytest.importorskip('sklearn', reason='scikit-learn is not installed: the examples train on its digits')

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = dict(
    plain_loop='torch', torchvision_reference='torchvision', lightning_module='lightning',
    huggingface_trainer='transformers', fastai_learner='fastai')
RUN = '''
import runpy, sys, torch
model = runpy.run_path(sys.argv[1])['main']()
torch.save(model.state_dict(), sys.argv[2])
'''


def need(library: str) -> None:
    pytest.importorskip(library, reason=f'{library} is not installed: its example was not run')


def load(name: str):
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_accuracy(weights: Path) -> float:
    """Accuracy on the validation images of timm's model with the weights, which has no hooks."""
    model = timm.create_model('test_resnet', num_classes=10).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    transform = transforms.Compose([
        transforms.Resize(48), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    images, labels = zip(*datasets.ImageFolder(sample_dir('timm') / 'validation', transform), strict=True)
    with torch.inference_mode():
        return (model(torch.stack(images)).argmax(dim=1) == torch.tensor(labels)).float().mean().item()


def test_every_example_is_here():
    names = {path.stem for path in (ROOT / 'examples').glob('*.py')} - {'peft_lora'}  # tested on its own
    assert names == set(LIBRARIES)
    for name in names:
        assert len((ROOT / 'examples' / f'{name}.py').read_text(encoding='utf-8').splitlines()) < 80, name


@pytest.mark.parametrize('name', LIBRARIES)
def test_it_learns_and_its_evaluation_is_the_plain_models(name, tmp_path):
    need(LIBRARIES[name])
    env = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    weights = tmp_path / 'weights.pt'
    run = subprocess.run(
        [sys.executable, '-c', RUN, ROOT / 'examples' / f'{name}.py', weights], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:]
    accuracies = [float(found) for found in re.findall(r'val accuracy ([\d.]+)', run.stdout)]
    assert accuracies[-1] > 0.8, run.stdout  # of ten classes, on 360 images
    if name == 'torchvision_reference':  # trains torchvision's network first
        assert len(accuracies) == 2 and accuracies[0] > 0.5, run.stdout
    # What the framework measured, up to how it rounds when it resizes.
    assert accuracies[-1] == pytest.approx(plain_accuracy(weights), abs=0.015)


def test_a_resumed_lightning_run_draws_as_a_whole_one(tmp_path):
    need('lightning')
    example = load('lightning_module')
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 48, 48), torch.arange(8)), batch_size=4)

    def fit(**kwargs) -> list:
        seen = []
        classifier = example.Classifier({'mixup': 0.5, 'cutmix': 0.5}, plain_epochs=0)
        classifier.task.register_forward_hook(
            lambda task, inputs, result: seen.append((task.step, result['lam'].item())) if task.training else None)
        trainer = example.L.Trainer(
            max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu',
            callbacks=[example.L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename='{epoch}', save_top_k=-1)])
        trainer.fit(classifier, loader, loader, **kwargs)
        return seen

    whole = fit()
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6] and len({lam for _, lam in whole}) == 6
    assert fit(ckpt_path=tmp_path / 'epoch=0.ckpt') == whole[2:]


def test_a_resumed_trainer_draws_as_a_whole_one(tmp_path):
    need('transformers')
    example = load('huggingface_trainer')

    def fit(resume: bool) -> list:
        seen = []
        trainer = example.build_trainer(
            'cutmix', output_dir=str(tmp_path), max_steps=4, save_strategy='steps', save_steps=2,
            eval_strategy='steps', eval_steps=1, use_cpu=True)
        keeper = trainer.pop_callback(example.KeepDraws)
        trainer.add_callback(keeper)
        trainer.model.timm_model.register_forward_hook(lambda model, *_: seen.append(
            (keeper.attached.state_dict()['step'], keeper.attached.lam.item())) if model.training else None)
        trainer.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-2') if resume else None)
        return seen

    whole = fit(False)
    assert [step for step, _ in whole] == [1, 2, 3, 4] and len({lam for _, lam in whole}) == 4
    assert fit(True) == whole[2:]
