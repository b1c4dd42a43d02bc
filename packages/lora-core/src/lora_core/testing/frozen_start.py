"""What a model package promises of adapters in the last blocks alone, as a test that all share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.injection import lora_layers, trainable_parameters
from lora_core.memory import saved_bytes
from lora_core.testing.contract import Case, peft_computes_the_same

WEIGHTS = slice(1, None)  # of what a backward operation may compute: first the input's gradient


def nothing_is_kept_before_the_last_blocks(
    last: Case, every: Case, blocks: Sequence[str], count: int, folder: Path
) -> None:
    """Adapters only in the last `count` blocks, no graph and nothing kept before them, a step that
    trains them and computes no gradient of a frozen weight, and a folder that PEFT loads.

    Args:
        last, every: the same model with LoRA in its last blocks, and in all of them.
        blocks: their paths in the order in which they run.
    """
    model = last.adapted().train()
    first, rest = blocks[: len(blocks) - count], blocks[len(blocks) - count :]
    layers = list(lora_layers(model))
    assert not [path for path in layers if _inside(path, first)], "adapters before the last blocks"
    for block in rest:
        assert any(_inside(path, [block]) for path in layers), f"no adapter in {block}"

    kept, y, graph = _forward(last, model, blocks)
    assert not any(graph[block] for block in first), "a graph before the last blocks"
    assert all(graph[block] for block in rest), "no gradient reaches the adapters"
    whole, _, _ = _forward(every, every.adapted().train(), blocks)
    assert 0 < kept < whole, f"{kept} bytes are kept, {whole} with adapters in all blocks"

    before = [parameter.detach().clone() for parameter in trainable_parameters(model)]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    asked = weight_gradients((y * direction.to(y)).sum())
    assert not asked, f"gradients of frozen weights: {asked[:3]}"
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    torch.optim.SGD(trainable_parameters(model), lr=1e-2).step()
    moved = zip(before, trainable_parameters(model), strict=True)
    assert any(not torch.equal(old, new) for old, new in moved), "nothing was trained"

    peft_computes_the_same(last, folder)


def weight_gradients(loss: Tensor) -> list[str]:
    """Names of operations of the backward pass that compute a norm's or a convolution's weight
    gradient."""
    with _Masks() as masks:
        loss.backward()
    return masks.found


class _Masks(TorchDispatchMode):
    """Notes which of norms and convolutions compute more than the gradient of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        if any(given.get("output_mask", ())[WEIGHTS]):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _forward(
    case: Case, model: nn.Module, blocks: Sequence[str]
) -> tuple[int, Tensor, dict[str, bool]]:
    """Bytes that a pass keeps, its output, and of each block whether any of its modules gives what
    has a graph; a model may run a block's parts without calling the block."""
    graph: dict[str, bool] = {}

    def note(block: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            graph[block] = any(t.requires_grad for t in _tensors(output)) or graph.get(block, False)

        return hook

    hooks = [
        part.register_forward_hook(note(path))
        for path in blocks
        for part in model.get_submodule(path).modules()
    ]
    try:
        kept, y = saved_bytes(lambda: case.run(model), [*model.parameters(), *model.buffers()])
    finally:
        for hook in hooks:
            hook.remove()
    assert set(graph) == set(blocks), "a block was not run"
    return kept, y, graph


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _inside(path: str, tops: Sequence[str]) -> bool:
    return any(path.startswith(f"{top}.") for top in tops)
