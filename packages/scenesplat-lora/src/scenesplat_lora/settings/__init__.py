"""Configuration files in Python's syntax, parsed and never run, and their options."""
