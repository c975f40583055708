#!/usr/bin/env python3
"""Evaluate trained models by a protocol of the papers: `python evaluate.py accuracy --model NAME`; see --help."""
from alignmix_lab.commands.evaluate import main

if __name__ == '__main__':
    main()
