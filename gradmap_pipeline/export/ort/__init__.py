"""Models as ONNX graphs with a cache, and running them with ONNX Runtime."""
