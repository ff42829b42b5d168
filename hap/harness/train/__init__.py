"""The one training loop, its steps, schedule, averages and checkpoints."""
