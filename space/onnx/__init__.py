"""The blocks as ONNX graphs, and their quantisation."""
