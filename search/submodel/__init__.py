"""Sub-models: export, verification, generation, fine-tuning."""
