"""The tiny VLM of assets/: `python -m recipes.tiny_vlm --seed N --out DIR` trains it."""
