# ruff: noqa: C408 - dict(...) is how these files are written
# The run of a LoRA: AdamW, warm-up and one cosine, 50 epochs.
epoch = 50
batch_size = 2
num_worker = 2
mix_prob = 0.8
enable_amp = True
clip_grad = 1.0
save_path = "exp/default"

lora_training = dict(
    pretrained_path="checkpoints/pretrained.pth",
    save_lora_only=True,
    merge_before_eval=False,
    merge_on_end=False,
    eval_epoch=1,
    save_epoch=5,
)
optimizer = dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
scheduler = dict(type="cosine", warmup_epochs=10, warmup_lr=1e-5, min_lr=1e-6)
