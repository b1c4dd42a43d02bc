# ruff: noqa: C408 - dict(...) is how these files are written
# LoRA of a released model on your own scenes: data/train/<scene>/*.npy, data/val/<scene>/*.npy
_base_ = ["../_base_/lora_runtime.py"]

lora = dict(preset="standard")

data = dict(
    layout="generic",
    train=dict(split="train", data_root="data"),
    val=dict(split="val"),
    # text_embeddings="texts.npz",  # of the classes in segment.npy: the mIoU is measured
    # num_classes=7,  # a segmentation model with these classes instead: segment.npy is learned
)
