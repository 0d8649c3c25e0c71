"""Hugging Face: reading a Llama, and writing a sub-model as a folder that transformers loads."""
