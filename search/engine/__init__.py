"""The search engine: evaluation, the record, the front."""
