"""Code that runs on a device, here or in a kit: Python 3.8, numpy and onnxruntime only."""
