"""Pictures that explain the methods, for your own images and model.

    python -m alignmix_lab plot gallery A.jpg B.jpg                        # input mixes of a pair
    python -m alignmix_lab plot alignment A.jpg B.jpg --model RUN          # transport plan between two images
    python -m alignmix_lab plot hull IMAGES... --model RUN                 # mixed pairs and the convex hull
    python -m alignmix_lab plot attention IMAGES... --model RUN            # attention of Dense MultiMix
    python -m alignmix_lab plot morph A.jpg B.jpg --model RUN              # decoded mixes of an alignmix_ae run

RUN is anything that `evaluate.py --model` accepts: a timm model name, a folder of exported weights, a training
checkpoint or run. Each picture is also a function of a timm model and pixels (B, 3, H, W) in [0, 1] that returns a
matplotlib figure.
"""
from .alignment import alignment
from .attention import attention
from .gallery import gallery
from .hull import hull
from .images import find_images, open_autoencoder, open_network, read_images
from .morph import morph

__all__ = [
    'alignment', 'attention', 'find_images', 'gallery', 'hull', 'morph', 'open_autoencoder', 'open_network',
    'read_images']
