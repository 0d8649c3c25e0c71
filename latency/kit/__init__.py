"""Kits: measuring a device that has neither torch nor formfit."""
