"""Train a LoRA of MIDI-3D: `python train_lora.py --config configs/train/lora_finetune.yaml`."""

from midi3d_lora.train import main

if __name__ == "__main__":
    raise SystemExit(main())
