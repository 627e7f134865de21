"""VisMem: latent vision memory for vision-language models (arXiv 2511.11007)."""
