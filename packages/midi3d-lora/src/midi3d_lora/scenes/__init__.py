"""Scenes to train on: their folders, their points, what tells about them."""
