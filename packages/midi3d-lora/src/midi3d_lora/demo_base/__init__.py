"""The embedded default: generated scenes of analytic solids, and the tiny MIDI-3D made for them."""
