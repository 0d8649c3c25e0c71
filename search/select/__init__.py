"""From a front to one model: measured search, successive halving, Mix'n'Match."""
