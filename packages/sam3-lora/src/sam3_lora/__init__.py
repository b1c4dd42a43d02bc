"""LoRA fine-tuning of SAM 3: train on phrases, evaluate, predict, merge to official files."""

__version__ = "0.1.0"
