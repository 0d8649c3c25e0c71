"""The weight-sharing model: elastic weights, corpora, training, evaluation, extraction.

Importing this package does not import torch; most of its modules do.
"""
