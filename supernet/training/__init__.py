"""Training of supernets and plain models: recipe, loop, checkpoints, data parallelism, distillation."""
