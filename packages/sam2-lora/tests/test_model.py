"""The network: input sizes, objects of several pictures, memory switch, where LoRA goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Sam2Model

from lora_core.errors import ConfigError
from sam2_lora import model as m

N = 4  # objects


@pytest.fixture
def network(golden_base: Path) -> Any:
    return m.load(golden_base)


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def clicks(count: int, points: int, size: tuple[int, int]) -> Tensor:
    share = torch.rand(count, points, 2, generator=torch.Generator().manual_seed(1))
    return share * torch.tensor([size[1], size[0]])


# -- image sizes ---------------------------------------------------------------------------------

SIZES = [(128, 128), (64, 64), (64, 192), (256, 128), (256, 1600)]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_shapes(network: Any, size: tuple[int, int]) -> None:
    m.set_image_size(network, size)
    assert m.image_size(network) == size
    with torch.no_grad():
        features = m.encode(network, pictures(2, size))
        decoded = m.decode(network, features, torch.tensor([0, 1, 1]), clicks(3, 1, size))
    height, width = size
    assert features.image_embed.shape == (2, 32, height // 16, width // 16)
    assert features.feat_s0.shape == (2, 4, height // 4, width // 4)
    assert features.feat_s1.shape == (2, 8, height // 8, width // 8)
    assert decoded.masks.shape == (3, 3, height // 4, width // 4)
    assert (decoded.iou.shape, decoded.object_score.shape) == ((3, 3), (3, 1))


@pytest.mark.parametrize("size", SIZES)
def test_positions_of_prompts_follow_the_formula(network: Any, size: tuple[int, int]) -> None:
    """[sin, cos](2 pi (2 p - 1) M) with p = ((x + 0.5) / W, (y + 0.5) / H), plus the label."""
    m.set_image_size(network, size)
    points = clicks(N, 2, size)
    seen: list[Tensor] = []
    network.prompt_encoder.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    with torch.no_grad():
        features = m.encode(network, pictures(1, size))
        image = torch.zeros(N, dtype=torch.long)
        m.decode(network, features, image, points, labels=torch.tensor([[1, 0]]).expand(N, 2))
        boxes = points.flatten(1)
        m.decode(network, features, image, boxes=boxes)
    extent = torch.tensor([size[1], size[0]])
    matrix = network.prompt_encoder.shared_embedding.positional_embedding
    angle = 2 * torch.pi * ((2 * (points + 0.5) / extent - 1) @ matrix)
    place = torch.cat([angle.sin(), angle.cos()], -1)
    label = network.prompt_encoder.point_embed.weight
    torch.testing.assert_close(seen[0][:, 0, :2], place + label[[1, 0]], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[1][:, 0, :2], place + label[[2, 3]], rtol=0, atol=1e-4)
    padding = network.prompt_encoder.not_a_point_embed.weight[0]
    for tokens in seen:
        assert tokens.shape[2] == 3, "every prompt ends with exactly one token that is no point"
        assert torch.equal(tokens[0, 0, 2], padding)


@pytest.mark.parametrize("size", SIZES)
def test_rectangles_equal_the_recipe_with_shares_of_the_picture(
    network: Any, size: tuple[int, int]
) -> None:
    """The official network takes shares of width and height; transformers' own forward gives the
    same with its scalar set to 1 and coordinates x' = (x + 0.5) / W - 0.5, y alike."""
    m.set_image_size(network, size)
    pixel_values, points = pictures(2, size), clicks(2, 3, size)
    labels = torch.tensor([[1, 0, 1], [1, 1, 0]])
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [10.0, 2.0, 50.0, 60.0]])
    with torch.no_grad():
        features = m.encode(network, pixel_values)
        ours = m.decode(network, features, torch.arange(2), points, labels, boxes)
        network.prompt_encoder.input_image_size = 1
        extent = torch.tensor([size[1], size[0]])
        corners = ((boxes.view(2, 2, 2) + 0.5) / extent - 0.5).view(2, 1, 4)
        theirs = network(
            pixel_values=pixel_values,
            input_points=((points + 0.5) / extent - 0.5)[:, None],
            input_labels=labels[:, None],
            input_boxes=corners,
        )
    torch.testing.assert_close(ours.masks, theirs.pred_masks[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.iou, theirs.iou_scores[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ours.object_score, theirs.object_score_logits[:, 0], rtol=0, atol=1e-4
    )


def test_the_encoder_is_that_of_transformers_without_what_nothing_reads(network: Any) -> None:
    """Features and gradients are the same, bit for bit."""
    theirs = Sam2Model._from_config(network.config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(network.state_dict())
    pixels, found = pictures(2, m.image_size(network)), []
    for model in (network.requires_grad_(True), theirs):
        with Counted() as counted:
            output = model.get_image_features(pixels, return_dict=True)
        loss = torch.stack([level.square().mean() for level in output.fpn_hidden_states]).sum()
        loss.backward()
        gradients = {k: p.grad for k, p in model.vision_encoder.named_parameters()}
        found.append((output, gradients, counted.names))
    (ours, our_gradients, our_names), (expected, gradients, names) = found
    for one, other in zip(ours.fpn_hidden_states, expected.fpn_hidden_states, strict=True):
        assert torch.equal(one, other)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(our_gradients[name], gradient), name
    assert names >= {"aten.bmm", "aten._softmax", "aten.sin"}
    assert not our_names & {"aten.bmm", "aten._softmax", "aten.sin"}
    assert sum(one.untyped_storage().nbytes() for one in ours.fpn_position_encoding) == 3 * 4
    assert [one.shape for one in ours.fpn_position_encoding] == [
        one.shape for one in expected.fpn_position_encoding
    ]


class Counted(TorchDispatchMode):
    """The names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(100, 128), (128, 0), (16, 16)])
def test_sizes_off_the_grid_are_refused(network: Any, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        m.set_image_size(network, size)
    assert m.image_size(network) == (128, 128)


def test_pictures_of_another_size_are_refused(network: Any) -> None:
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(128, 128\)"):
        m.encode(network, pictures(1, (64, 64)))


# -- objects -------------------------------------------------------------------------------------


def test_objects_of_a_batch_do_not_see_each_other(network: Any) -> None:
    size = (128, 128)
    image, points = torch.tensor([1, 0, 1, 1]), clicks(N, 2, size)
    with torch.no_grad():
        pixel_values = pictures(2, size)
        features = m.encode(network, pixel_values)
        together = m.decode(network, features, image, points)
        for i in range(N):
            alone = m.encode(network, pixel_values[image[i : i + 1]])
            one = m.decode(network, alone, torch.tensor([0]), points[i : i + 1])
            torch.testing.assert_close(one.masks[0], together.masks[i], rtol=0, atol=1e-4)
            torch.testing.assert_close(one.iou[0], together.iou[i], rtol=0, atol=1e-5)


def test_labels_default_to_foreground(network: Any) -> None:
    with torch.no_grad():
        features = m.encode(network, pictures(1, (128, 128)))
        image, points = torch.zeros(N, dtype=torch.long), clicks(N, 2, (128, 128))
        default = m.decode(network, features, image, points)
        ones = m.decode(network, features, image, points, torch.ones(N, 2, dtype=torch.long))
        zeros = m.decode(network, features, image, points, torch.zeros(N, 2, dtype=torch.long))
    assert torch.equal(default.masks, ones.masks)
    assert not torch.equal(default.masks, zeros.masks)


def test_a_prompt_is_required(network: Any) -> None:
    features = m.encode(network, pictures(1, (128, 128)))
    with pytest.raises(ValueError, match="points or boxes"):
        m.decode(network, features, torch.tensor([0]))


def test_autocast_leaves_positions_and_results_in_float32(network: Any) -> None:
    seen: list[Tensor] = []
    network.prompt_encoder.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    points = clicks(1, 1, (128, 128))
    with torch.no_grad():
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                features = m.encode(network, pictures(1, (128, 128)))
                decoded = m.decode(network, features, torch.tensor([0]), points)
            assert {part.dtype for part in decoded} == {torch.float32}
    assert features.feat_s0.dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1])


def test_gradient_reaches_encoder_and_decoder(network: Any) -> None:
    qkv = network.vision_encoder.backbone.blocks[0].attn.qkv.weight.requires_grad_()
    q = network.mask_decoder.transformer.layers[0].self_attn.q_proj.weight.requires_grad_()
    features = m.encode(network, pictures(2, (128, 128)))
    decoded = m.decode(network, features, torch.tensor([0, 1]), clicks(2, 1, (128, 128)))
    decoded.masks.square().mean().backward()
    assert qkv.grad.abs().max() > 0
    assert q.grad.abs().max() > 0


# -- gradient checkpointing ----------------------------------------------------------------------


def block_gradient(network: Any) -> tuple[Tensor, int]:
    """Gradient of the first block's qkv, and how often the block's attention ran."""
    attention = network.vision_encoder.backbone.blocks[0].attn
    runs = []
    hook = attention.register_forward_hook(lambda *_: runs.append(1))
    weight = attention.qkv.weight.requires_grad_()
    weight.grad = None
    features = m.encode(network, pictures(1, (128, 128)))
    decoded = m.decode(network, features, torch.tensor([0]), clicks(1, 1, (128, 128)))
    decoded.masks.square().mean().backward()
    hook.remove()
    assert weight.grad is not None
    return weight.grad.clone(), len(runs)


def test_gradient_checkpointing_changes_no_bit_and_recomputes(network: Any) -> None:
    network.train()
    plain, runs = block_gradient(network)
    assert runs == 1
    m.enable_gradient_checkpointing(network)
    checkpointed, runs = block_gradient(network)
    assert runs == 2
    assert torch.equal(plain, checkpointed)
    network.eval()
    assert block_gradient(network)[1] == 1, "no recomputation in evaluation mode"
