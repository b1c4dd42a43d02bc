"""Train a LoRA of SAM 2: `python3 train_lora_sam2_full_dataset.py --steps 10000 --lora_rank 8`."""

import sys

from sam2_lora.train import main

if __name__ == "__main__":
    sys.exit(main())
