"""Hugging Face's Trainer with a timm model: attach() mixes in the model's forward and gives the Trainer its loss."""
import tempfile

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import timm_alignmix
from alignmix_lab.data import sample_dir


class KeepDraws(TrainerCallback):
    """Keep the step of the draws in the Trainer's checkpoints, so that a resumed run draws what is next."""

    def __init__(self, attached) -> None:
        self.attached = attached

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if 'draws' in state.stateful_callbacks:
            self.attached.load_state_dict(state.stateful_callbacks['draws'])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        state.stateful_callbacks['draws'] = self.attached.state_dict()


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return dict(pixel_values=torch.stack(images), labels=torch.tensor(labels))


def accuracy(result) -> dict[str, float]:
    return dict(accuracy=(result.predictions.argmax(axis=1) == result.label_ids).mean().item())


def build_trainer(mix: str, **arguments) -> Trainer:
    transform = v2.Compose([
        v2.ToImage(), v2.Resize(48), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    folder = sample_dir('timm')  # or your own: train/CLASS/*.png and validation/CLASS/*.png
    # From the hub: TimmWrapperForImageClassification.from_pretrained('timm/resnet50.a1_in1k', num_labels=10)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture='test_resnet', num_labels=10))
    attached = timm_alignmix.attach(model.timm_model, mix)
    return Trainer(
        model,
        TrainingArguments(
            num_train_epochs=6, per_device_train_batch_size=64, per_device_eval_batch_size=256, learning_rate=4e-3,
            warmup_steps=30, remove_unused_columns=False, report_to='none', disable_tqdm=True, **arguments),
        data_collator=collate, train_dataset=ImageFolder(folder / 'train', transform),
        eval_dataset=ImageFolder(folder / 'validation', transform), compute_loss_func=attached.loss,
        compute_metrics=accuracy, callbacks=[KeepDraws(attached)])


def main() -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer('densemultimix', output_dir=folder, save_strategy='no')
        trainer.train()
        print(f'val accuracy {trainer.evaluate()["eval_accuracy"]:.4f}')
    return trainer.model.timm_model


if __name__ == '__main__':
    main()
