"""Runtimes: what builds and runs ops and models on this machine."""
