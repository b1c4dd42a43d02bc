"""How processes find each other, what they say when they do not, and who starts them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_core import distributed
from lora_core.errors import ConfigError
from lora_core.testing.processes import free_port, run
from lora_core.training.arguments import choose_device

CPU = torch.device("cpu")
SOURCE = Path(distributed.__file__).parent
TEMPLATE = Path(__file__).parents[3] / "docs" / "train.slurm"


def meet(rank, seconds=1.5):
    distributed.join(CPU, meeting=seconds)


def messages(ended):
    for process in ended:
        assert process.in_time
        assert process.seconds < 30
        assert "Traceback" not in process.output
    return [process.output for process in ended]


# -- meeting ---------------------------------------------------------------------------------------


@pytest.mark.fault("R26")
def test_a_port_in_use_is_named_by_rank_0(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run(meet, envs={0: {"MASTER_PORT": str(port)}, 1: {"RANK": "1"}}, limit=20)
    first, second = messages(ended)
    assert [process.status for process in ended] == [2, 2]
    assert f"rank 0 cannot listen at 127.0.0.1:{port}: Address already in use" in first
    assert "MASTER_PORT must be free" in first
    assert "rank 1 finds no rank 0 at 127.0.0.1:" in second


@pytest.mark.fault("R26")
@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid: no such host"),
        ({"MASTER_PORT": "1"}, "finds no rank 0 at 127.0.0.1:1 (Connection refused)"),
        ({"MASTER_ADDR": "192.0.2.1"}, "finds no rank 0 at 192.0.2.1:"),  # answers nothing
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: expected a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not: start with torchrun"),
        ({"RANK": "7"}, "RANK=7 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a number"),
    ],
)
def test_a_wrong_meeting_point_is_named_after_a_bounded_time(env, part):
    ended = run(lambda rank: meet(1), world=1, env={"WORLD_SIZE": "2", "RANK": "1"} | env, limit=20)
    (said,) = messages(ended)
    assert ended[0].status == 2
    assert part in said


@pytest.mark.fault("R26")
def test_an_address_of_another_machine_cannot_be_listened_at():
    (said,) = messages(run(meet, world=1, env={"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"}))
    assert "rank 0 cannot listen at 192.0.2.1:" in said
    assert "an address of rank 0's machine" in said


@pytest.mark.fault("R26")
def test_something_else_at_the_address_is_not_taken_for_the_run():
    """An HTTP server, say, that answers nothing sensible."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": port}
        (said,) = messages(run(meet, world=1, env=env, limit=20))
    assert f"127.0.0.1:{port} answers, but not as the meeting point of this run" in said


@pytest.mark.fault("R26", "R28")
def test_ranks_that_do_not_come_are_listed():
    def target(rank):
        if rank != 2:
            meet(rank)

    ended = run(target, world=3, limit=20)
    assert [process.status for process in ended] == [2, 2, 0]
    assert "3 processes were to meet at 127.0.0.1:" in ended[0].output
    assert "these ranks did not come: 2" in ended[0].output


@pytest.mark.fault("R26")
def test_a_rank_that_comes_late_is_waited_for():
    def target(rank):
        time.sleep(1.5 * (rank == 0))
        meet(rank, 20)
        assert distributed.sum_over_ranks(rank + 1, CPU) == 3

    assert [process.status for process in run(target)] == [0, 0]


@pytest.mark.fault("R28")
def test_processes_that_are_started_again_do_not_see_what_the_earlier_ones_left():
    """As under torchrun, whose store outlives them; now rank 0 and now rank 1 comes late."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}

    def dies(rank):
        with distributed.together(CPU):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            distributed.sum_over_ranks(1, CPU)

    def works(rank, late):
        time.sleep(0.5 * (rank == late))
        with distributed.together(CPU):
            for pause in (0.0, 1.0, 0.0):  # 1 s: enough to hear of a failure
                assert distributed.sum_over_ranks(1, CPU) == 2
                assert distributed.first_rank_decides(lambda: rank + 7, CPU) == 7
                time.sleep(pause)

    assert [process.status for process in run(dies, env=env)] == [2, -9]
    for late in (0, 1, 0):
        ended = run(partial(works, late=late), env=env)
        assert [process.status for process in ended] == [0, 0], ended


def listening():
    """Addresses (as in /proc/net/tcp) that this process listens at."""
    own = set()
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists the folder
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(handle)):
                own.add(match[1])
    lines = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and line[9] in own}


@pytest.mark.fault("H39")
def test_a_run_on_one_machine_listens_at_the_loopback_device_only(tmp_path):
    def target(rank):
        with distributed.together(CPU):
            assert distributed.sum_over_ranks(1, CPU) == 2  # which connects gloo
            found = listening()
            assert found, "the test looks in the wrong place"
            # 127.0.0.1, and the same written as an IPv6 address
            assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}, found
            # which does not depend on the host having no other device
            assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"

    ended = run(target)
    assert [process.status for process in ended] == [0, 0], ended


@pytest.mark.fault("R22", "K52")
def test_what_the_first_rank_decides_reaches_all_and_so_do_its_errors():
    def target(rank):
        assert distributed.first_rank_decides(lambda: rank + 7, CPU) == 7

        def refuse():
            raise ConfigError("--output_dir /x: no permission")

        distributed.first_rank_decides(refuse, CPU)

    ended = run(target, world=3)
    assert [process.status for process in ended] == [2, 2, 2]
    assert ended[0].output == "error: --output_dir /x: no permission\n"
    assert [process.output for process in ended[1:]] == ["", ""], "it is said once"


def test_processes_share_work_and_wait_for_each_other(tmp_path):
    def target(rank):
        def work(own):
            time.sleep(1.5 * rank)
            for number in range(5)[own]:
                (tmp_path / f"{number} by {rank}").touch()

        with distributed.together(CPU):
            distributed.in_shares(work, CPU)
            assert len(list(tmp_path.iterdir())) == 5

    ended = run(target)
    assert [process.status for process in ended] == [0, 0], ended
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["0 by 0", "1 by 1", "2 by 0", "3 by 1", "4 by 0"]


def test_one_process_needs_nothing_of_all_this(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = []
    with distributed.together(CPU):
        distributed.in_shares(lambda own: done.extend(range(3)[own]), CPU)
        assert distributed.first_rank_decides(lambda: 3, CPU) == 3
        distributed.wait_for_first()
        assert distributed.sum_over_ranks(2.5, CPU) == 2.5
    assert done == [0, 1, 2]
    assert not torch.distributed.is_initialized()


@pytest.mark.fault("C36", "R29")
def test_more_processes_than_gpus_are_refused_before_cuda_is_touched(monkeypatch):
    """A machine with two GPUs cannot be had here: only its answers to these two questions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"number 3 of its machine, and torch sees 2; start one"):
        choose_device("cuda")


