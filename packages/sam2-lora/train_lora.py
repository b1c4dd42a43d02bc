"""Train a LoRA of SAM 2: `python train_lora.py --data_root pictures --checkpoint sam2.pt`."""

import sys

from sam2_lora.train import main

if __name__ == "__main__":
    sys.exit(main())
