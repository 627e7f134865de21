"""Answers questions from an exported bundle, with numpy, onnxruntime, tokenizers and Pillow; never imports torch.

Of the rest of VisMem it imports the decode loop and what that needs (`vismem.serving.repository.SERVED`), which lie
beside it in a Triton model repository. This file imports nothing, so that limits and prompts can be used without
onnxruntime.
"""
