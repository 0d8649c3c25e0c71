"""Latency and memory prediction from measured ops and models."""
