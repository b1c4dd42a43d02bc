"""Meshes: read, sampled, rendered, taken from fields, written."""
