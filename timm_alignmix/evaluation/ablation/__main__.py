"""python -m timm_alignmix.evaluation.ablation"""
from .cli import main

main()
