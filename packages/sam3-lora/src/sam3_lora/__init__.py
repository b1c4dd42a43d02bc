"""LoRA fine-tuning of SAM 3: train on phrases, evaluate, predict, merge to an official checkpoint."""

__version__ = "0.1.0"
