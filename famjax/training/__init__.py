"""Training: loss, optimizer, train state, step, checkpoints, metrics, and the loop over them."""
