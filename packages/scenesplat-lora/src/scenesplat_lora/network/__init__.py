"""Point Transformer V3 key for key, and its checkpoints."""
