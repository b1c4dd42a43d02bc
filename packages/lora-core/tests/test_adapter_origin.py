"""What an adapter file knows of its base and its making, and what it never holds."""

import time
import warnings

import pytest
import torch
from tiny_blocks import FORMS, PLAIN, Net, X, trained
from torch import distributed, nn

from lora_core.adapters import origin as adapter_origin
from lora_core.adapters.file import load_adapter, read_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.injection import inject, lora_layers
from lora_core.merging import merge, unmerge


def contents(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def silently(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()


@pytest.mark.fault("K31")
@pytest.mark.parametrize("form", FORMS)
def test_another_base_of_the_same_shapes_is_said(tmp_path, form):
    path = save_adapter(trained(PLAIN), tmp_path / form)
    silently(lambda: load_adapter(Net(), path))
    silently(lambda: load_adapter(Net().bfloat16(), path))  # the same base in another precision
    silently(lambda: load_adapter(Net().double(), path))
    silently(lambda: load_adapter(Net().half(), path))
    other = Net()
    with torch.no_grad():
        other.blocks[1]["proj"].weight.mul_(1.05)
    with pytest.warns(UserWarning, match=f"{form} was trained on another base"):
        load_adapter(other, path)


@pytest.mark.fault("K31")
def test_the_base_under_a_merged_or_second_adapter_is_the_same_base(tmp_path):
    model = trained(PLAIN)
    before = read_adapter(save_adapter(model, tmp_path / "before")).extra["base"]
    merge(model)
    assert read_adapter(save_adapter(model, tmp_path / "merged")).extra["base"] == before
    unmerge(model)
    silently(lambda: load_adapter(model, tmp_path / "merged", "second"))
    merge(model, keep=False)
    assert read_adapter(save_adapter(model, tmp_path / "gone")).extra["base"] is None


@pytest.mark.fault("K31")
def test_telling_bases_apart_costs_little():
    """A few values of each weight: a model of 10^8 parameters takes milliseconds."""
    large = {str(i): nn.utils.skip_init(nn.Linear, 5000, 5000) for i in range(4)}
    inject(model := nn.ModuleDict(large), LoraConfig(["re:.*"], r=1))
    specs = {live: layer.lora_adapters["default"] for live, layer in lora_layers(model).items()}
    start = time.process_time()
    assert adapter_origin.base_print(model, specs, {live: live for live in specs})
    assert time.process_time() - start < 0.5


@pytest.mark.fault("K33")
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_saved_before_the_first_step_is_the_base(tmp_path, form):
    model = Net()
    inject(model, PLAIN)
    path = save_adapter(model, tmp_path / form)
    loaded = Net()
    load_adapter(loaded, path)
    for i in range(2):
        for name in ("qkv", "proj"):
            assert torch.equal(loaded.blocks[i][name](X), Net().blocks[i][name](X))


@pytest.mark.fault("K59", "K34")
@pytest.mark.parametrize("form", FORMS)
def test_ranks_and_alphas_of_single_layers_come_back(tmp_path, form):
    config = LoraConfig(
        ["qkv", "proj"],
        r=3,
        lora_alpha=6,
        rank_pattern={r"blocks\.0\.qkv": 5, r"1\.proj": 1},
        alpha_pattern={"qkv": 2.5},
    )
    model = trained(config)
    path = save_adapter(model, tmp_path / form)
    loaded = Net()
    load_adapter(loaded, path)
    expected = {"0.qkv": (5, 2.5), "0.proj": (3, 6), "1.qkv": (3, 2.5), "1.proj": (1, 6)}
    for key, layer in lora_layers(loaded).items():
        spec = layer.lora_adapters["default"]
        assert (spec.r, spec.alpha) == expected[key.removeprefix("blocks.")]
    again = save_adapter(loaded, tmp_path / "again" / form)
    assert contents(again) == contents(path)


@pytest.mark.fault("K35")
def test_wrappers_of_training_leave_no_trace_in_the_file(tmp_path):
    model = trained(PLAIN)
    expected = {form: contents(save_adapter(model, tmp_path / "plain" / form)) for form in FORMS}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = {
            "ddp": nn.parallel.DistributedDataParallel(model),
            "compiled": torch.compile(model, backend="eager"),
        }
        for name, outer in wrapped.items():
            for form in FORMS:
                path = save_adapter(outer, tmp_path / name / form)
                assert contents(path) == expected[form]
                silently(lambda path=path, outer=outer: load_adapter(outer, path))
    finally:
        distributed.destroy_process_group()


@pytest.mark.fault("K53", "H29", "H30")
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_says_what_made_it(tmp_path, form):
    facts = {
        "settings": {"learning_rate": 1e-3, "hub_token": "hf_secret", "name": "<script>```"},
        "data": "0123",
        "commit": adapter_origin.commit(),
    }
    path = save_adapter(trained(PLAIN), tmp_path / form, metadata=facts)
    file = read_adapter(path)
    made = file.extra["made"]
    assert made["torch"] == torch.__version__
    assert {"python", "lora-core", "safetensors", "numpy"} <= made.keys()
    assert file.metadata["settings"]["learning_rate"] == 1e-3
    assert file.metadata["data"] == "0123"
    for content in contents(path).values():
        assert b"hf_secret" not in content
    if form == "adapter":
        card = (path / "README.md").read_text()
        for part in ("Rank 3", "4 layers", '"learning_rate": 0.001', torch.__version__, "0123"):
            assert part in card
        assert "<script>" not in card
        assert card.count("```") == 4


@pytest.mark.fault("K53", "H27")
def test_the_commit_is_read_without_running_git(tmp_path):
    repository = tmp_path / "repository"
    (repository / ".git" / "refs" / "heads").mkdir(parents=True)
    deep = repository / "a" / "b"
    deep.mkdir(parents=True)
    head, branch = repository / ".git" / "HEAD", repository / ".git" / "refs" / "heads" / "main"
    (repository / ".git" / "config").write_text("[core]\n\tfsmonitor = touch canary\n")
    head.write_text("ref: refs/heads/main\n")
    assert adapter_origin.commit(deep) is None
    branch.write_text(f"{'a' * 40}\n")
    assert adapter_origin.commit(deep) == "a" * 40
    branch.unlink()
    packed = repository / ".git" / "packed-refs"
    packed.write_text(f"# pack-refs\n{'b' * 40} refs/heads/main2\n{'c' * 40} refs/heads/main\n")
    assert adapter_origin.commit(repository) == "c" * 40
    head.write_text("d" * 40)
    assert adapter_origin.commit(deep) == "d" * 40
    for nonsense in ("ref: refs/../../../etc/passwd", "ref: /etc/passwd", "x", ""):
        head.write_text(nonsense)
        assert adapter_origin.commit(deep) is None
    assert not (repository / "canary").exists()
