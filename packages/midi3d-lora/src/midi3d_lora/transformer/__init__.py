"""The diffusion transformer of MIDI-3D (TripoSG with multi-instance attention), key for key."""
