"""The problem of a search: metrics, objectives, limits and their feasibility."""
