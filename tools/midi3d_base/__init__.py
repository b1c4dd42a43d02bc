"""Parts of `tools/pretrain_midi3d_demo_base.py`."""
