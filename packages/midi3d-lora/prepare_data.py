"""Turn meshes into scenes to train on: `python prepare_data.py --input_dir raw --output_dir data`.

The same as `midi3d-lora prepare`.
"""

import sys

from lora_core.errors import run
from midi3d_lora.prepare import main

if __name__ == "__main__":
    sys.exit(run(main))
