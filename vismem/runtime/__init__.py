"""What questions and bundles are made of where there is no torch: images, prompts, limits, a bundle's graphs.

This file imports nothing, so that limits and prompts can be used without onnxruntime.
"""
