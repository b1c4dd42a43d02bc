# ruff: noqa: C408 - dict(...) is how these files are written
# LoRA of the released language model on ScanNet's scenes of Gaussians.
_base_ = ["../_base_/lora_runtime.py"]

# r=8, lora_alpha=8 on attention of all encoder stages; --options lora.preset=... for another one.
lora = dict(preset="standard")

model = dict(
    type="LangPretrainer",
    criteria=[
        dict(type="CosineSimilarity", reduction="mean", loss_weight=1.0),
        dict(type="L2Loss", reduction="mean", loss_weight=1.0),
    ],
)

data = dict(
    layout="scannet",
    point_max=192000,
    train=dict(split="train_grid1.0cm_chunk6x6_stride3x3", data_root="data/scannet_mcmc"),
    val=dict(split="val"),
)
