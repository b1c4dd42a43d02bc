"""The embedded tiny base, and the generated rooms that it was pretrained on."""
