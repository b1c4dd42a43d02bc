"""The embedded tiny base, and the generated scenes that it was pretrained on."""
