"""A plain PyTorch loop: a MixTask mixes the batch, runs the model and returns the loss."""
import timm
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import timm_alignmix
from alignmix_lab.data import sample_dir

EPOCHS = 6


def main() -> torch.nn.Module:
    torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    transform = v2.Compose([
        v2.ToImage(), v2.Resize(48), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    folder = sample_dir('timm')  # or your own: train/CLASS/*.png and validation/CLASS/*.png
    train_loader = DataLoader(ImageFolder(folder / 'train', transform), batch_size=64, shuffle=True, drop_last=True)
    val_loader = DataLoader(ImageFolder(folder / 'validation', transform), batch_size=256)

    model = timm.create_model('test_resnet', num_classes=10).to(device)
    task = timm_alignmix.MixTask(model, 'densemultimix')
    optimizer = torch.optim.AdamW(task.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=EPOCHS * len(train_loader))

    for epoch in range(EPOCHS):
        task.train()
        task.mix_enabled = epoch < EPOCHS - 1  # the last epoch sees plain images
        for images, labels in train_loader:
            loss = task(images.to(device), labels.to(device))['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

        model.eval()  # evaluation and export use the model alone
        with torch.inference_mode():
            correct = torch.cat([model(images.to(device)).argmax(dim=1).cpu() == y for images, y in val_loader])
        print(f'epoch {epoch}: loss {loss.item():.3f}, val accuracy {correct.float().mean():.4f}')
    return model


if __name__ == '__main__':
    main()
