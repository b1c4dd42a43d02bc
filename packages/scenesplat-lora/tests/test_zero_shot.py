"""Zero-shot labels, votes and both definitions of the scores, as recorded from the original."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.errors import CheckpointError, ConfigError, DataError
from lora_core.testing import load_golden
from scenesplat_lora.language.text_embeddings import (
    read_text_embeddings,
    text_embeddings,
    write_text_embeddings,
)
from scenesplat_lora.language.zero_shot import (
    FragmentSum,
    instance_vote,
    label,
    probabilities,
    vote,
)
from scenesplat_lora.metrics import Confusion, class_scores, epoch_scores, final_scores

GOLDEN = load_golden(Path(__file__).parent / "goldens" / "zeroshot")
IO = {name: tensor.numpy() for name, tensor in GOLDEN.io.items()}
NAMES, K = GOLDEN.config["class_names"], GOLDEN.config["vote_k"]
THRESHOLD = GOLDEN.config["confidence_threshold"]
TEXT = text_embeddings(NAMES, GOLDEN.io["text_embeddings"])


def golden_labels() -> np.ndarray:
    prob = probabilities(GOLDEN.io["feat"], TEXT)
    return label(prob, TEXT.classes, THRESHOLD).numpy()


# -- recorded --------------------------------------------------------------------------------------


def test_labels_and_votes_are_the_official_ones() -> None:
    labels, valid = golden_labels(), IO["valid_feat_mask"]
    assert np.array_equal(labels, IO["pred_threshold"])
    near = vote(labels, IO["coord"], valid=valid, k=K)
    assert np.array_equal(near, IO["vote_self"])
    there = vote(labels, IO["coord"], IO["pc_coord"], valid, K)
    assert np.array_equal(there, IO["vote_pc"])
    assert np.array_equal(instance_vote(near, IO["instance"]), IO["vote_self_instance"])


@pytest.mark.parametrize(("truth", "found", "name"), [("segment", "vote_self", "self"),
                                                     ("pc_segment", "vote_pc", "pc")])  # fmt: skip
def test_both_published_scores_are_the_official_ones(truth: str, found: str, name: str) -> None:
    excluded, results = GOLDEN.config["excluded_classes"], GOLDEN.config["results"]
    table = Confusion(NAMES)
    half = len(IO[truth]) // 2  # scenes are summed before anything is averaged
    table.add(IO[truth][:half], IO[found][:half])
    table.add(IO[truth][half:], IO[found][half:])
    tester, evaluator = results[f"tester_{name}"], results[f"evaluator_{name}"]
    for key in ("intersection", "union", "target"):
        ours = table.hits if key == "intersection" else getattr(table, key)
        assert ours.tolist() == tester[key]
    assert table.counts[:, :-1].tolist() == evaluator["confusion"]
    assert table.rejected.tolist() == evaluator["fn_ignore"]
    for key, value in final_scores(table, excluded).items():
        assert value == pytest.approx(tester[key], abs=1e-9)
    for key, value in epoch_scores(table, excluded).items():
        assert value == pytest.approx(evaluator[f"val/{key}"], abs=1e-9)


# -- labels and votes ------------------------------------------------------------------------------


def test_the_length_of_features_and_texts_does_not_matter() -> None:
    longer = text_embeddings(NAMES, GOLDEN.io["text_embeddings"] * 7)
    scaled = probabilities(GOLDEN.io["feat"] * 3, longer)
    torch.testing.assert_close(scaled, probabilities(GOLDEN.io["feat"], TEXT))


def test_overlapping_fragments_are_summed_and_rows_in_none_are_rejected() -> None:
    total = FragmentSum(3, 2)
    total.add(torch.tensor([0, 1]), torch.tensor([[0.6, 0.5], [0.5, 0.6]]))
    total.add(torch.tensor([1]), torch.tensor([[0.8, 0.6]]))
    assert total.label((0, 1)).tolist() == [0, 0, -1]
    assert total.label((0, 1), 0.63).tolist() == [-1, 0, -1]
    assert total.label((0, 1), 0.0).tolist() == [0, 0, -1]


def test_several_prompts_may_stand_for_one_class() -> None:
    features = torch.eye(4)
    text = text_embeddings(["wall", "car"], features[:3], (0, 1, 1))
    assert label(probabilities(features, text), text.classes).tolist()[:3] == [0, 1, 1]


def test_fewer_candidates_than_neighbours_all_vote() -> None:
    coord = np.array([[0.0, 0, 0], [1, 0, 0], [5, 0, 0]])
    assert vote(np.array([2, 2, 1]), coord, k=25).tolist() == [2, 2, 2]
    assert vote(np.array([2, 1]), coord[:2], k=25).tolist() == [1, 1]  # ties: the smaller class
    assert vote(np.array([4]), coord[:1], coord).tolist() == [4, 4, 4]


def test_rejected_rows_and_rows_without_a_feature_have_no_vote() -> None:
    coord = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    assert vote(np.array([-1, -1, 3]), coord, k=3).tolist() == [3, 3, 3]
    assert vote(np.array([-1, -1, 3]), coord, k=1).tolist() == [-1, -1, 3]
    nobody = np.zeros(3, bool)
    assert vote(np.array([0, 1, 2]), coord, valid=nobody).tolist() == [-1, -1, -1]


def test_an_instance_gets_its_most_frequent_label() -> None:
    labels = np.array([1, 1, 2, -1, -1, 5, 2, 1, -1, 0])
    instance = np.array([7, 7, 7, 7, 9, -1, 3, 3, 4, 4])
    assert instance_vote(labels, instance).tolist() == [1, 1, 1, 1, -1, 5, 1, 1, -1, -1]
    assert instance_vote(labels, np.full(10, -1)).tolist() == labels.tolist()


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.fault("P41")
def test_the_two_definitions_differ_where_they_are_said_to() -> None:
    table = Confusion(["a", "b", "c"])
    table.add(np.array([0, 0, 0, 1, -1]), np.array([0, 0, -1, 2, 1]))
    tester, evaluator = final_scores(table), epoch_scores(table)
    assert tester["mAcc"] == pytest.approx((2 / 3 + 0) / 2)
    assert evaluator["mean_class_acc"] == pytest.approx((1 + 0) / 2)
    assert tester["mIoU"] == pytest.approx((2 / 3 + 0 + 0) / 3)  # c is predicted: it counts
    assert evaluator["mIoU"] == pytest.approx((2 / 3 + 0) / 2)
    per_class = class_scores(table)
    assert per_class["a"] == {"IoU": 2 / 3, "Acc": 2 / 3, "points": 3}
    assert np.isnan(per_class["c"]["Acc"])


@pytest.mark.fault("P25")
def test_labels_that_no_class_has_are_refused_and_not_counted() -> None:
    table = Confusion(["a", "b"])
    with pytest.raises(DataError, match="labels from 0 to 2 for 2 classes"):
        table.add(np.array([0, 2]), np.array([0, 1]))
    with pytest.raises(DataError, match=r"\(3,\) predictions for \(2,\) labels"):
        table.add(np.array([0, 1]), np.array([0, 1, 1]))
    assert not table.counts.any()
    assert final_scores(table)["mIoU"] == 0
    with pytest.raises(ConfigError, match="did you mean 'floor'"):
        final_scores(Confusion(["wall", "floor"]), ["flor"])


# -- files of text embeddings ----------------------------------------------------------------------


def test_official_files_and_npz_hold_the_same_embeddings(tmp_path: Path) -> None:
    torch.save(GOLDEN.io["text_embeddings"], tmp_path / "text.pt")
    (tmp_path / "text.txt").write_text("\n".join(NAMES) + "\n", "utf-8")
    official = read_text_embeddings(tmp_path / "text.pt")
    assert official.names == tuple(NAMES)
    torch.testing.assert_close(official.features, TEXT.features)
    write_text_embeddings(tmp_path / "text.npz", official)
    again = read_text_embeddings(tmp_path / "text.npz")
    assert (again.names, again.classes) == (official.names, official.classes)
    torch.testing.assert_close(again.features, official.features)
    renamed = read_text_embeddings(tmp_path / "text.npz", [f"my {name}" for name in NAMES])
    assert renamed.names[0] == "my wall"


@pytest.mark.fault("P26")
def test_embeddings_that_cannot_be_used_are_refused_with_their_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "dict.pt")
    with pytest.raises(DataError, match=r"dict.pt holds a dict"):
        read_text_embeddings(tmp_path / "dict.pt", ["a"])
    torch.save(torch.eye(3), tmp_path / "three.pt")
    with pytest.raises(CheckpointError, match=r"three.txt does not exist"):
        read_text_embeddings(tmp_path / "three.pt")
    with pytest.raises(DataError, match="2 class names for 3 embeddings"):
        read_text_embeddings(tmp_path / "three.pt", ["a", "b"])
    with pytest.raises(DataError, match="every index from 0 to 1"):
        read_text_embeddings(tmp_path / "three.pt", ["a", "b"], [0, 0, 0])
    with pytest.raises(DataError, match="must be different"):
        read_text_embeddings(tmp_path / "three.pt", ["a", "b", "a"])
    np.savez(tmp_path / "objects.npz", embeddings=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="no file of plain arrays"):
        read_text_embeddings(tmp_path / "objects.npz")
    (tmp_path / "gap.txt").write_text("wall\n\nfloor\n", "utf-8")
    with pytest.raises(DataError, match="line 2 is empty"):
        read_text_embeddings(tmp_path / "three.pt", tmp_path / "gap.txt")
    with pytest.raises(DataError, match=r"embeddings \[1\] are zero or not finite"):
        text_embeddings(["a", "b"], torch.tensor([[1.0, 0], [0, 0]]))


@pytest.mark.fault("P26")
def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match="different widths"):
        probabilities(torch.zeros(3, 5), TEXT)
