"""Parents: trained language models of other makers, read as weights of an architecture."""

from supernet.parent.parent import Parent, parent_digest, read_parent

__all__ = ["Parent", "parent_digest", "read_parent"]
