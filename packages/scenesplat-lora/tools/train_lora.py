"""Train a LoRA of SceneSplat: `python tools/train_lora.py --config-file X.py --options a.b=c`."""

from scenesplat_lora.train import main

if __name__ == "__main__":
    raise SystemExit(main())
