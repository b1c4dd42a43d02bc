"""Parts of `tools/pretrain_sam3_demo_base.py`."""
