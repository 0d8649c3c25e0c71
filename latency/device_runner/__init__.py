"""The code that runs on a device: Python 3.8, numpy and onnxruntime."""
