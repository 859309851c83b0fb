"""From a packed model to an ONNX graph that the stock onnxruntime wheel runs without torch."""
