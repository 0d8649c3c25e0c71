"""Runtimes: ways to run ops and models on this machine, and their registry."""
