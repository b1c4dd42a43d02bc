"""Train a LoRA of Isaac: `python src/train_lora.py --model_path ./isaac_model ...`."""

from isaac_lora.train import main

if __name__ == "__main__":
    raise SystemExit(main())
