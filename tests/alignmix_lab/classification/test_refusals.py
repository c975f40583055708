"""What cannot work is refused before training, with the remedy."""
import logging
import shutil

import pytest

from alignmix_lab.classification import prepare


@pytest.fixture
def refused(make_config, tmp_path):
    """Callable: the message with which a run is refused, after checking that it wrote nothing."""
    def refuse(**options) -> str:
        with pytest.raises(ValueError) as error:
            prepare(make_config(tmp_path / 'output', **options))
        assert not (tmp_path / 'output').exists()
        return str(error.value)
    return refuse


def test_an_image_size_that_the_model_cannot_take(refused):
    message = refused(model='levit_128s', img_size=300, mix='densemultimix')
    assert 'levit_128s was built for 224x224, got 300x300' in message and '--img-size 224' in message


def test_too_few_classes(refused):
    assert '--num-classes 5 allows 0 to 4; pass --num-classes 10 or more' in refused(num_classes=5)


def test_a_missing_folder(refused, tmp_path):
    assert str(tmp_path / 'photos') in refused(data_dir=str(tmp_path / 'photos'))
    assert 'does not exist' in refused(data_dir=str(tmp_path / 'photos'), loader='auto')


@pytest.mark.parametrize('options, said', [
    (dict(model='resnet51'), '--model resnet51: timm has no such model; did you mean resnet5'),
    (dict(model='resnet18', pretrained=True), 'weights as --initial-checkpoint, or leave --pretrained out'),
    (dict(model_kwargs={'colour': 'red'}), '--model test_resnet: timm cannot build it ('),
    (dict(opt='adamv'), '--opt adamv: timm has no such optimizer; did you mean '),
    (dict(mix='alignmx'), 'alignmix'),
    (dict(mix='multimix', mix_kwargs={'nn': 3}), 'nn'),
    (dict(initial_checkpoint='/none.pth'), '--initial-checkpoint /none.pth: no such file'),
    (dict(batch_size=85), '--batch-size 84 or less'),
    (dict(sync_bn=True), '--sync-bn needs GPUs'),
    (dict(model='dla34', grad_checkpointing=True), 'dla34 does not have it'),
    (dict(mix='mixup', mix_kwargs={'alpha': 'abc'}), '--mix mixup --mix-kwargs alpha=abc cannot work'),
    (dict(mix='multimix', mix_kwargs={'n': '1e'}), "--mix-kwargs n='1e' cannot work"),
    (dict(mix='alignmix', mix_kwargs={'mode_probs': 0.5}), '--mix-kwargs mode_probs=0.5 cannot work'),
    (dict(mix='alignmix', mix_kwargs={'iterations': 1.5}), '--mix-kwargs iterations takes int, got 1.5'),
    (dict(mix='alignmix', mix_kwargs={'tolerance': 'small'}), '--mix-kwargs tolerance takes float | None'),
    (dict(mix='mixup', mix_kwargs={'alpha': float('inf')}), '--mix-kwargs alpha takes finite numbers'),
    (dict(mix='multimix', mix_kwargs={'alpha': [1.0, float('nan')]}), '--mix-kwargs alpha takes finite numbers'),
    (dict(gp='foo'), '--gp foo cannot work'),
    (dict(model_kwargs={'foo': 1}), '--model-kwargs foo=1 cannot work'),
    (dict(interpolation='foo'), "--interpolation must be one of '', 'nearest'"),
    (dict(train_interpolation='foo'), '--train-interpolation must be one of'),
    (dict(aa='foo'), '--aa foo cannot work'),
    (dict(opt_betas=[0.9]), '--opt-betas 0.9 cannot work'),
    (dict(opt_kwargs={'foo': 1}), '--opt-kwargs foo=1 cannot work'),
    (dict(sched='wsd', lr_decay_fn='foo'), '--sched wsd --lr-decay-fn foo cannot work'),
    (dict(mean=[0.5, 0.5]), '--mean 0.5 0.5 cannot work'),
    (dict(std=[0.2, 0.0, 0.2]), '--std must be larger than 0'),
    (dict(crop_pct=0.0), '--crop-pct must be larger than 0'),
    (dict(ratio=[0.0, 1.0]), '--ratio must be larger than 0'),
    *[({name: [float('nan'), 1.0] if name == 'scale' else float(number)}, f'{name.replace("_", "-")} takes finite')
      for name in ('lr', 'weight_decay', 'smoothing', 'mean', 'std', 'scale') for number in ('nan', 'inf')],
])
def test_wrong_options(refused, options, said):
    assert said in refused(**options)


def test_the_script_ends_with_the_message(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'setup_default_logging', lambda: logging.NOTSET)
    with pytest.raises(SystemExit, match=r'^train_imagenet\.py: error: .*photos'):
        script.main(['--data-dir', str(tmp_path / 'photos'), '--device', 'cpu', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('workers', [0, 1])
def test_the_script_ends_with_the_name_of_an_unreadable_image(script, digits, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(script, 'setup_default_logging', lambda: logging.NOTSET)
    shutil.copytree(digits, tmp_path / 'digits')
    damaged = next((tmp_path / 'digits/train/3').iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(SystemExit) as end:
        script.main([
            '--data-dir', str(tmp_path / 'digits'), '--device', 'cpu', '--output', str(tmp_path), '--epochs', '1',
            '--model', 'test_resnet', '--img-size', '64', '--batch-size', '16', '--workers', str(workers)])
    message = end.value.code
    assert message.startswith(f'train_imagenet.py: error: {damaged} cannot be read (')
    assert message.endswith('which skips such images') and '\n' not in message
