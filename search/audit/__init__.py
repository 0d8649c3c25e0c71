"""The audit of a supernet's ranking."""
