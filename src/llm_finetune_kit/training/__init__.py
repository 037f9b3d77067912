"""The training step, loop, optimizer, schedule and checkpoints."""
