"""What is searched for: objectives, limits, and whether they can be met."""
