"""torchvision's references/classification: its loop, with mixup_fn on the batch in place of a collate_fn.

The reference mixes in a `collate_fn`, so in the workers of the data loader. mixup_fn refuses that: it mixes inside the
model too, and its draws count the steps of the run. It is called in the loop, on the batch as it is on the device.
"""
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

import timm_alignmix
from alignmix_lab.data import sample_dir


def train_one_epoch(model, criterion, optimizer, scheduler, data_loader, device, mixup_fn) -> None:
    model.train()
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        image, target = mixup_fn(image, target)
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def evaluate(model, data_loader, device) -> float:
    model.eval()
    with torch.inference_mode():
        correct = torch.cat([model(image.to(device)).argmax(dim=1).cpu() == target for image, target in data_loader])
    return correct.float().mean().item()


def train(model, mixup_fn, device, epochs, size) -> nn.Module:
    transform = v2.Compose([
        v2.ToImage(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    folder = sample_dir('timm')  # or your own: train/CLASS/*.png and validation/CLASS/*.png
    data_loader = DataLoader(ImageFolder(folder / 'train', transform), batch_size=64, shuffle=True, drop_last=True)
    data_loader_test = DataLoader(ImageFolder(folder / 'validation', transform), batch_size=256)
    criterion = nn.CrossEntropyLoss()  # takes soft targets; give create_mixup the label_smoothing
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * len(data_loader))
    for _ in range(epochs):
        train_one_epoch(model, criterion, optimizer, scheduler, data_loader, device, mixup_fn)
    print(f'val accuracy {evaluate(model, data_loader_test, device):.4f}')
    return model


def main() -> nn.Module:
    torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    # Methods that mix images train any network, here by the reference's choice of mixup and CutMix.
    resnet = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).to(device)
    choice = timm_alignmix.create_mixup(
        {'mixup': 0.5, 'cutmix': 0.5}, resnet, num_classes=10, **{'mixup.alpha': 0.2, 'cutmix.alpha': 1.0})
    train(resnet, choice, device, epochs=2, size=32)
    # Methods that mix features take a timm model. timm.create_model('resnet18') is torchvision's network.
    model = timm.create_model('test_resnet', num_classes=10).to(device)
    return train(model, timm_alignmix.create_mixup('alignmix', model), device, epochs=6, size=48)


if __name__ == '__main__':
    main()