# -- launchers -------------------------------------------------------------------------------------


@pytest.mark.fault("R29")
def test_only_what_torchrun_sets_is_read_from_the_environment():
    """Variables of Slurm, MPI and others mean other things under other launchers."""
    known = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    known |= {"TORCHELASTIC_USE_AGENT_STORE"}
    text = "".join(path.read_text() for path in SOURCE.glob("*.py"))
    assert not re.findall(r"SLURM|OMPI_|PMI_|PMIX", text)
    text = (SOURCE / "meeting.py").read_text()
    names = set(re.findall(r'(?:environ\.get\(|_number\()"([A-Z_]+)"', text))
    assert names == known


@pytest.mark.fault("R29", "R28")
def test_the_slurm_template_starts_one_torchrun_per_node_and_resumes(tmp_path):
    """Run with stand-ins for Slurm's commands, which only a cluster has."""
    for name, script in {"scontrol": "echo node-a; echo node-b", "srun": 'echo "$*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert subprocess.run(["bash", "-n", TEMPLATE], check=False).returncode == 0
    text = TEMPLATE.read_text()
    for line in ("#SBATCH --ntasks-per-node=1", "#SBATCH --requeue", "#SBATCH --signal=TERM@"):
        assert line in text
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345"}
    env |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(["bash", TEMPLATE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-endpoint=node-a:",
        "--rdzv-id=12345",
        "--max-restarts=",
        "--resume latest",
    ):
        assert word in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.fault("R29", "R30", "R31")
def test_every_launcher_gives_the_same_run(tmp_path):
    """One process each, without HOME, offline, on a narrow terminal that can do nothing."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    module = [sys.executable, "-m"]
    torchrun = [*module, "torch.distributed.run", "--nproc-per-node", "1", "--master-port"]
    accelerate = [*module, "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    launchers = {
        "python": [sys.executable],
        "torchrun": [*torchrun, str(free_port())],
        "accelerate": [*accelerate, "--num_processes", "1"],
    }
    env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    env |= {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "40", "HF_HUB_OFFLINE": "1"}
    env |= {"XDG_CACHE_HOME": "/proc/none", "HF_HOME": "/proc/none"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {
        name: subprocess.Popen([*start, str(script), str(tmp_path / name)], env=env, **pipe)
        for name, start in launchers.items()
    }
    found = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert "\x1b" not in out, "no terminal, no control sequences"
        found[name] = [line for line in out.splitlines() if line.startswith("loss of step 4")]
    assert found["python"] == found["torchrun"] == found["accelerate"]
    assert len(found["python"]) == 1


SCRIPT = """
import sys
import torch
from torch import nn
from lora_core.config import LoraConfig
from lora_core.errors import run
from lora_core.injection import inject
from lora_core.report import say
from lora_core.trainer import LoraTrainer, training_arguments

def main(argv):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inject(model, LoraConfig(["0", "2"], r=2))
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    data = list(zip(x, x.sum(1, keepdim=True)))
    losses = []
    def loss(model, batch):
        value = (model(batch["x"]) - batch["y"]).square().mean()
        losses.append(value.item())
        return value, {}
    args = training_arguments(argv[0], learning_rate=0.1, steps=4, batch_size=4, device="cpu")
    def collate(samples):
        x, y = zip(*samples)
        return {"x": torch.stack(x), "y": torch.stack(y)}
    LoraTrainer(model, args, data, collate, loss).train()
    say(f"loss of step 4: {losses[-1]:.4f}")

if __name__ == "__main__":
    sys.exit(run(main))
"""
