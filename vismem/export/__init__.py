"""Export: ONNX graphs and their parity, the bundle, the Triton model repository."""
