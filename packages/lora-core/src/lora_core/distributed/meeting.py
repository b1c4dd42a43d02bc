"""How the processes of a run find each other.

Only torchrun's variables are read: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; those of Slurm or MPI mean other things under other launchers.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from lora_core.distributed.watch import Peer, this_process
from lora_core.errors import ConfigError


class Place(NamedTuple):
    """This process among the others, and where they meet."""

    rank: int
    world: int
    host: str
    port: int
    in_launcher: bool  # torchrun's agent holds the store, not rank 0

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def world_size() -> int:
    """The number of processes that the launcher has started; 1 without one."""
    return _number("WORLD_SIZE", "1")


def local_rank() -> int:
    """The number of this process on its machine, which is that of its device; 0 without others."""
    return _number("LOCAL_RANK", "0")


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError(f"WORLD_SIZE is set, but {name} is not: start with torchrun")
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value}: expected a number, as torchrun sets it") from None


def find_place() -> Place:
    """Read it from the launcher's variables.

    Raises:
        ConfigError: one is missing, or makes no sense.
    """
    rank, world = _number("RANK"), world_size()
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world}: start with torchrun")
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if not host:
        raise ConfigError("WORLD_SIZE is set, but MASTER_ADDR is not: start with torchrun")
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port}: a port is a number from 1 to 65535")
    in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, world, host, port, in_launcher)


def meet(place: Place, limit: float) -> tuple[dist.Store, list[Peer]]:
    """Connect to the store, and find all others; rank 0 opens it unless the launcher has.

    Rank 0 listens at the given address only, not at all addresses of its machine.
    """
    deadline = time.monotonic() + limit
    server = None
    if place.rank == 0 and not place.in_launcher and not dist.is_initialized():
        listener = _listen(place)
        server = dist.TCPStore(
            place.host, place.port, None, True, timedelta(seconds=limit),
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip
    _wait_for_answer(place, deadline)
    try:
        store = server or _connect(place, deadline)
        return _introduce(store, place, deadline)
    except dist.DistError as error:
        raise _stranger(place, str(error).splitlines()[0]) from error


def _connect(place: Place, deadline: float) -> dist.Store:
    """Open the store of another process; torch waits for ever for a greeting of a stranger."""
    found: list[dist.Store | dist.DistError] = []
    limit = max(deadline - time.monotonic(), 1)

    def connect() -> None:
        try:
            store = dist.TCPStore(
                place.host,
                place.port,
                None,
                False,
                timedelta(seconds=limit),
                wait_for_workers=False,
            )
            found.append(store)
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit)
    if not found:
        raise _stranger(place, "no greeting")
    if isinstance(found[0], dist.DistError):
        raise found[0]
    return found[0]


def _stranger(place: Place, reason: str) -> ConfigError:
    return ConfigError(
        f"{place.address} answers, but not as the meeting point of this run ({reason}): check "
        "MASTER_ADDR and MASTER_PORT"
    )


def _listen(place: Place) -> socket.socket:
    family, *_, address = _resolve(place)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(place.world + 64)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"rank 0 cannot listen at {place.address}: {error.strerror}. MASTER_ADDR must be an "
            "address of rank 0's machine, and MASTER_PORT must be free: choose another one"
        ) from error
    return listener


def _resolve(place: Place) -> list[Any]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise ConfigError(f"MASTER_ADDR={place.host}: no such host ({error})") from error


def _wait_for_answer(place: Place, deadline: float) -> None:
    """Wait until somebody listens at the meeting point: rank 0 may start later than this one."""
    _resolve(place)
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((place.host, place.port), min(left, 5)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.2, max(left, 0)))
    raise ConfigError(
        f"rank {place.rank} finds no rank 0 at {place.address} ({reason}): check MASTER_ADDR and "
        "MASTER_PORT, whether rank 0 runs, and whether a firewall lets this machine through"
    )


def _introduce(store: dist.Store, place: Place, deadline: float) -> tuple[dist.Store, list[Peer]]:
    """Let all processes know each other, and give them a part of the store of their own.

    torchrun keeps its store when it starts the processes again, so what earlier ones have left is
    in it, and the nodes need not agree on how often that was. Each process therefore introduces
    itself with a random number, rank 0 lists them all, and the list counts once each has signed it.
    """
    own = json.dumps({"nonce": secrets.token_hex(8), **asdict(this_process(place.rank))})
    ranks = range(place.world)
    store.set(f"lora/hello/{place.rank}", own)
    while True:
        absent = [rank for rank in ranks if not store.check([f"lora/hello/{rank}"])]
        if place.rank == 0 and not absent:
            hellos = [store.get(f"lora/hello/{rank}").decode() for rank in ranks]
            store.set("lora/list", json.dumps(hellos))
        if not absent and store.check(["lora/list"]):
            text = store.get("lora/list")
            listed, signature = json.loads(text), hashlib.sha256(text).hexdigest()
            current = len(listed) == place.world and listed[place.rank] == own
            if current:
                store.set(f"lora/signed/{place.rank}", signature)
            absent = [rank for rank in ranks if not _has_signed(store, rank, signature)]
            if current and not absent:
                people = [json.loads(hello) for hello in listed]
                peers = [Peer(**{k: v for k, v in p.items() if k != "nonce"}) for p in people]
                return dist.PrefixStore(f"lora/{signature}", store), peers
        if time.monotonic() > deadline:
            missing = ", ".join(map(str, absent[:20] or [0]))
            raise ConfigError(
                f"{place.world} processes were to meet at {place.address}, but these ranks did not "
                f"come: {missing}. See what they said on their machines"
            )
        time.sleep(0.02)


def _has_signed(store: dist.Store, rank: int, signature: str) -> bool:
    key = f"lora/signed/{rank}"
    return store.check([key]) and store.get(key).decode() == signature


def stay_on_this_machine(place: Place) -> None:
    """Let gloo listen at the loopback device where all processes run on one machine."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(place.world)
    if alone and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
