"""A small tokenizer, a template with Qwen3's thinking block, and files of conversations."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isaac_lora.conversations.tokenizer_files import load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOKENIZER = GOLDENS / "tokenizer"

# As Qwen3's: an empty thinking block in answers behind the last question, and with the prompt if
# thinking is switched off; thoughts of earlier answers are left out.
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


@cache
def small_tokenizer(template: str | None = None) -> Any:
    """The goldens' tokenizer, with its plain ChatML template or another one."""
    tokenizer = load_tokenizer(TOKENIZER)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def record(question: str = "What is it?", answer: str = "A car.", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | more


def write_records(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(list(records)), "utf-8")
    return path


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_picture(path: Path, height: int = 23, width: int = 31, seed: int = 0) -> Path:
    Image.fromarray(noise(height, width, seed)).save(path)
    return path
