"""The network as we run it: any size, each part once, no graph too many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Sam3Config

from lora_core.testing import load_golden
from sam3_lora import network, placement, positions, vision
from sam3_lora.config import COMPONENTS, Config, Lora, Training
from sam3_lora.outputs import Detections, Outputs

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def tiny() -> Any:
    """The network of the golden cases, frozen."""
    golden = load_golden(GOLDENS / "transformers_model")
    model = network.build_network(Sam3Config(**golden.config["sam3_config"]), "meta")
    model.load_state_dict(golden.weights, assign=True)
    return model.requires_grad_(False)


def batch_of(images: list[int], texts: list[int], count: int = 2) -> dict[str, Any]:
    """Queries about `count` images and the two golden phrases."""
    io = load_golden(GOLDENS / "official_model").io
    return {
        "pixel_values": io["pixel_values"][:count],
        "input_ids": io["input_ids"],
        "attention_mask": io["language_mask"].long(),
        "image_ids": torch.tensor(images),
        "text_ids": torch.tensor(texts),
    }


def run(model: Any, batch: dict[str, Any], **options: bool) -> Outputs:
    return network.forward(model, batch, **{"masks": True, "one_to_many": False, **options})


def adapted(model: Any, *modules: str, dropout: float = 0.0) -> Any:
    """With adapters, whose B is not 0, on the modules named, or on every role."""
    lora = Lora(
        rank=2,
        dropout=dropout,
        target_modules=list(modules) or ["all"],
        **{f"apply_to_{name}": True for name in COMPONENTS},  # type: ignore[arg-type]
    )
    placement.adapt(model, Config(lora=lora, training=Training(enable_segmentation=True)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return model.train()


def drawn(layer: Detections) -> Tensor | None:
    return None if layer.masks is None else layer.masks.all()


def objective(out: Outputs) -> Tensor:
    """A scalar that depends on everything that is there."""
    layers = [*out.one_to_one, *out.one_to_many]
    parts = [part for layer in layers for part in (layer.logits, layer.boxes, drawn(layer))]
    found = [part for part in (*parts, *out.presence, out.semantic) if part is not None]
    return sum((part.square().mean() for part in found), start=torch.zeros(()))


# -- image sizes ---------------------------------------------------------------------------------


WIDTH, HEADS, WINDOW, PATCH = 16, 2, 24, 14


@pytest.fixture(scope="module")
def narrow() -> Any:
    """Window, patch and position grid of the published model; every second block is global."""
    golden = load_golden(GOLDENS / "transformers_model").config["sam3_config"]
    backbone = {
        **golden["vision_config"]["backbone_config"],
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 24,
        "image_size": 1008,
        "pretrain_image_size": 336,
        "window_size": WINDOW,
        "global_attn_indexes": [1, 3],
    }
    torch.manual_seed(0)
    vision_config = {**golden["vision_config"], "backbone_config": backbone}
    model = network.build_network(Sam3Config(**{**golden, "vision_config": vision_config}))
    for parameter in model.vision_encoder.parameters():  # biases too: padding shows them
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def rotated(x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Channels (2 i, 2 i + 1) of [L, d] turned by x f_j, then by y f_j."""
    d = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(d // 2):
        j = i % (d // 4)
        angle = (columns if i < d // 4 else rows) * 10000 ** (-4 * j / d)
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[:, 2 * i], x[:, 2 * i + 1]
        out[:, 2 * i], out[:, 2 * i + 1] = even * cos - odd * sin, even * sin + odd * cos
    return out


def plain_attention(module: Any, x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Softmax attention over all of x [L, C], head after head."""
    heads = []
    for q, k, v in zip(
        *(p(x).chunk(HEADS, -1) for p in (module.q_proj, module.k_proj, module.v_proj)), strict=True
    ):
        q, k = rotated(q, columns, rows), rotated(k, columns, rows)
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return module.o_proj(torch.cat(heads, -1))


def counting(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column and row of every cell, row after row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return x.flatten().double(), y.flatten().double()


def trunk_by_the_formulas(vit: Any, image: Tensor) -> Tensor:
    """Image [3, H, W] -> [h, w, C], window after window, with the padding written out."""
    stem = vit.embeddings.patch_embeddings.projection
    grid = torch.nn.functional.conv2d(image[None], stem.weight, stride=PATCH)[0].permute(1, 2, 0)
    h, w = grid.shape[:2]
    side = 336 // PATCH
    known = vit.embeddings.position_embeddings[0].reshape(side, side, -1)
    x = vit.layer_norm(grid + known.repeat(h // side + 1, w // side + 1, 1)[:h, :w])
    for layer in vit.layers:
        y = layer.layer_norm1(x)
        if layer.window_size == 0:
            columns, rows = counting(h, w)
            flat = y.reshape(h * w, -1)
            y = plain_attention(layer.attention, flat, columns * WINDOW / w, rows * WINDOW / h)
            x = x + y.reshape(h, w, -1)
        else:
            full = y.new_zeros(-(-h // WINDOW) * WINDOW, -(-w // WINDOW) * WINDOW, y.shape[-1])
            full[:h, :w] = y
            for top in range(0, len(full), WINDOW):
                for left in range(0, full.shape[1], WINDOW):
                    part = full[top : top + WINDOW, left : left + WINDOW]
                    seen = plain_attention(
                        layer.attention, part.reshape(WINDOW**2, -1), *counting(WINDOW, WINDOW)
                    )
                    part.copy_(seen.reshape(part.shape))
            x = x + full[:h, :w]
        y = layer.layer_norm2(x)
        x = x + layer.mlp.fc2(torch.nn.functional.gelu(layer.mlp.fc1(y)))
    return x


@pytest.mark.parametrize(
    ("height", "width"),
    [(84, 84), (336, 336), (336, 672), (392, 532), (504, 504), (1008, 1008), (84, 14)],
)
def test_any_size_of_whole_patches_follows_the_formulas(
    narrow: Any, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(height + width)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    model = narrow.double()
    found = vision.encode_trunk(model, images)
    expected = trunk_by_the_formulas(model.vision_encoder.backbone, images[1])
    assert found.shape == (2, height // PATCH, width // PATCH, WIDTH)
    # The rotary tables are float32, whatever the rest.
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (24, 24), (36, 36), (72, 72), (48, 72)])
def test_rotary_tables_of_published_sizes(rows: int, columns: int) -> None:
    config = Sam3Config().vision_config.backbone_config
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "axial"}
    window, grid = vision.rotary_tables(config, rows, columns, torch.device("cpu"))
    for table, (h, w) in ((window, (24, 24)), (grid, (rows, columns))):
        x, y = counting(h, w)
        f = 10000 ** (-4 * torch.arange(16, dtype=torch.float64) / 64)
        angle = torch.cat([x[:, None] * 24 / w * f, y[:, None] * 24 / h * f], 1)
        expected = torch.complex(angle.cos(), angle.sin())
        assert table.dtype == torch.complex64
        torch.testing.assert_close(table.to(torch.complex128), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cells", [6, 36, 72, 288])
def test_position_maps(cells: int) -> None:
    code = positions.position_map(cells, cells + 1, 256, torch.device("cpu")).double()
    k = torch.arange(128)
    wavelength = 10000.0 ** (2 * (k // 2) / 128)
    for place, size, part in ((cells - 1, cells, code[cells - 1, 0, :128]),
                              (3, cells + 1, code[0, 3, 128:])):  # fmt: skip
        angle = 2 * torch.pi * (place + 1) / (size + 1e-6) / wavelength.double()
        expected = torch.where(k % 2 == 0, angle.sin(), angle.cos())
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_the_whole_network_takes_a_rectangle(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])
    batch["pixel_values"] = torch.randn(2, 3, 112, 70)
    out = run(tiny, batch)
    assert out.one_to_one[0].masks is not None
    masks = out.one_to_one[0].masks.all()
    assert masks.shape == (2, 10, 32, 20)
    assert torch.isfinite(masks).all()


def test_a_broken_patch_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"\(84, 90\).*multiples of 14"):
        network.encode_images(tiny, torch.zeros(1, 3, 84, 90))


def test_buffers_without_a_checkpoint_have_their_values_on_meta_too() -> None:
    settings = load_golden(GOLDENS / "transformers_model").config["sam3_config"]
    real = dict(network.build_network(Sam3Config(**settings)).named_buffers())
    built = dict(network.build_network(Sam3Config(**settings), "meta").named_buffers())
    assert built.keys() == real.keys()
    assert all(torch.equal(built[name], buffer) for name, buffer in real.items())


# -- each thing once -----------------------------------------------------------------------------


def rows_seen(module: nn.Module, action: Callable[[], Any]) -> list[int]:
    """Batch sizes with which a module is called."""
    seen: list[int] = []
    handle = module.register_forward_hook(lambda m, inputs, output: seen.append(len(inputs[0])))
    action()
    handle.remove()
    return seen


def test_images_and_phrases_are_encoded_once(tiny: Any) -> None:
    batch = batch_of([0, 0, 1, 1, 1], [0, 1, 0, 1, 1])
    for module, rows in (
        (tiny.vision_encoder.backbone.layers[1].attention.q_proj, [2]),
        (tiny.text_encoder.text_model.encoder.layers[0].mlp.fc1, [2]),
        (tiny.geometry_encoder.layers[0].cross_attn.k_proj, [2]),
        (tiny.detr_encoder.layers[0].self_attn.q_proj, [2]),
        (tiny.detr_encoder.layers[0].cross_attn.q_proj, [5]),
        (tiny.detr_encoder.layers[1].self_attn.q_proj, [5]),
        (tiny.vision_encoder.neck.fpn_layers[3].proj1, []),
    ):
        assert rows_seen(module, lambda: run(tiny, batch)) == rows


def test_finer_maps_are_left_out_without_masks(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])
    for level in (0, 1):
        module = tiny.vision_encoder.neck.fpn_layers[level].proj1
        assert rows_seen(module, lambda: run(tiny, batch, masks=False)) == []
    out, whole = run(tiny, batch, masks=False), run(tiny, batch)
    assert out.semantic is None
    assert out.one_to_one[0].masks is None
    assert torch.equal(out.one_to_one[0].boxes, whole.one_to_one[0].boxes)


def test_masks_need_the_finer_maps(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])
    features = network.encode_images(tiny, batch["pixel_values"], masks=False)
    text = network.encode_text(tiny, batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="masks=True"):
        network.detect(tiny, features, text, batch, masks=True)
    out = network.detect(tiny, features, text, batch, masks=False)
    expected = run(tiny, batch, masks=False)
    assert torch.equal(out.one_to_one[0].logits, expected.one_to_one[0].logits)


def test_the_text_encoder_stops_at_the_longest_phrase(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])  # 4 and 5 tokens of 32
    text = network.encode_text(tiny, batch["input_ids"], batch["attention_mask"])
    assert text.shape == (2, 32, 32)
    assert not text[:, 5:].any()
    full = network.encode_text(tiny, batch["input_ids"], torch.ones(2, 32, dtype=torch.long))
    torch.testing.assert_close(text[:, :4], full[:, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "texts", "count"),
    [([0, 1], [1, 0], 2), ([0, 0, 0], [0, 1, 0], 1), ([1, 0], [0, 1], 2)],
)
def test_a_query_gets_the_same_in_any_company(
    tiny: Any, images: list[int], texts: list[int], count: int
) -> None:
    together = run(tiny, batch_of(images, texts, count))
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = batch_of([0], [0])
        alone["pixel_values"] = alone["pixel_values"][[image]]
        alone["input_ids"] = alone["input_ids"][[text]]
        alone["attention_mask"] = alone["attention_mask"][[text]]
        one, many = run(tiny, alone).one_to_one[0], together.one_to_one[0]
        for name in ("logits", "boxes", "masks"):
            found, expected = getattr(many, name)[row], getattr(one, name)[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_boxes_mean_nothing(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])
    with_box = {
        "exemplars": torch.tensor([[[0.5, 0.4, 0.3, 0.2]], [[0.2, 0.6, 0.2, 0.3]]]),
        "exemplar_labels": torch.tensor([[1], [-10]]),
    }
    plain, one = run(tiny, batch), run(tiny, {**batch, **with_box})
    noise = torch.full((2, 2, 4), torch.nan)
    noise[:, :1] = with_box["exemplars"]
    labels = torch.tensor([[1, -10], [-10, -10]])
    padded = run(tiny, {**batch, "exemplars": noise, "exemplar_labels": labels})
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(padded.one_to_one[0].logits, one.one_to_one[0].logits, **close)
    torch.testing.assert_close(one.one_to_one[0].logits[1], plain.one_to_one[0].logits[1], **close)
    assert (one.one_to_one[0].logits[0] - plain.one_to_one[0].logits[0]).abs().max() > 1e-3


def test_kept_text_features_replace_the_text_encoder(tiny: Any) -> None:
    batch = batch_of([0, 1], [1, 0])
    expected = run(tiny, batch)
    text = network.encode_text(tiny, batch.pop("input_ids"), batch["attention_mask"])
    before = sum(p.numel() for p in tiny.parameters())
    network.drop_text_encoder(tiny)
    assert sum(p.numel() for p in tiny.parameters()) < before
    found = run(tiny, {**batch, "text_features": text})
    assert torch.equal(found.one_to_one[0].logits, expected.one_to_one[0].logits)


# -- training ------------------------------------------------------------------------------------


def test_one_to_many_is_for_training_and_changes_nothing_else(tiny: Any) -> None:
    for module in tiny.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = batch_of([0, 1], [0, 1])
    assert run(tiny, batch, one_to_many=True).one_to_many == []
    last = run(tiny, batch)
    tiny.train()
    plain, both = run(tiny, batch), run(tiny, batch, one_to_many=True)
    assert (len(plain.one_to_one), len(plain.presence), plain.one_to_many) == (3, 3, [])
    assert (len(both.one_to_one), len(both.one_to_many)) == (3, 3)
    assert torch.equal(plain.one_to_one[-1].boxes, last.one_to_one[0].boxes)
    for one, two in zip(plain.one_to_one, both.one_to_one, strict=True):
        torch.testing.assert_close(one.boxes, two.boxes, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-5)
    # The second half starts from the same queries, but does not see the others.
    assert (both.one_to_one[0].boxes - both.one_to_many[0].boxes).abs().max() > 1e-4


def gradients(model: Any, seed: int, batch: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Of every trainable parameter, and the bytes that the forward pass kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(seed)
    model.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = objective(run(model, batch, one_to_many=True))
    total.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return grads, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_changes_memory_and_no_gradient(tiny: Any, full: bool) -> None:
    """With the dropout of the network and of the adapters; of adapters and of the base itself."""
    model = tiny.train().requires_grad_(True) if full else adapted(tiny, dropout=0.1)
    batch = batch_of([0, 0, 1], [0, 1, 1])
    batch["exemplars"] = torch.tensor([[[0.5, 0.4, 0.3, 0.2]]]).expand(3, 1, 4)
    batch["exemplar_labels"] = torch.tensor([[1], [0], [-10]])
    expected, much = gradients(model, 3, batch)
    network.set_gradient_checkpointing(model)
    found, little = gradients(model, 3, batch)
    assert len(found) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert little < 0.5 * much
    network.set_gradient_checkpointing(model, enabled=False)
    assert gradients(model, 3, batch)[1] == much


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_before_the_first_adapter_have_no_graph(tiny: Any, checkpointing: bool) -> None:
    model = adapted(tiny, "vision_encoder.backbone.layers.2.**")
    network.set_gradient_checkpointing(model, checkpointing)
    entered: list[tuple[int, bool]] = []  # block, whether its input carries a graph
    for k, layer in enumerate(model.vision_encoder.backbone.layers):
        layer.layer_norm1.register_forward_hook(
            lambda module, inputs, output, k=k: entered.append((k, inputs[0].requires_grad))
        )
    loss = objective(run(model, batch_of([0, 1], [0, 1])))
    assert entered == [(0, False), (1, False), (2, False), (3, True)]
    loss.backward()
    assert sorted(k for k, _ in entered[4:]) == ([2, 3] if checkpointing else [])


@pytest.mark.parametrize("first", [1, 3])
def test_nothing_is_kept_before_the_first_adapted_block(tiny: Any, first: int) -> None:
    last = [f"vision_encoder.backbone.layers.{k}.**" for k in range(first, 4)]
    model = adapted(tiny, *last, dropout=0.1)
    block, kept = [-1], []  # where the forward pass is; where each tensor was kept
    for k, layer in enumerate(model.vision_encoder.backbone.layers):
        layer.layer_norm1.register_forward_pre_hook(lambda *_, k=k: block.__setitem__(0, k))

    def pack(tensor: Tensor) -> Tensor:
        kept.append(block[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, batch_of([0, 1], [0, 1]))
    assert kept
    assert min(kept) == first


def test_an_earlier_adapter_costs_memory_and_a_later_one_does_not(tiny: Any) -> None:
    def kept(model: Any) -> int:
        return gradients(model, 0, batch_of([0, 1], [0, 1]))[1]

    late = kept(adapted(tiny, "vision_encoder.backbone.layers.3.mlp.fc2"))
    golden = load_golden(GOLDENS / "transformers_model")
    other = network.build_network(Sam3Config(**golden.config["sam3_config"]), "meta")
    other.load_state_dict(golden.weights, assign=True)
    early = kept(adapted(other, "vision_encoder.backbone.layers.0.mlp.fc2"))
    blocks = 3 * 2 * 36 * 32 * 4  # bytes of one [2, 36, 32] in each of three blocks
    assert early - late > 5 * blocks


def test_boxes_and_scores_stay_in_float32_under_autocast(tiny: Any) -> None:
    batch = batch_of([0, 1], [0, 1])
    batch["exemplars"] = torch.tensor([[[0.5, 0.4, 0.3, 0.2]]]).expand(2, 1, 4)
    batch["exemplar_labels"] = torch.ones(2, 1, dtype=torch.long)
    model = adapted(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, batch, one_to_many=True)
    for layer in (*out.one_to_one, *out.one_to_many):
        assert layer.boxes.dtype == layer.logits.dtype == torch.float32
        assert torch.isfinite(layer.boxes).all()
        # Finer than bfloat16 could be.
        assert (layer.boxes != layer.boxes.bfloat16().float()).any()
    assert all(p.dtype == torch.float32 for p in out.presence)
    objective(out).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_masks_of_some_objects_are_those_among_all(tiny: Any) -> None:
    masks = run(tiny, batch_of([0, 1, 0], [0, 1, 1])).one_to_one[0].masks
    whole = masks.all()
    batch, query = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([3, 9, 0, 3, 1])
    torch.testing.assert_close(masks[batch, query], whole[batch, query], rtol=1e-5, atol=1e-5)
    nothing = batch[:0]
    assert masks[nothing, nothing].shape == (0, *whole.shape[2:])
