# ruff: noqa: C408 - dict(...) is how these files are written
# LoRA of the released language model on your own scenes: data/train/<scene>/*.npy, data/val/...
_base_ = ["../_base_/lora_runtime.py"]

lora = dict(preset="standard")

model = dict(type="LangPretrainer")

data = dict(
    layout="generic",
    train=dict(split="train", data_root="data"),
    val=dict(split="val"),
    # text_embeddings="texts.npz",  # of the classes in segment.npy: the mIoU is measured
)
