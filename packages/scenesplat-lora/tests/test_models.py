"""The two models around the backbone."""

import torch
from tiny_network import tiny_config, voxels

from scenesplat_lora.network.models import DefaultSegmentorV2, LangPretrainer


@torch.no_grad()
def test_language_features_are_unit_vectors_of_the_backbone() -> None:
    model = LangPretrainer(tiny_config()).eval()
    batch = voxels(60, 30)
    feat = model(batch)
    torch.testing.assert_close(feat.norm(dim=1), torch.ones(90))
    raw = model.backbone(batch)
    torch.testing.assert_close(feat, raw / raw.norm(dim=1, keepdim=True))


@torch.no_grad()
def test_chunks_run_by_themselves_in_evaluation_only() -> None:
    model = LangPretrainer(tiny_config(), chunk_size=40).eval()
    batch = voxels(60, 30)
    parts = [model.backbone(batch.rows(start, start + 40)) for start in (0, 40, 80)]
    whole = torch.cat(parts)
    torch.testing.assert_close(model(batch), torch.nn.functional.normalize(whole, dim=1))
    model.chunk_size = None
    assert not torch.allclose(model(batch), torch.nn.functional.normalize(whole, dim=1))
    chunked, model.chunk_size = model(batch), 90
    assert torch.equal(chunked, model(batch))
    seen: list[int] = []
    model.backbone.register_forward_hook(lambda m, inputs, out: seen.append(len(out)))
    model.chunk_size = 40
    model.train()(batch)
    assert seen == [90]


def test_segmentation_gives_a_logit_per_class() -> None:
    model = DefaultSegmentorV2(tiny_config(), num_classes=5).eval()
    batch = voxels(60)
    torch.testing.assert_close(model(batch), model.seg_head(model.backbone(batch)))
    assert model(batch).shape == (60, 5)
