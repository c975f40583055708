"""Structure of timm models, which no other part of the package knows."""
from .class_attention import ClassAttention
from .dense_head import DenseHead
from .examine import Anatomy, count_classes, dense_model_kwargs
from .layers import FeatureLayer, Layout, Patch, feature_map, output_module
from .trace import UnsupportedModel

__all__ = [
    'Anatomy', 'ClassAttention', 'DenseHead', 'FeatureLayer', 'Layout', 'Patch', 'UnsupportedModel', 'count_classes',
    'dense_model_kwargs', 'feature_map', 'output_module']
