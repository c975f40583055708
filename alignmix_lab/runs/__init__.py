"""What every kind of training run has: options, the run itself, its loop, checkpoints, logs and pictures."""
