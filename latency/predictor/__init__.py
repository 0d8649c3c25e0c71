"""Predicting the latency and memory of any architecture from measured ops and a few measured models."""
