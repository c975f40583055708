"""What cannot work is refused before training, with the remedy."""
import logging

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


def test_an_image_size_that_the_model_can_be_told(refused):
    message = refused(model='vit_tiny_patch16_224', img_size=64)
    assert 'built for 224x224, got 64x64; pass --model-kwargs img_size=64, or --img-size 224' in message


def test_too_few_classes(refused):
    assert '--num-classes 5 allows 0 to 4; pass --num-classes 10 or more' in refused(num_classes=5)


def test_a_missing_folder(refused, tmp_path):
    assert str(tmp_path / 'photos') in refused(data_dir=str(tmp_path / 'photos'))
    assert 'does not exist' in refused(data_dir=str(tmp_path / 'photos'), loader='auto')


@pytest.mark.parametrize('options, said', [
    (dict(model='resnet51'), '--model resnet51: timm has no such model; did you mean resnet5'),
    (dict(opt='adamv'), '--opt adamv: timm has no such optimizer; did you mean '),
    (dict(mix='alignmx'), 'alignmix'),
    (dict(mix='multimix', mix_kwargs={'nn': 3}), 'nn'),
    (dict(mix='multimix', bce_loss=True), 'closed form'),
    (dict(initial_checkpoint='/none.pth'), '--initial-checkpoint /none.pth: no such file'),
    (dict(batch_size=85), '--batch-size 84 or less'),
    (dict(sync_bn=True), '--sync-bn needs GPUs'),
    (dict(model='test_vit', mix='alignmix', grad_checkpointing=True), "again without the features that mix 'alignmix'"),
    (dict(mix='alignmix_ae', mix_kwargs={'plain_weight': 0}, grad_checkpointing=True), 'the features that mix'),
    (dict(model='dla34', grad_checkpointing=True), 'dla34 does not have it'),
])
def test_wrong_options(refused, options, said):
    assert said in refused(**options)


def test_the_script_ends_with_the_message(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'setup_default_logging', lambda: logging.NOTSET)
    with pytest.raises(SystemExit, match=r'^train_imagenet\.py: error: .*photos'):
        script.main(['--data-dir', str(tmp_path / 'photos'), '--device', 'cpu', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())
