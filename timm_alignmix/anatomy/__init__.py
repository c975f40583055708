"""Structure of timm models, which no other part of the package knows."""
from .dense_head import DenseHead
from .examine import Anatomy, count_classes, dense_model_kwargs
from .layers import FeatureLayer, Layout, feature_map, output_module
from .trace import UnsupportedModel

__all__ = [
    'Anatomy', 'DenseHead', 'FeatureLayer', 'Layout', 'UnsupportedModel', 'count_classes', 'dense_model_kwargs',
    'feature_map', 'output_module']
