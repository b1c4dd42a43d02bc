"""May this checkpoint be continued with these settings? And what is different from then?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_core.checkpoint.manifest_file import versions
from lora_core.errors import CheckpointError
from lora_core.report import say, table

# Words for `fingerprints`, whose values say nothing to a reader.
FINGERPRINTS = {"base": "base weights", "data": "training data"}
SHORT = 12  # letters of a fingerprint


def check(
    manifest: Mapping[str, Any],
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    world: Mapping[str, int],
    may_change: Collection[str],
) -> None:
    """Compare what a checkpoint's manifest says with this program; what may differ is said once.

    What one side does not know is not compared: an older version, or a caller that gives nothing.

    Args:
        manifest: of the checkpoint, see `lora_core.checkpoint`.
        settings: this run's, by name, as plain values.
        fingerprints: of what the settings only point to, such as "base" and "data".
        world: {"processes", "batch_size", "accumulation"} of this run.
        may_change: names of settings that a resumed run may change.

    Raises:
        CheckpointError: a difference with which the run would not be the same run.
    """
    then = dict(manifest.get("config") or {})
    changed = {
        name: (then[name], settings[name])
        for name in then
        if name in settings and _plain(then[name]) != _plain(settings[name])
    }
    unsafe = [[name, *values] for name, values in changed.items() if name not in may_change]
    before = dict(manifest.get("fingerprints") or {})
    unsafe += [
        [FINGERPRINTS.get(name, name), before[name][:SHORT], fingerprints[name][:SHORT]]
        for name in before
        if name in fingerprints and before[name] != fingerprints[name]
    ]
    if unsafe:
        rows = [[name, _word(old), _word(new)] for name, old, new in unsafe]
        raise CheckpointError(
            "the run cannot be continued, these have changed:\n"
            + table(["setting", "then", "now"], rows)
            + "\nResume with those of then; or start a new run, from this adapter if you like"
        )
    check_world(dict(manifest.get("world") or {}), world)
    safe = [
        f"{name} {_word(old)} -> {_word(new)}"
        for name, (old, new) in changed.items()
        if name in may_change
    ]
    if safe:
        say(f"changed for the rest of the run: {', '.join(safe)}")
    _say_versions(dict(manifest.get("versions") or {}))


def check_world(then: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Insist on the same number of samples per update: the order of the data hangs on it.

    Raises:
        CheckpointError: another one; the message has numbers that keep it.
    """
    if not then or dict(then) == dict(now):
        return
    samples = then["processes"] * then["batch_size"] * then["accumulation"]
    if samples == now["processes"] * now["batch_size"] * now["accumulation"]:
        say(
            f"{_world(then)} then, {_world(now)} now: the same samples per update in the same "
            "order, but sums are rounded otherwise and dropout differs"
        )
        return
    raise CheckpointError(
        f"the checkpoint had {samples} samples per update ({_world(then)}), now it would be "
        f"{_world(now)}.\n{_advice(samples, now)}"
    )


def _world(world: Mapping[str, int]) -> str:
    processes, batch, accumulation = (
        world[name] for name in ("processes", "batch_size", "accumulation")
    )
    return (
        f"{processes} process{'es' if processes > 1 else ''} x batch {batch} x {accumulation} "
        "accumulated"
    )


def _advice(samples: int, now: Mapping[str, int]) -> str:
    """Numbers that give `samples` per update on the processes that there are."""
    each, rest = divmod(samples, now["processes"])
    if rest:
        fitting = [str(n) for n in range(1, samples + 1) if samples % n == 0][:8]
        return f"Continue it on a number of processes that divides {samples}: {', '.join(fitting)}"
    batch = max(n for n in range(1, min(now["batch_size"], each) + 1) if each % n == 0)
    return f"Continue it with batch size {batch} and {each // batch} accumulated batches"


def _say_versions(then: Mapping[str, str]) -> None:
    now = versions()
    changed = [
        f"{name} {old} -> {now[name]}" for name, old in then.items() if now.get(name, old) != old
    ]
    if changed:
        say(f"warning: written with other versions, so not bit-equal: {', '.join(changed)}")


def _word(value: Any) -> str:
    """A setting in a message: 16 for 16.0, and for long ones their beginning."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain(value: Any) -> Any:
    """1 and 1.0 are the same setting, and so are a tuple and the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value
