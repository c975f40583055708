"""LoRA through PEFT: the mixing methods train the adapters alone, and the merged model is timm's."""
import pytest
import timm
import torch

pytest.importorskip('peft', reason='PEFT is not installed: pip install peft')

from examples import peft_lora  # noqa: E402


def test_the_example_learns(capsys):
    assert peft_lora.main(['--epochs', '2']) > 0.3  # chance is 0.1
    assert 'alignmix: accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('mix', ['alignmix', 'manifold', 'multimix', 'cutmix'])
def test_only_the_adapters_and_the_classifier_train(mix):
    timm_model = timm.create_model('test_vit', num_classes=10, img_size=32, dynamic_img_size=True)
    before = {key: value.clone() for key, value in timm_model.state_dict().items()}
    model = peft_lora.add_lora(timm_model)
    images, labels = peft_lora.digits(32)
    peft_lora.train(model, images[:192], labels[:192], mix, epochs=1)
    model.eval()
    with torch.inference_mode():
        adapted = model(images[:8])
        own = {key.replace('.base_layer', ''): value for key, value in model.get_base_model().state_dict().items()}
        for key, value in before.items():
            assert key.startswith('head') or torch.equal(own[key], value), key
        merged = model.merge_and_unload()
        assert type(merged) is timm.models.VisionTransformer
        torch.testing.assert_close(merged(images[:8]), adapted, rtol=1e-4, atol=1e-5)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    assert {key for key, value in before.items() if not torch.equal(after[key], value)} == {
        *(key for key in before if key.endswith(('attn.qkv.weight', 'attn.proj.weight'))), 'head.weight', 'head.bias'}
