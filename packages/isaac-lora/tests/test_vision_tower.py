"""The tower: images do not see each other, and the memory follows the largest of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_isaac import CASE, recorded_model
from torch import Tensor

from isaac_lora.network.vision import equal_runs, pixel_shuffle
from lora_core.errors import DataError

GRIDS = [(4, 6), (6, 4), (2, 2), (8, 2), (2, 8), (4, 6)]
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def tower() -> Any:
    return recorded_model().model.vision_embedding[0]


def random_patches(grids: list[tuple[int, int]]) -> Tensor:
    count = sum(rows * columns for rows, columns in grids)
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_image_of_a_batch_is_as_if_alone(tower: Any) -> None:
    patches = random_patches(GRIDS)
    together = tower(patches, torch.tensor(GRIDS))
    alone = [
        tower(part, torch.tensor([grid]))
        for part, grid in zip(patches.split([h * w for h, w in GRIDS]), GRIDS, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


@torch.no_grad()
def test_attention_never_spans_more_than_one_image(
    tower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert options.get("attn_mask") is None
        lengths.append(k.shape[-2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    tower(random_patches(GRIDS), torch.tensor(GRIDS))
    layers = CASE.config["vision_config"]["num_hidden_layers"]
    assert lengths == [24, 4, 16, 24] * layers  # neighbours of one size go together


def test_neighbours_of_equal_size_make_a_run() -> None:
    assert equal_runs(GRIDS) == [(2, 24), (1, 4), (2, 16), (1, 24)]


def test_a_shuffled_token_holds_its_block_row_by_row() -> None:
    patches = torch.arange(24)[:, None]  # a 4 x 6 grid of numbers
    tokens = pixel_shuffle(patches, [(4, 6)], 2)
    assert tokens.tolist()[0] == [0, 1, 6, 7]
    assert tokens.tolist()[1] == [2, 3, 8, 9]
    assert tokens.tolist()[3] == [12, 13, 18, 19]
    assert pixel_shuffle(patches, [(4, 6)], 1) is patches


@torch.no_grad()
def test_half_precision_resizes_positions_as_float32_does(tower: Any) -> None:
    half = recorded_model().model.vision_embedding[0].to(torch.bfloat16)
    expected = tower.embeddings.positions(GRIDS)
    found = half.embeddings.positions(GRIDS)
    assert found.dtype == torch.bfloat16
    # The weights are rounded before the resize and the result after it: twice half an ulp.
    assert (found.float() - expected).abs().max() <= 2**-8 * expected.abs().max() * 1.01


def test_grids_that_do_not_cover_the_patches_are_refused(tower: Any) -> None:
    with pytest.raises(DataError, match="has 23 rows, but `grids` is of 1 image with 24"):
        tower(random_patches([(4, 6)])[:-1], torch.tensor([[4, 6]]))
    with pytest.raises(DataError, match="an image of 3 x 8 patches cannot be shuffled by 2"):
        tower(random_patches([(3, 8)]), torch.tensor([[3, 8]]))
