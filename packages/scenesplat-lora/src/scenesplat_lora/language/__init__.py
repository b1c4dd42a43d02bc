"""Texts and features of one space: SigLIP 2, text embeddings, zero-shot labels."""
