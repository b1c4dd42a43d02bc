"""The guide's `from src.depth_isaac import IsaacForConditionalGeneration`, from this folder."""

from isaac_lora import IsaacConfig, IsaacForConditionalGeneration, IsaacProcessor

__all__ = ["IsaacConfig", "IsaacForConditionalGeneration", "IsaacProcessor"]
