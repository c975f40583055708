"""Programs around timm_alignmix: train, convert data, evaluate, draw. `python -m alignmix_lab` lists them."""
