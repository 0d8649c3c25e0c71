"""Attention as torch functions: linear recurrences, softmax, convolution, decays."""
