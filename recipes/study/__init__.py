"""The evidence: VisMem, its ablations and its baselines with several seeds, and transfer to tasks not trained on."""
