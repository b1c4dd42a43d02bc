"""One thread for every test, no network, and nothing remembered between sessions."""

import sys
from pathlib import Path

from lora_core.testing import environment

environment.prepare()  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))  # for tiny_base.py
