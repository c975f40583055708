"""Head shared by the networks here, with the methods that timm expects."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype


class PooledClassifier(nn.Module):
    """Pooling, dropout and a linear classifier `fc` behind the feature map of a subclass's `forward_features`."""

    def create_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        """Build the head; `num_classes` 0 is no classifier, `global_pool` '' no pooling, `dd` device and dtype."""
        self.num_features, self.num_classes, self.drop_rate = num_features, num_classes, drop_rate
        self.global_pool, self.fc = create_classifier(num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, 0 classes for none; `global_pool` None keeps the present pooling."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.create_head(self.num_features, num_classes, global_pool, self.drop_rate, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
