"""Adapter files: PEFT directories and single files, written whole, read without trust."""
