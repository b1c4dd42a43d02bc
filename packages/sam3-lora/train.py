"""Train a LoRA of SAM 3: `python train.py --config src/configs/lora_config_example.yaml`."""

from sam3_lora.train import main

if __name__ == "__main__":
    raise SystemExit(main())
