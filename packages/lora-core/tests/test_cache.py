"""The feature cache: bit-equal, found by content, healed when damaged, bounded, shared."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch
from torch import nn

from lora_core.cache import ALIGNED, DTYPES, FeatureCache, fingerprint
from lora_core.config import LoraConfig
from lora_core.errors import CheckpointError
from lora_core.injection import inject
from lora_core.merging import merge
from lora_core.testing import corrupt, disturb

GB = 10**9


def values(seed=0):
    """Tensors of many dtypes, shapes and memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, 2, generator=generator)
    return {
        "float": x,
        "transposed": x.transpose(0, 1),
        "half": x.half(),
        "bf16": x.bfloat16(),
        "double": x.double(),
        "index": torch.arange(5),
        "mask": x > 0,
        "byte": torch.arange(256, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].is_contiguous()
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], value)]
        assert torch.equal(*raw), name


def never():
    raise AssertionError("computed again")


def entries(folder):
    return sorted(folder.glob("*/*.features"))


def test_values_come_back_bit_for_bit_from_memory_and_from_disk(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    same(cache.get({"image": "a"}, values), values())
    same(cache.get({"image": "a"}, never), values())
    same(FeatureCache(tmp_path, GB).get({"image": "a"}, never), values())
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_that_a_file_names_comes_back(tmp_path, name):
    raw = torch.arange(1, 49, dtype=torch.uint8)
    expected = {"x": (raw % 2 if name == "BOOL" else raw).view(DTYPES[name]).reshape(2, -1)}
    cache = FeatureCache(tmp_path, GB)
    cache.keep({"k": "v"}, expected)
    same(cache.get({"k": "v"}, never), expected)
    (path,) = entries(tmp_path)
    assert f'"{name}"'.encode() in path.read_bytes()


def test_values_lie_as_torch_would_lay_them_and_are_nobody_elses(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    for _ in range(2):  # what is done to one value is not seen in the next
        found = cache.get({"k": "v"}, never)
        same(found, values())
        for tensor in found.values():
            assert tensor.data_ptr() % ALIGNED == 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor.zero_()


def test_gradients_and_live_tensors_are_not_kept(tmp_path):
    x = torch.ones(3, requires_grad=True)
    found = FeatureCache(tmp_path, GB).get({"k": "v"}, lambda: {"y": x * 2})
    assert not found["y"].requires_grad


@pytest.mark.fault("D44")
def test_every_part_of_the_key_counts_and_its_order_does_not(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    keys = [
        {"a": "1", "b": "2"},
        {"a": "1"},
        {"a": "12"},
        {"a": "1", "b": "2 "},
        {"b": "1", "a": "2"},
    ]
    for seed, key in enumerate(keys):
        cache.get(key, lambda seed=seed: values(seed))
    for seed, key in enumerate(keys):
        same(cache.get(dict(reversed(key.items())), never), values(seed))
    with pytest.raises(TypeError, match="must be strings"):
        cache.get({"a": 1}, values)


@pytest.mark.fault("D45")
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "text"])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    data = bytearray(path.read_bytes())
    if damage in ("flip", "header"):
        data[-1 if damage == "flip" else 60] ^= 1
    path.write_bytes({"cut": data[:100], "empty": b"", "text": b"<html>"}.get(damage, bytes(data)))
    same(cache.get({"k": "v"}, values), values())
    assert cache.healed == 1
    same(cache.get({"k": "v"}, never), values())


@pytest.mark.fault("D45", "R40")
@pytest.mark.parametrize("damage", corrupt.DAMAGE)
def test_every_damage_is_healed_and_said_once(tmp_path, damage, capsys):
    cache = FeatureCache(tmp_path, GB)
    for key in "ab":
        cache.get({"k": key}, values)
    for path in entries(tmp_path):
        corrupt.DAMAGE[damage](path)
        if damage == "folder":
            (path / "x").write_text("not even to be replaced")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for key in "ab":
            same(cache.get({"k": key}, values), values())
    text = capsys.readouterr().out
    if damage == "folder":
        assert len([w for w in said if "going on without storing" in str(w.message)]) == 1
        return
    assert text.count("is damaged: it is computed again") == 1
    for key in "ab":
        same(cache.get({"k": key}, never), values())
    assert not capsys.readouterr().out


@pytest.mark.fault("D45")
def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    for count, _ in enumerate(corrupt.flips(path, 150), start=1):
        same(cache.get({"k": "v"}, values), values())
        assert cache.healed == count


# -- when an entry is compared with its digest -----------------------------------------------------


def settled(path):
    """Make a file a minute old, as one of an earlier run; its times."""
    os.utime(path, (time.time() - 60,) * 2)
    return path.stat()


def flip(path):
    """Change one bit of the last tensor in place."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def times_back(path, status):
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def changed(path, status):
    flip(path)


def replaced(path, status):
    """Put another file in place of one, of the same length and times."""
    data = path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    other.replace(path)
    times_back(path, status)


def cut(path, status):
    path.write_bytes(path.read_bytes()[:-8])
    times_back(path, status)


@pytest.mark.fault("D45")
@pytest.mark.parametrize("damage", [changed, replaced, cut])
def test_an_entry_that_was_read_is_compared_again_when_its_file_has_changed(tmp_path, damage):
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    status = settled(path)
    for _ in range(2):
        same(cache.get({"k": "v"}, never), values())
    damage(path, status)
    same(cache.get({"k": "v"}, values), values())
    assert cache.healed == 1
    same(cache.get({"k": "v"}, never), values())


@pytest.mark.fault("D45")
def test_a_change_without_a_trace_is_noticed_by_those_who_have_not_read_the_entry(tmp_path):
    """The limit of what is noticed: not in the process that found the entry whole before."""
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    status = settled(path)
    cache.get({"k": "v"}, never)
    flip(path)
    times_back(path, status)
    cache.get({"k": "v"}, never)
    other = FeatureCache(tmp_path, GB)
    same(other.get({"k": "v"}, values), values())
    assert (cache.healed, other.healed) == (0, 1)
    same(cache.get({"k": "v"}, never), values())


@pytest.mark.fault("D45")
def test_a_new_entry_is_compared_at_each_reading(tmp_path):
    """It may change twice within one step of the file system's clock."""
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    cache.get({"k": "v"}, never)
    status = path.stat()
    flip(path)
    times_back(path, status)
    same(cache.get({"k": "v"}, values), values())
    assert cache.healed == 1


@pytest.mark.fault("D45")
@pytest.mark.parametrize("how", [shutil.copy, shutil.copy2, shutil.move])
def test_an_entry_under_the_name_of_another_is_computed_again(tmp_path, how, capsys):
    cache = FeatureCache(tmp_path, GB)
    paths = [cache.path({"k": key}) for key in "ab"]
    for seed, (key, path) in enumerate(zip("ab", paths, strict=True)):
        cache.get({"k": key}, lambda seed=seed: values(seed))
        settled(path)
        cache.get({"k": key}, never)
    how(paths[0], paths[1])
    same(cache.get({"k": "b"}, lambda: values(1)), values(1))
    assert capsys.readouterr().out.count(f"{paths[1]} is damaged: it is computed again") == 1
    same(cache.get({"k": "b"}, never), values(1))


def test_reading_an_entry_leaves_its_time_of_modification(tmp_path):
    """Otherwise processes that share a folder would hash what others have read."""
    cache = FeatureCache(tmp_path, GB)
    cache.get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    before = settled(path)
    cache.get({"k": "v"}, never)
    after = path.stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_atime_ns > before.st_atime_ns + 50 * 10**9  # the time of last use


# -- full disks, other processes -------------------------------------------------------------------


def fill(folder, results):
    """A process whose files may have at most 2000 bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cache = FeatureCache(folder, GB)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [cache.get({"k": str(i)}, lambda: {"x": torch.ones(1000)}) for i in range(3)]
    good = all(bool((one["x"] == 1).all()) for one in found)
    results.put((good, [str(w.message) for w in said], [p.name for p in folder.rglob("*.*")]))


@pytest.mark.fault("R40")
def test_on_a_full_disk_it_goes_on_without_storing_and_leaves_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=fill, args=(tmp_path, results))
    worker.start()
    good, said, left = results.get(timeout=30)
    worker.join(10)
    assert good
    assert len(said) == 1
    assert "cannot write" in said[0]
    assert "going on without storing features" in said[0]
    assert not left


def compute_slowly(folder, started, results):
    cache = FeatureCache(folder, GB)

    def compute():
        started.wait(10)  # every process is computing the same entry at once
        return values()

    cache.get({"k": "v"}, compute)
    same(cache.get({"k": "v"}, never), values())
    results.put(cache.misses)


@pytest.mark.fault("R39")
def test_processes_that_make_one_entry_at_once_leave_one_whole_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=compute_slowly, args=(tmp_path, started, results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=30) for _ in workers] == [1, 1, 1]
    for worker in workers:
        worker.join(10)
    assert len(entries(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    same(FeatureCache(tmp_path, GB).get({"k": "v"}, never), values())


@pytest.mark.fault("R38")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_pass_that_is_interrupted_is_continued_where_it_was(tmp_path, how):
    """Killed or stopped while it computes the fourth of six: three are there, and whole."""

    def dies():
        os.kill(os.getpid(), how)
        time.sleep(10)

    def first_pass():
        cache = FeatureCache(tmp_path, GB)
        for number in range(6):
            cache.get({"k": str(number)}, values if number < 3 else dies)

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            first_pass()
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-how if how == signal.SIGKILL else 3)
    again = FeatureCache(tmp_path, GB)
    for number in range(6):
        same(again.get({"k": str(number)}, never if number < 3 else values), values())
    assert (again.hits, again.misses, again.healed) == (3, 3, 0)


@pytest.mark.fault("R39")
def test_a_folder_of_another_user_is_used_as_far_as_it_can_be(tmp_path, monkeypatch):
    FeatureCache(tmp_path, GB).get({"k": "v"}, values)

    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    same(FeatureCache(tmp_path, GB).get({"k": "v"}, never), values())


def test_an_error_while_computing_leaves_nothing_behind(tmp_path):
    cache = FeatureCache(tmp_path, GB)
    with pytest.raises(AssertionError):
        cache.get({"k": "v"}, never)
    assert not list(tmp_path.rglob("*.*"))
    same(cache.get({"k": "v"}, values), values())


def test_the_folder_stays_below_its_bound_and_keeps_what_was_used_last(tmp_path):
    cache = FeatureCache(tmp_path, 100_000)

    def block():
        return {"x": torch.zeros(2000)}  # 8,000 bytes and a header

    cache.get({"k": "kept"}, block)
    for i in range(40):
        cache.get({"k": str(i)}, block)
        cache.get({"k": "kept"}, never)
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 100_000
    assert 8 <= len(entries(tmp_path)) <= 12
    cache.get({"k": "39"}, never)
    assert not cache.path({"k": "0"}).exists()


def test_a_bound_below_what_one_run_uses_is_said_once(tmp_path, capsys):
    value = {"x": torch.zeros(1000)}
    earlier = FeatureCache(tmp_path, 50_000)
    for number in range(10):
        earlier.get({"earlier": str(number)}, lambda: value)
    time.sleep(0.05)  # the clock of the file system is coarse
    cache = FeatureCache(tmp_path, 50_000)
    for number in range(6):  # those of the earlier run go
        cache.get({"number": str(number)}, lambda: value)
    assert "note" not in capsys.readouterr().out
    for number in range(40):
        cache.get({"number": str(number)}, lambda: value)
    assert capsys.readouterr().out.count("some are computed again and again; allow more") == 1


def test_a_value_larger_than_the_bound_is_not_stored(tmp_path):
    cache = FeatureCache(tmp_path, 1000)
    for _ in range(2):
        assert cache.get({"k": "v"}, lambda: {"x": torch.ones(1000)})["x"].sum() == 1000
    assert not entries(tmp_path)
    assert cache.misses == 2


@pytest.mark.fault("R39")
def test_left_overs_of_dead_processes_are_removed(tmp_path):
    FeatureCache(tmp_path, GB).get({"k": "v"}, values)
    (path,) = entries(tmp_path)
    old, new = path.with_name(".a.features.0.tmp"), path.with_name(".b.features.1.tmp")
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    FeatureCache(tmp_path, GB).get({"k": "w"}, values)
    assert not old.exists()
    assert new.exists()


@pytest.mark.fault("R40")
def test_without_a_place_to_write_it_goes_on_and_says_so_once(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", GB)
    with pytest.warns(UserWarning, match="going on without storing"):
        same(cache.get({"k": "v"}, values), values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(cache.get({"k": "v"}, values), values())


def use(folder, number, results):
    """One process: everything in its own order, with deletions and damage in between."""
    torch.set_num_threads(1)
    cache, wrong = FeatureCache(folder, 150_000), 0
    order = torch.randperm(60, generator=torch.Generator().manual_seed(number)).tolist()
    for i in [*order, *order]:
        found = cache.get({"k": str(i % 20)}, lambda i=i: {"x": torch.full((2500,), float(i % 20))})
        wrong += not bool((found["x"] == i % 20).all())
        if i == 30:
            cache.path({"k": "5"}).write_bytes(b"damage")
    results.put((wrong, cache.hits))


@pytest.mark.fault("R39")
def test_several_processes_share_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=use, args=(tmp_path, n, results)) for n in range(3)]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [wrong for wrong, _ in outcomes] == [0, 0, 0]
    assert all(hits > 0 for _, hits in outcomes)
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 150_000 * (1 + 3 / 64)
    assert not list(tmp_path.glob("*/.*.tmp"))


# -- fingerprints ----------------------------------------------------------------------------------


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def test_a_model_is_known_by_its_names_dtypes_shapes_and_bits():
    first = fingerprint(net())
    assert len(first) == 64
    assert fingerprint(net()) == first
    changes = [net(1), net().half(), nn.Sequential(*net(), nn.ReLU(), nn.Linear(1, 1))]
    flipped = net()
    with torch.no_grad():
        flipped[1].running_mean[0] = -0.0
    renamed = nn.ModuleDict({"a": net()[0], "1": net()[1]})
    found = {fingerprint(model) for model in [*changes, flipped, renamed]}
    assert len(found | {first}) == 6


def test_adapters_do_not_change_the_fingerprint_of_their_base_but_merging_does():
    model, before = net(), fingerprint(net())
    inject(model, LoraConfig(["0"], r=2))
    disturb(model)
    assert fingerprint(model) == before
    merge(model)
    assert fingerprint(model) != before


def test_tensors_by_name_in_any_order():
    tensors = values()
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    assert fingerprint(tensors) != fingerprint(tensors | {"scalar": torch.tensor(3.25)})


def test_files_and_folders_by_content_not_by_place(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "x.bin").write_bytes(b"one")
    (tmp_path / "a" / "sub" / "y.bin").write_bytes(b"two")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "sub" / "y.bin").rename(tmp_path / "b" / "y.bin")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a" / "x.bin") == fingerprint(
        shutil.copy(tmp_path / "a" / "x.bin", tmp_path / "z")
    )
    with pytest.raises(CheckpointError, match=r"cannot read .*missing"):
        fingerprint(tmp_path / "missing")


def test_a_value_can_be_looked_for_and_kept_without_computing_it(tmp_path):
    cache = FeatureCache(tmp_path, 10**6)
    assert cache.find({"a": "1"}) is None
    kept = cache.keep({"a": "1"}, {"x": torch.arange(6.0).view(2, 3).T})
    assert kept["x"].is_contiguous()
    found = cache.find({"a": "1"})
    assert found is not None
    assert torch.equal(found["x"], kept["x"])
    assert (cache.hits, cache.misses) == (1, 1)
    assert torch.equal(cache.get({"a": "1"}, dict)["x"], kept["x"])
