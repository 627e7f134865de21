"""Answers questions from an exported bundle, with numpy, onnxruntime, tokenizers and Pillow; never imports torch.

The package imports nothing else of VisMem: it is copied into the Triton model repository as it is. This file imports
nothing, so that limits and prompts can be used without onnxruntime.
"""
