"""Export: ONNX graphs and their parity with torch, the model card, the bundle."""
