"""What a run takes: the largest batch, the estimate before weights are read, advice, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from lora_core.config import parse
from lora_core.disk import folder_bytes
from lora_core.errors import ConfigError
from lora_core.memory import saved_bytes, simulate
from lora_core.training.out_of_memory import explained
from sam3_lora import data, find_lr, memory, model, network, objective, train
from sam3_lora.config import Config, parse_size
from sam3_lora.scoring import EncodedPhrases

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_base(tmp_path_factory.mktemp("base"), dropout=0)


def config(base: Path, **given: Any) -> Config:
    return parse(Config, tiny_run.command(base, Path("unused"), **given), prog="t")


# -- the largest batch -----------------------------------------------------------------------------


def test_the_largest_samples_ask_most_and_hold_most(base: Path) -> None:
    """The pictures ask 3, 3, and 3 phrases; they hold 5, 2 and 0 objects that are no crowd."""
    train_set = data.load(config(base)).train
    counts = [memory.query_counts(record, train_set) for record in train_set.records]
    assert counts == [(3, 5), (3, 2), (3, 0)]
    assert [memory.largest(train_set, count) for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    few = data.load(config(base, dataset__max_negatives=0)).train
    assert [memory.query_counts(record, few) for record in few.records] == [(3, 5), (2, 2)]


def test_no_epoch_has_a_sample_with_more_than_was_counted(base: Path) -> None:
    train_set = data.load(config(base, dataset__max_negatives=1)).train
    for number, record in enumerate(train_set.records):
        queries, objects = memory.query_counts(record, train_set)
        for epoch in range(3):
            train_set.set_epoch(epoch)
            sample = train_set[number]
            assert len(sample.queries) == queries
            assert sum(len(query.boxes) for query in sample.queries) <= objects


def test_a_large_batch_takes_samples_twice_and_is_described(base: Path) -> None:
    cfg = config(base)
    train_set = data.load(cfg).train
    words = model.tokenizer(model.skeleton(cfg))
    batch = memory.largest_batch(train_set, words, 5)
    assert batch["pictures"] == ["img_0.png", "img_1.png", "img_2.png", "img_0.png", "img_1.png"]
    objects = len(batch["targets"]["boxes"])
    assert memory.describe(batch, cfg) == (
        f"5 pictures of 84x84 with 15 queries and {objects} objects: "
        "img_0.png, img_1.png, img_2.png, img_0.png, ..."
    )


# -- the estimate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{}, {"training__enable_segmentation": True}, {"lora__apply_to_text_encoder": True},
     {"training__gradient_checkpointing": True}],
    ids=["boxes", "masks", "text", "checkpointing"],
)  # fmt: skip
def test_the_estimate_without_values_is_what_a_step_keeps(base: Path, given: Any) -> None:
    cfg = config(base, lora__dropout=0, **given)
    splits = data.load(cfg)
    net = objective.adapted(model.build(cfg), cfg).train()
    words = objective.vocabulary(net, splits, cfg)
    loss = objective.loss_of(cfg, objective.encoded(net, words, splits))
    batch = memory.largest_batch(splits.train, words, 2)
    known = [*net.parameters(), *net.buffers()]
    kept, _ = saved_bytes(lambda: loss(net, batch), known)

    empty = objective.adapted(model.skeleton(cfg), cfg).train()
    phrases = None
    if not network.trains_text(empty):
        phrases = EncodedPhrases.without_values(empty, objective.texts_of(splits))
        network.drop_text_encoder(empty)
    # Which pairs are matched, and so a little of what is kept, depends on values.
    assert simulate(empty, objective.loss_of(cfg, phrases), batch).saved == pytest.approx(
        kept, rel=0.05
    )


# -- advice ----------------------------------------------------------------------------------------


def test_remedies_are_flags_that_exist_and_are_not_in_use(base: Path) -> None:
    cfg = config(base, training__enable_segmentation=True, dataset__resolution=1008)
    found = memory.remedies(cfg)
    assert [one.split()[0] for one in found] == [
        "--training.gradient_checkpointing", "--auto_batch", "--training.mask_points",
        "--dataset.max_negatives", "--training.o2m_weight", "--lora.apply_to_vision_encoder",
        "--dataset.resolution",
    ]  # fmt: skip
    words = [word for one in found for word in one.partition(" (")[0].split()]
    taken = parse(Config, [*tiny_run.command(base, Path("u")), *words,
                           "--training.enable_segmentation"], prog="t")  # fmt: skip
    assert taken.dataset.size == (672, 672)
    assert [one.split()[0] for one in memory.remedies(taken)] == [
        "--dataset.max_negatives", "--dataset.resolution"
    ]  # fmt: skip


def test_smaller_sizes_keep_whole_windows_where_there_are_some() -> None:
    assert memory.smaller((1008, 1008)) == [672]
    assert memory.smaller((672, 1008)) == [336, 672]
    assert memory.smaller((504, 504)) == [336]


def test_memory_that_runs_out_is_told_with_what_helps(base: Path) -> None:
    cfg = config(base)
    net = model.build(cfg)
    with (
        pytest.raises(ConfigError, match=r"in the ramp: 2\.00 GiB more") as raised,
        explained(net, lambda: "the ramp", memory.advice(cfg)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert "best first: 1. --training.gradient_checkpointing; 2. --auto_batch" in str(raised.value)


def test_auto_batch_halves_and_accumulates(base: Path, capsys: Capture) -> None:
    cfg = config(base, training__batch_size=4, auto_batch=True)
    splits = data.load(cfg)
    net = objective.adapted(model.build(cfg), cfg)
    words = model.tokenizer(net)
    real = objective.loss_of(cfg, objective.encoded(net, words, splits))

    def loss(net: Any, batch: Any) -> Any:
        if len(batch["pictures"]) > 1:  # what a small device says
            raise torch.OutOfMemoryError("out of memory")
        return real(net, batch)

    def largest(count: int) -> dict[str, Any]:
        return memory.largest_batch(splits.train, words, count)

    fitted = memory.fitted(net, loss, largest, cfg, "fp32")
    training = fitted.training
    assert (training.batch_size, training.gradient_accumulation_steps) == (1, 4)
    said = "--training.batch_size 1 and --training.gradient_accumulation_steps 4"
    assert said in capsys.readouterr().out


# -- files, and other commands ---------------------------------------------------------------------


def test_a_run_writes_no_more_than_was_foreseen(
    base: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = tiny_run.command(base, tmp_path, training__max_epochs=2, keep_last=1)
    assert train.main([*argv, "--dry_run"]) == 0
    assert not list(tmp_path.iterdir())
    assert "memory of a step" in capsys.readouterr().out
    assert train.main(argv) == 0
    cfg = parse(Config, argv, prog="t")
    net = objective.adapted(model.build(cfg), cfg)
    foreseen = memory.disk_use(net, cfg, updates=2, validated=True)
    written = folder_bytes(tmp_path)
    assert written <= sum(foreseen.values()) <= 4 * written


@pytest.mark.parametrize(
    ("size", "times"), [("84", 0), ("154", 0), ("168", 4), ("168x84", 0), ("84x420", 5)]
)
def test_pictures_far_larger_than_those_of_the_base_are_noted(
    base: Path, size: str, times: int, capsys: Capture
) -> None:
    cfg = config(base, dataset__resolution=size)
    net = objective.adapted(model.skeleton(cfg), cfg)
    note = objective.note_on_size(net, cfg.dataset.size)
    assert bool(note) == bool(times)
    assert ("note: pictures of " in capsys.readouterr().out) == bool(times)
    if times:
        height, width = parse_size(size)
        assert note.startswith(f"pictures of {height} x {width} pixels (height x width) have ")
        assert f"{times} times the patches of the 84 x 84 that this base was trained on" in note
        assert "--dataset.resolution 84 is the base's own size" in note


def test_a_learning_rate_is_found_and_drawn(base: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = tiny_run.command(base, tmp_path / "run", ramp_steps=12, ramp_dir=tmp_path / "ramp")
    assert find_lr.main(argv) == 0
    assert "suggestion: --training.learning_rate " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "ramp").iterdir()} == {"find_lr.csv", "find_lr.png"}
    assert not (tmp_path / "run").exists()


def test_what_is_divided_among_processes_runs_once_in_a_forward_pass(base: Path) -> None:
    net = model.build(config(base))
    parts = network.divisible(net)
    calls: list[Any] = []
    for part in parts:
        part.register_forward_hook(lambda module, given, result: calls.append(module))
    network.encode_images(net, torch.zeros(1, 3, 84, 84))
    assert sorted(map(id, calls)) == sorted(map(id, parts))
    held = sum(p.numel() for part in parts for p in part.parameters())
    blocks = sum(p.numel() for p in net.vision_encoder.backbone.layers.parameters())
    assert held > 0.98 * blocks
