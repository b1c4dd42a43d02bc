"""Scenes of Gaussians: files, values, voxels, chunks, batches."""
