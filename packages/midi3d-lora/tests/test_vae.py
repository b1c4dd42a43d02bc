"""The autoencoder against the recorded one: embedding, chosen points, moments, field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError, DataError
from lora_core.testing import load_golden
from midi3d_lora.vae.autoencoder import LatentDistribution, TripoSGVAEModel
from midi3d_lora.vae.farthest_points import choose_query_points, draw_indices, farthest_points
from midi3d_lora.vae.frequencies import FrequencyEmbedding

GOLDENS = Path(__file__).parent / "goldens"
CASE = load_golden(GOLDENS / "vae")
TOKENS, SEED = CASE.config["num_tokens"], CASE.config["seed"]


def close(actual: Tensor, expected: Tensor, atol: float = 5e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def vae() -> TripoSGVAEModel:
    model = TripoSGVAEModel(**CASE.config["model"])
    model.load_state_dict(CASE.weights)
    return model.requires_grad_(False)


def test_keys_and_sizes_are_those_of_the_released_checkpoint() -> None:
    recorded = json.loads((GOLDENS / "keys" / "vae.json").read_text())
    with torch.device("meta"):
        model = TripoSGVAEModel()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == recorded["keys"]
    assert sum(p.numel() for p in model.parameters()) == recorded["parameters"]


def test_embedded_positions_are_the_recorded_ones() -> None:
    embedding = FrequencyEmbedding(CASE.config["model"]["embed_frequency"])
    close(embedding(CASE.io["surface"][..., :3]), CASE.io["embedded_positions"])


def test_frequencies_include_pi_on_request() -> None:
    x = torch.tensor([[0.25, 0.0, -0.5]])
    plain, with_pi = (FrequencyEmbedding(1, include_pi)(x) for include_pi in (False, True))
    close(plain[0, 3:6], x[0].sin())
    close(with_pi[0, 3:6], (torch.pi * x[0]).sin())


def test_embedding_keeps_its_precision_in_bfloat16_models(vae: TripoSGVAEModel) -> None:
    half = TripoSGVAEModel(**CASE.config["model"]).to(torch.bfloat16)
    points = CASE.io["queries"]
    assert torch.equal(half.embedding(points), vae.embedding(points))
    assert half.decode(CASE.io["sample"], points).sample.isfinite().all()


@pytest.mark.parametrize(("prefix", "points", "seed"), [("", None, 0), ("replace.", 32, 1)])
def test_chosen_points_are_the_recorded_ones(prefix: str, points: int | None, seed: int) -> None:
    surface = CASE.io["surface"][:, :points]
    drawn = draw_indices(surface.shape[1], 4 * TOKENS, SEED + seed)
    assert torch.equal(drawn, CASE.io[f"{prefix}choice_indices"])
    chosen = farthest_points(surface[:, drawn, :3], TOKENS)
    assert torch.equal(chosen, CASE.io[f"{prefix}fps_indices"])
    if not prefix:
        query_points = choose_query_points(surface, TOKENS, SEED)
        assert torch.equal(query_points, CASE.io["query_points"])


def test_farthest_points_follow_the_definition() -> None:
    xyz = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    chosen = farthest_points(xyz, 12)
    for row, indices in zip(xyz, chosen, strict=True):
        for k in range(1, 12):
            to_chosen = torch.cdist(row, row[indices[:k]]).amin(1)
            assert to_chosen.argmax() == indices[k]


def test_farthest_points_take_the_first_of_equals_and_repeat_when_points_run_out() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [1, 0, 0]])[None]
    assert farthest_points(corners, 4).tolist() == [[0, 1, 2, 0]]


def test_choosing_points_for_a_row_does_not_depend_on_its_batch() -> None:
    surface = CASE.io["surface"]
    alone = choose_query_points(surface[1:], TOKENS, SEED)
    assert torch.equal(choose_query_points(surface, TOKENS, SEED)[1:], alone)


def test_points_differ_from_call_to_call_without_a_seed() -> None:
    first, second = (choose_query_points(CASE.io["surface"], TOKENS, None) for _ in range(2))
    assert not torch.equal(first, second)


def test_moments_are_the_recorded_ones(vae: TripoSGVAEModel) -> None:
    (posterior,) = vae.encode(CASE.io["surface"], TOKENS, SEED, return_dict=False)
    close(posterior.parameters, CASE.io["moments"])
    for name in ("mean", "logvar", "std"):
        close(getattr(posterior, name), CASE.io[name])
    close(posterior.mean + posterior.std * CASE.io["noise"], CASE.io["sample"])
    surface = CASE.io["surface"][:, : 2 * TOKENS]
    (few,) = vae.encode(surface, TOKENS, SEED + 1, return_dict=False)
    close(few.mean, CASE.io["replace.mean"])


def test_field_is_the_recorded_one_in_chunks_too(vae: TripoSGVAEModel) -> None:
    latents, queries = CASE.io["sample"], CASE.io["queries"]
    close(vae.context(latents), CASE.io["kv_cache"])
    whole: Any = vae.decode(latents, queries)
    close(whole.sample, CASE.io["logits"])
    chunked = vae.decode(latents, queries, chunk_size=20, return_dict=False)[0]
    close(chunked, CASE.io["logits_chunked"])


def test_fields_give_what_decode_gives(vae: TripoSGVAEModel) -> None:
    queries = CASE.io["queries"]
    for i, field in enumerate(vae.fields(CASE.io["sample"])):
        close(field(queries[i]), CASE.io["logits"][i, :, 0])


def test_a_sample_repeats_with_its_generator_and_has_the_given_spread() -> None:
    moments = torch.tensor([3.0, 2 * torch.log(torch.tensor(0.5)).item()]).expand(1, 20000, 2)
    posterior = LatentDistribution(moments)
    first, second = (posterior.sample(torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    close(first.mean(), torch.tensor(3.0), 0.02)
    close(first.std(), torch.tensor(0.5), 0.02)


def test_kl_is_that_of_the_normal_distributions() -> None:
    moments = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    posterior = LatentDistribution(moments)
    ours = torch.distributions.Normal(posterior.mean, posterior.std)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(ours, normal).sum((1, 2))
    close(posterior.kl(), expected, 1e-5)


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([[[0.0, 0.0, -99.0, 99.0]]])
    assert LatentDistribution(moments).logvar.tolist() == [[[-30.0, 20.0]]]


def test_saved_and_read_again_it_is_the_same(vae: TripoSGVAEModel, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    again = TripoSGVAEModel.from_pretrained(tmp_path)
    assert again.config.embed_frequency == 5
    logits = again.decode(CASE.io["sample"], CASE.io["queries"]).sample
    close(logits, CASE.io["logits"])


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = TripoSGVAEModel(**CASE.config["model"])
        model.load_state_dict(CASE.weights)
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.encoder.gradient_checkpointing
            assert model.decoder.gradient_checkpointing
        out = model(CASE.io["surface"], CASE.io["queries"], TOKENS, SEED, sample_posterior=False)
        out.sample.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("columns", [3, 4, 7])
def test_surfaces_without_normals_are_refused(vae: TripoSGVAEModel, columns: int) -> None:
    with pytest.raises(DataError, match=r"expected \[rows, points, 6\], coordinates and unit"):
        vae.encode(torch.zeros(1, 64, columns), TOKENS)


def test_configs_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="width_encoder 24 is not a multiple of"):
        TripoSGVAEModel(**{**CASE.config["model"], "num_attention_heads": 5})
    with pytest.raises(ConfigError, match="embedding_type 'triplane' is not known"):
        TripoSGVAEModel(embedding_type="triplane")
