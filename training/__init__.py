"""What a training run needs around the loop: configuration, models and their placement, checkpoints, folder, progress."""
