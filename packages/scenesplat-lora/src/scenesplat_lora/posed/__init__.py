"""Language features of Gaussians from posed images with masks."""
