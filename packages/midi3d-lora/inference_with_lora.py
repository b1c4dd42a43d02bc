"""Make a scene: `python inference_with_lora.py --lora_path LORA --rgb_image A --seg_image B`."""

from lora_core.errors import run
from midi3d_lora.predict import main

if __name__ == "__main__":
    raise SystemExit(run(main))
