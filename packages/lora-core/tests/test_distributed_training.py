"""Two processes on gloo train as one, and end together. They are forked from this process."""

import csv
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_training import FromOneOn
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import Dataset

from lora_core import checkpoint
from lora_core.adapters.file import read_adapter
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError, DataError
from lora_core.guards import Guards
from lora_core.injection import inject
from lora_core.report import RunLog
from lora_core.testing.processes import run
from lora_core.trainer import LoraTrainer, training_arguments

COLUMNS = ["step", "epoch", "split", "loss", "mse", "score", "lr", "grad_norm", "seconds"]
X = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
Y = torch.sin(2 * X[:, :3])


class Points(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i], "id": i}


def collate(samples):
    return {
        "x": torch.stack([s["x"] for s in samples]),
        "y": torch.stack([s["y"] for s in samples]),
        "rare": torch.tensor([float(s["id"] % 5 == 0) for s in samples]),
        "keys": [str(s["id"]) for s in samples],
    }


class Net(nn.Module):
    """A block under activation checkpointing, and one that only some samples need."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.rare = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, rare):
        x = torch.tanh(self.first(x))
        x = x + recompute(self.block, x, use_reentrant=False)
        if rare.any():
            x = x + rare[:, None] * self.rare(x)
        return self.head(x)


def network():
    torch.manual_seed(1)
    model = Net()
    inject(model, LoraConfig(["first", "block.0", "block.2", "rare", "head"], r=2))
    return model


def loss(model, batch):
    per_sample = (model(batch["x"], batch["rare"]) - batch["y"]).square().mean(1)
    return per_sample.mean(), {"mse": per_sample.detach().mean()}


def evaluate(model):
    error = (model(X, torch.ones(50)) - Y).square().mean().item()
    return {"score": 1 - error}


def trainer(folder, world, size=48, data=None, loss=loss, measure=evaluate, **settings):
    given = ("count", "on_latest", "order")
    own = {name: settings.pop(name) for name in given if name in settings}
    defaults = {
        "learning_rate": 1e-2,
        "steps": 14,
        "batch_size": 8 // world,
        "log_steps": 2,
        "eval_steps": 5,
        "seed": 3,
        "device": "cpu",
    }
    return LoraTrainer(
        network(),
        training_arguments(folder, **defaults | settings),
        data or Points(size),
        collate,
        loss,
        measure,
        log=RunLog(
            Path(folder) / "tensorboard", Path(folder) / "log.csv", COLUMNS, tensorboard=False
        ),
        save_adapter=Path.mkdir,
        guards=Guards(keep_last=99),
        **own,
    )


def rows(folder, split="train"):
    with (Path(folder) / "log.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def saved(folder, rank=0):
    return torch.load(Path(folder) / f"weights-{rank}.pt", weights_only=True)


def train(folder, world, resume=None, **settings):
    made = trainer(folder, world, **settings)
    made.train(resume)
    rank = os.environ.get("RANK", "0")
    torch.save(made.network.state_dict(), Path(folder) / f"weights-{rank}.pt")
    return made


def assert_all_well(ended):
    for process in ended:
        assert (process.status, process.in_time) == (0, True), process.output
        assert "Traceback" not in process.output
        assert process.left_behind == ()


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7, msg=name)


def assert_same_run(one, two, ranks=2):
    """Losses within 1e-6, one log without repeats, the same weights on all ranks."""
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["step"] == b["step"]
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-6)
    for rank in range(ranks):
        assert_close(saved(two, rank), saved(one))
    assert [row["step"] for row in rows(one, "val")] == [row["step"] for row in rows(two, "val")]


# -- two are as one --------------------------------------------------------------------------------

SIZES = (48, 45, 17)  # full batches; an uneven last one; one with a single sample for two processes


@pytest.mark.fault("R18", "R19", "R23", "R24", "R25")
def test_two_processes_train_as_one_whatever_the_number_of_samples(tmp_path):
    def two(rank):
        for size in SIZES:
            train(tmp_path / f"two-{size}", 2, size=size)
        train(tmp_path / "two-parts", 2, size=45, batch_size=2, gradient_accumulation_steps=2)

    ended = run(two)
    assert_all_well(ended)
    assert ended[0].output.count("before training") == 4
    assert "before training" not in ended[1].output, "only the first process speaks"
    for size in SIZES:
        train(tmp_path / f"one-{size}", 1, size=size)
        assert_same_run(tmp_path / f"one-{size}", tmp_path / f"two-{size}")
    assert_same_run(tmp_path / "one-45", tmp_path / "two-parts")


@pytest.mark.fault("R18", "R25")
def test_two_processes_divide_an_order_of_the_caller(tmp_path):
    """Both see it as one process would, each takes its own samples, and none is left out."""

    def noted(rank):
        def write(model, batch):
            if model.training and os.environ.get("RANK"):
                with (tmp_path / f"seen-{rank}").open("a") as file:
                    file.writelines(f"{key}\n" for key in batch["keys"])
            return loss(model, batch)

        train(tmp_path / "two", 2, loss=write, size=48, order=FromOneOn(48, 3), steps=6)

    assert_all_well(run(noted))
    seen = [list(map(int, (tmp_path / f"seen-{rank}").read_text().split())) for rank in range(2)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(48))
    assert seen[0][:4] + seen[1][:4] == [(21 + i) % 48 for i in range(8)]
    train(tmp_path / "one", 1, size=48, order=FromOneOn(48, 3), steps=6)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.fault("R08", "R18", "R25")
def test_batches_with_unequal_numbers_of_items_count_by_item(tmp_path):
    """The loss is a mean in which rare samples count four times, as pictures with four objects."""

    def sums(model, batch):
        weight = 1 + 3 * batch["rare"]
        per_sample = (model(batch["x"], batch["rare"]) - batch["y"]).square().mean(1)
        return (per_sample * weight).sum() / weight.sum(), {}

    def count(batch):
        return float((1 + 3 * batch["rare"]).sum())

    settings = {"loss": sums, "count": count, "size": 45}
    assert_all_well(run(lambda rank: train(tmp_path / "two", 2, **settings) and None))
    train(tmp_path / "one", 1, **settings)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "parts", 1, batch_size=2, gradient_accumulation_steps=4, **settings)
    assert_same_run(tmp_path / "one", tmp_path / "parts", ranks=1)


# -- other numbers of processes --------------------------------------------------------------------


@pytest.mark.fault("K12", "K47", "K56")
def test_a_run_continues_on_another_number_of_processes(tmp_path, capsys):
    """1 -> 2 and 2 -> 1, in the middle of an epoch, with the same samples per update."""
    saves = {"trainer": {"save_steps": 3}}

    def start(rank):
        train(tmp_path / "two", 2, size=45, **saves)

    assert_all_well(run(start))
    train(tmp_path / "one", 1, size=45, **saves)
    shutil.copytree(tmp_path / "one", tmp_path / "one-two")
    shutil.copytree(tmp_path / "two", tmp_path / "two-one")

    def go_on(rank):
        train(tmp_path / "one-two", 2, str(tmp_path / "one-two" / "checkpoint-9"), size=45, **saves)

    ended = run(go_on)
    assert_all_well(ended)
    assert "1 process x batch 8 x 1 accumulated then, 2 processes x batch 4" in ended[0].output
    path = str(tmp_path / "two-one" / "checkpoint-3")
    train(tmp_path / "two-one", 1, path, size=45, batch_size=4, gradient_accumulation_steps=2)
    assert_same_run(tmp_path / "one", tmp_path / "one-two")
    assert_same_run(tmp_path / "one", tmp_path / "two-one", ranks=1)


@pytest.mark.fault("K12")
def test_another_number_of_samples_per_update_is_refused_with_numbers_that_fit(tmp_path):
    def target(rank):
        train(tmp_path, 2, steps=4)
        trainer(tmp_path, 2, steps=4, batch_size=8).train(True)

    ended = run(target)
    assert [process.status for process in ended] == [2, 2]
    assert "8 samples per update" in ended[0].output
    assert "batch size 4 and 1 accumulated" in ended[0].output
    assert_one_message(ended)


# -- they end together -----------------------------------------------------------------------------


def assert_one_message(ended, *parts):
    """All have ended within seconds; exactly one says at length why, and nobody a traceback."""
    for process in ended:
        assert process.in_time, process.output
        assert process.left_behind == ()
        assert "Traceback" not in process.output, process.output
    said = "".join(process.output for process in ended)
    for part in parts:
        assert part in said, said


class Faulty(Points):
    """Points of which one cannot be read."""

    def __getitem__(self, i):
        if i == 7:
            raise DataError("points.csv, line 8: 'x' is not a number; correct or remove it")
        return super().__getitem__(i)


@pytest.mark.fault("R20", "R22")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_on_one_rank_ends_all_with_its_message(tmp_path, workers):
    ended = run(lambda rank: train(tmp_path, 2, data=Faulty(48), num_workers=workers) and None)
    assert [process.status for process in ended] == [2, 2], ended
    assert_one_message(ended, "points.csv, line 8: 'x' is not a number", "stopped the run")
    assert max(process.seconds for process in ended) < 40


@pytest.mark.fault("R01", "R20", "R22")
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_alike(tmp_path):
    def target(rank):
        def broken(model, batch):
            value, parts = loss(model, batch)
            made_up = float("nan") if rank == 1 and model.training_calls == 3 else 1.0
            model.training_calls += 1
            return value * made_up, parts

        made = trainer(tmp_path, 2, loss=broken)
        made.network.training_calls = 0
        made.train()

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert_one_message(ended, "the loss is not finite (process 1)")


@pytest.mark.fault("R21", "R22")
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_fault_of_ours_on_one_rank_is_named_on_the_other(tmp_path, guilty):
    def target(rank):
        def broken(model, batch):
            if rank == guilty:
                raise ZeroDivisionError("of one rank alone")
            return loss(model, batch)

        trainer(tmp_path, 2, loss=broken).train()

    ended = run(target)
    assert [process.status for process in ended] == [1, 1]
    other = ended[1 - guilty].output
    assert f"error: rank {guilty} stopped the run: ZeroDivisionError: of one rank alone" in other
    assert "Traceback" in ended[guilty].output, "kept where it happened"
    assert "Traceback" not in other
    assert max(process.seconds for process in ended) < 40


@pytest.mark.fault("R21")
@pytest.mark.parametrize(
    ("killed", "workers"), [(0, 0), (1, 0), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_the_death_of_a_rank_ends_the_other_within_seconds_and_is_named(tmp_path, killed, workers):
    def target(rank):
        def dies(model, batch):
            if rank == killed and (tmp_path / "checkpoint-5").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(model, batch)

        trainer(tmp_path, 2, loss=dies, num_workers=workers).train()

    ended = run(target)
    other = ended[1 - killed]
    assert ended[killed].status == -signal.SIGKILL
    assert other.status == 2, other.output
    assert f"rank {killed} (process " in other.output
    assert "continue from the last checkpoint with --resume" in other.output
    assert "Traceback" not in other.output
    assert other.seconds - ended[killed].seconds < 30
    assert [process.left_behind for process in ended] == [(), ()], "workers of a dead process"
    assert checkpoint.latest(tmp_path).name == "checkpoint-5"


def die_when(file):
    while not file.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault("R21")
def test_a_rank_that_dies_while_the_first_evaluates_is_noticed_at_once(tmp_path):
    """Rank 0 is in no collective then: without the watch it would evaluate to its end."""

    def target(rank):
        def slow(model):
            (tmp_path / "evaluating").touch()
            time.sleep(60)

        made = trainer(tmp_path, 2, measure=slow)
        if rank == 1:
            threading.Thread(target=die_when, args=(tmp_path / "evaluating",)).start()
        made.train()

    ended = run(target)
    assert ended[0].status == 2, ended
    assert "rank 1 (process " in ended[0].output
    assert ended[0].seconds - ended[1].seconds < 30


@pytest.mark.fault("K52")
def test_a_save_that_fails_on_the_first_rank_is_an_error_on_all(tmp_path):
    def target(rank):
        def full(step):
            if step == 5:
                raise CheckpointError(f"cannot write {tmp_path}/x: no permission")

        trainer(tmp_path, 2, on_latest=full).train()

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert_one_message(ended, "saving at step 5 failed: cannot write", "no permission")
    assert "error" not in ended[1].output, "one of them says it"


@pytest.mark.fault("R19", "R22", "R44")
def test_an_evaluation_may_take_longer_than_a_collective(tmp_path):
    def slow(model):
        time.sleep(6)
        return evaluate(model)

    def target(rank):
        trainer(tmp_path, 2, steps=2, measure=slow, eval_steps=9).train()

    assert_all_well(run(target, timeout=4))  # 1 is little on a busy machine


@pytest.mark.slow
@pytest.mark.fault("R21", "R22")
def test_a_rank_that_hangs_ends_all_at_the_time_limit_of_collectives(tmp_path):
    def target(rank):
        def hangs(model, batch):
            if rank == 1:
                time.sleep(100)
            return loss(model, batch)

        trainer(tmp_path, 2, loss=hangs, measure=None).train()

    ended = run(target, timeout=12)  # 3 may be over on a busy machine before the training begins
    assert [process.status for process in ended] == [2, 2], ended
    assert max(process.seconds for process in ended) < 60
    assert_one_message(ended, "rank 0 waited in vain")
    assert re.search("Timed out waiting 12000ms|timeout caused pair closure", ended[0].output)
    assert "rank 1 is at test_distributed_training.py:" in ended[0].output
    assert "(hangs)" in ended[0].output


@pytest.mark.fault("R22")
def test_a_collective_that_another_ones_time_limit_ended_is_told_alike(tmp_path):
    """gloo raises this in every operation under way but the one whose time is over."""

    def target(rank):
        def torn(model, batch):
            if rank == 1:
                time.sleep(100)
            raise RuntimeError("Application timeout caused pair closure")

        trainer(tmp_path, 2, loss=torn, measure=None).train()

    ended = run(target)
    assert [process.status for process in ended] == [2, 2], ended
    assert_one_message(ended, "rank 0 waited in vain", "caused pair closure")
    assert "Traceback" not in ended[0].output


@pytest.mark.fault("K25", "R22")
@pytest.mark.parametrize("reached", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(tmp_path, reached):
    def target(rank):
        def signalled(model, batch):
            if rank == reached and model.calls == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            model.calls += 1
            return loss(model, batch)

        made = trainer(tmp_path, 2, loss=signalled, measure=None)
        made.network.calls = 0
        made.train()

    ended = run(target)
    assert [process.status for process in ended] == [143, 143], ended
    step = checkpoint.steps(tmp_path)[-1]
    assert 5 <= step <= 8
    assert f"after step {step} of 14" in ended[0].output
    assert_one_message(ended)


# -- a divided base --------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks that are called once in every process, one of them recomputed, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.to(self.head.weight.dtype)
        x = self.blocks[0](x)
        x = x + recompute(self.blocks[1], x, use_reentrant=False)
        return self.head(x + self.blocks[2](x)).float()


def deep(dtype):
    torch.manual_seed(1)
    model = Deep().to(dtype)
    inject(model, LoraConfig(["blocks.*.0", "blocks.*.2", "head"], r=2))
    return model


def deep_trainer(folder, world, sharded=False, dtype=torch.float32, **settings):
    model = deep(dtype)

    def loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean(), {}

    def evaluate(model):
        """On rank 0 alone, more than one pass, and with what a merge would do."""
        assert not any(hasattr(tensor, "full_tensor") for tensor in model.state_dict().values())
        model(X[:3])
        return {"score": 1 - (model(X) - Y).square().mean().item()}

    defaults = {"learning_rate": 1e-2, "steps": 10, "batch_size": 8 // world, "log_steps": 1}
    defaults |= {"eval_steps": 4, "seed": 3, "device": "cpu"}
    return LoraTrainer(
        model,
        training_arguments(folder, **defaults | settings, trainer={"save_steps": 4}),
        Points(45),
        collate,
        loss,
        evaluate,
        log=RunLog(
            Path(folder) / "tensorboard", Path(folder) / "log.csv", COLUMNS, tensorboard=False
        ),
        sharded=model.blocks if sharded else (),
        guards=Guards(keep_last=99),
    )


@pytest.mark.fault("R27", "K47")
def test_a_base_divided_among_processes_trains_the_same_adapter(tmp_path):
    """FSDP2 holds the frozen base, in fp32 and bf16; files and a resume on one process as ever."""

    def target(rank):
        for dtype in (torch.float32, torch.bfloat16):
            for sharded in (False, True):
                folder = tmp_path / f"{dtype}-{sharded}"
                made = deep_trainer(folder, 2, sharded, dtype)
                weight = made.network.blocks[0][0].weight
                assert hasattr(weight, "full_tensor") == sharded
                if sharded:
                    assert weight.to_local().numel() == weight.numel() // 2
                    adapter = made.network.blocks[0][0].lora_A["default"].weight
                    assert not hasattr(adapter, "full_tensor")
                made.train()
                assert not hasattr(made.network.blocks[0][0].weight, "full_tensor")
                torch.save(made.network.state_dict(), folder / f"weights-{rank}.pt")
        again = deep_trainer(tmp_path / "again", 2, sharded=True, steps=4)
        again.train()
        longer = deep_trainer(tmp_path / "again", 2, sharded=True)
        longer.train(True)

    ended = run(target)
    assert_all_well(ended)
    for dtype in (torch.float32, torch.bfloat16):
        whole, divided = (tmp_path / f"{dtype}-{sharded}" for sharded in (False, True))
        assert [row["loss"] for row in rows(divided)] == [row["loss"] for row in rows(whole)]
        for rank in range(2):
            one, other = saved(whole, rank), saved(divided, rank)
            assert not [name for name in one if not torch.equal(one[name], other[name])]
    divided = tmp_path / f"{torch.float32}-True"
    file = read_adapter(divided / "checkpoint-10" / "adapter")
    assert all(tensor.dtype == torch.float32 for tensor in file.tensors.values())
    alone = deep_trainer(divided, 1)
    alone.train(str(divided / "checkpoint-4"))
    assert_close(saved(tmp_path / f"{torch.float32}-False"), alone.network.state_dict())


@pytest.mark.fault("R27")
def test_a_base_cannot_be_divided_on_one_process_and_that_is_said(tmp_path, capsys):
    deep_trainer(tmp_path, 1, sharded=True, steps=1).train()
    assert "--shard_base has no effect on a single process" in capsys.readouterr().out
