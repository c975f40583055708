"""Parts shared by all training runs: options, the run itself, its loop, checkpoints, logs and pictures."""
