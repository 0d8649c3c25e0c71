"""Search strategies by ask and tell."""
