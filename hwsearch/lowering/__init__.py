"""A traced network and an allocation -> ONNX."""
