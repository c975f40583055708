"""python -m timm_alignmix.evaluation.report"""
from .cli import main

main()
