"""The README's Python blocks run as they stand, one after the other."""

import re
from pathlib import Path

import torch
from torch import nn

import lora_core
from lora_core.injection import lora_layers

README = Path(__file__).parents[1] / "README.md"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return torch.softmax(self.q_proj(x), -1) * self.v_proj(x)


def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, several = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)

    names = {"model": Attention(), "fresh_model": Attention()}
    exec(train, names)
    assert "2 adapted modules" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert lora_layers(names["fresh_model"])["v_proj"].lora_adapters["default"].r == 16
    assert names["state"].keys() == Attention().state_dict().keys()

    lora_core.save_adapter(names["model"], "other/adapter")
    model = Attention()
    exec(several, {"lora_core": lora_core, "LoraConfig": lora_core.LoraConfig, "model": model})
    assert lora_layers(model)["q_proj"].lora_active == ["steel", "glass"]
    assert lora_layers(model)["v_proj"].lora_scales["glass"] == 0.5
