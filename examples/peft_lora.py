"""LoRA (2106.09685) with PEFT on a timm ViT, trained with a mixing method on scikit-learn's digits.

    pip install timm-alignmix peft scikit-learn
    python examples/peft_lora.py --mix alignmix --epochs 3

PEFT wraps the model, and MixTask takes the timm model inside, `get_base_model()`: LoRA layers stand in it by then. The
result is a plain timm model: `merge_and_unload()` adds the adapters to the weights.
"""
import argparse

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits

from timm_alignmix import MixTask


def add_lora(model: torch.nn.Module, rank: int = 8) -> PeftModel:
    """Freeze a timm ViT but for its classifier, and add adapters to its attention."""
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=['attn.qkv', 'attn.proj'], modules_to_save=['head']))


def digits(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 3, side, side) of mean 0 and labels (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(side, side), mode='bicubic', antialias=True)
    return images.expand(-1, 3, -1, -1), torch.from_numpy(labels)


def train(
        model: PeftModel, images: torch.Tensor, labels: torch.Tensor, mix: str, epochs: int, lr: float = 5e-3) -> None:
    """Train what is not frozen."""
    task = MixTask(model.get_base_model(), mix=mix, img_size=images.shape[-2:])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = task(images[batch], labels[batch])['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    task.remove_hooks()


def main(argv: list[str] | None = None) -> float:
    """Train, merge and evaluate; returns the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_vit', help='a ViT of timm')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--mix', default='alignmix')
    parser.add_argument('--epochs', type=int, default=3)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = digits(32)
    model = add_lora(timm.create_model(args.model, args.pretrained, num_classes=10, img_size=32, dynamic_img_size=True))
    model.print_trainable_parameters()
    train(model, images[:1437], labels[:1437], args.mix, args.epochs)
    plain = model.merge_and_unload().eval()  # a timm model, to evaluate, save and export as any
    with torch.inference_mode():
        accuracy = (plain(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
    print(f'{args.mix}: accuracy {accuracy:.3f}')
    return accuracy


if __name__ == '__main__':
    main()
