"""Training: the recipe, the loop, checkpoints, data parallelism, distillation."""
