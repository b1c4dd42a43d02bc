"""The embedded tiny base: a SAM 2 for pictures with 1.6 million parameters (see MODEL_CARD.md)."""
