"""The search engine: evaluators, the record of evaluations, the front."""
