#!/usr/bin/env python3
"""Train a timm model with a mixing method: `accelerate launch train_imagenet.py --mix densemultimix`; see --help."""
from alignmix_lab.commands.train import main

if __name__ == '__main__':
    main()
