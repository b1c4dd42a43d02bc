"""Isaac as a model of transformers: configuration, vision tower, positions, decoder, loss."""
