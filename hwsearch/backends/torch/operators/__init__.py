"""ONNX operators as torch calls."""
