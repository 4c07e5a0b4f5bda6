"""TensorRT: strongly typed engines from ONNX, on NVIDIA GPUs, and for them on machines without one."""
