"""The HTML report of a search and its figures."""
