"""Export: ONNX graphs and their parity with torch, the model card, the bundle."""

WITH_GRAPHS = ("qwen2_5_vl",)  # the families whose models can be written as ONNX graphs
