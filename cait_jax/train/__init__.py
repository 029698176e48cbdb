"""Training: losses, optimizer, state, step, checkpoints, reports and the loop."""
