"""Parts of `tools/pretrain_isaac_demo_base.py`."""
