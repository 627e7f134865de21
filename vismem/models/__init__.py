"""The models: backbones of vision-language families, and what VisMem adds to them."""
