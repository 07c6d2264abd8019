"""dpo/store.py: what torn files, killed writers, many writers and a full disk can do to a store, and the command."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_exactness import random_tree
from test_reference import TREES, Runs, ask, completions, equal, forbidden, made_up, read_store, tag, write_small_rows

import dpo.store
import dpo.train
from dpo.reference import Usage
from dpo.store import main, open_store, parts_of, read_values, write_part

KEYS = [n.to_bytes(16, "big") for n in range(4000)]


def numbered(folder: Path, begin: int, end: int) -> None:
    """A part whose value n is n twos, or ones, of n."""
    write_part(folder, {KEYS[n]: np.full(1 + n % 2, n, np.float32) for n in range(begin, end)})


def is_numbered(values: dict[bytes, np.ndarray]) -> bool:
    return all(np.array_equal(v, np.full(1 + (n := int.from_bytes(k, "big")) % 2, n)) for k, v in values.items())


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [1, 40, 3000])
def test_a_read_finds_what_is_asked_for_among_many_parts_and_nothing_else(tmp_path, asked):
    for begin in range(0, 3000, 1000):
        numbered(tmp_path, begin, begin + 1000)
    wanted = {KEYS[n] for n in random.Random(asked).sample(range(3500), asked)} | {KEYS[3600], KEYS[17]}
    found = read_values(tmp_path, wanted)
    assert found.keys() == {key for key in wanted if int.from_bytes(key, "big") < 3000} and is_numbered(found)
    assert read_values(tmp_path, set()) == {}


def test_a_value_has_its_own_check_so_that_a_flipped_bit_costs_that_value_alone(tmp_path):
    numbered(tmp_path, 0, 1000)
    (part,) = parts_of(tmp_path)
    data = bytearray(part.read_bytes())
    place = data.index(np.full(2, 501, "<f4").tobytes())
    data[place] ^= 1
    part.write_bytes(data)
    for wanted in ({KEYS[501]}, set(KEYS)):  # one by one, and the part as a whole
        assert read_values(tmp_path, wanted).keys() == {key for key in wanted if key in KEYS[:1000]} - {KEYS[501]}


# --- torn files and many writers ------------------------------------------------------------------------------------


def only_part(folder: Path) -> Path:
    (part,) = parts_of(folder)
    return part


def test_a_flipped_bit_anywhere_in_a_part_is_never_read_as_another_value(tmp_path):
    """Every byte of a whole small part, header and values."""
    folder = open_store(tmp_path, "w", tag())
    trees = TREES[:1]
    values, _ = ask(folder, trees)
    part, sound = only_part(folder), read_store(folder)
    data, draw, harmless = part.read_bytes(), random.Random(0), 0
    for position in range(len(data)):
        torn = bytearray(data)
        torn[position] ^= 1 << draw.randrange(8)
        part.write_bytes(torn)
        read = read_values(folder, sound.keys())
        assert all(value.dtype == sound[key].dtype and np.array_equal(value, sound[key]) for key, value in read.items())
        harmless += read.keys() == sound.keys()  # a bit of no meaning, such as a blank of the header's padding
    assert harmless < 0.1 * len(data)
    part.write_bytes(data[:-1])
    again, usage = ask(folder, trees)
    assert usage.misses == completions(trees) and equal(again, values)
    assert ask(folder, trees, forbidden)[1].misses == 0  # computed again, and kept


def test_a_truncated_part_is_passed_over_wherever_it_ends(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    trees = TREES[:1]
    values, _ = ask(folder, trees)
    part = only_part(folder)
    data = part.read_bytes()
    for length in range(len(data)):
        part.write_bytes(data[:length])
        assert read_store(folder) == {}
    part.write_bytes(data + b"\0")
    assert read_store(folder) == {}
    again, usage = ask(folder, trees)
    assert usage.misses == completions(trees) and equal(again, values)


def test_one_torn_part_does_not_take_the_others_with_it(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    ask(folder, TREES[:5])
    part = only_part(folder)
    ask(folder, TREES[5:])
    part.write_bytes(part.read_bytes()[:-7])
    values, usage = ask(folder, TREES)
    assert usage == Usage(hits=completions(TREES[5:]), misses=completions(TREES[:5])) and equal(values, made_up(TREES))


def test_a_file_of_another_kind_among_the_parts_is_passed_over(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    save_file({"keys": torch.zeros(2)}, folder / "part-foreign.safetensors")
    (folder / "part-empty.safetensors").touch()
    (folder / "part-folder.safetensors").mkdir()
    assert equal(ask(folder, TREES)[0], made_up(TREES))


WRITERS = """
import multiprocessing, os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "tests")]
import numpy as np
import dpo.reference
from dpo.reference import Usage, reference_logps
from dpo.store import write_part
from test_exactness import ALONE, random_tree
from test_reference import made_up

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid

def big_parts():
    draw = random.Random(os.getpid())
    while True:
        numbers = [draw.randrange(10**6) for _ in range(4)]
        write_part(folder, {n.to_bytes(16, "big"): np.full(50_000, n, np.float32) for n in numbers})

all_have_read = multiprocessing.get_context("fork").Barrier(4)

def whole_pass():
    def computed(*given):
        if not calls:
            all_have_read.wait(60)
        calls.append(1)
        return made_up(*given)

    calls, dpo.reference.WRITE_EVERY_TREES = [], 2
    reference_logps(folder, [random_tree(seed) for seed in range(60)], computed, ALONE, Usage())

folder = Path(sys.argv[3])
if sys.argv[2] == "killed":
    for round in range(15):
        pid = child(big_parts)
        time.sleep(random.Random(round).uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
else:
    for pid in [child(whole_pass) for _ in range(4)]:
        assert os.waitpid(pid, 0)[1] == 0
"""


def run_writers(mode: str, folder: Path) -> None:
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", WRITERS, str(root), mode, str(folder)], check=True, timeout=120)


def test_a_writer_killed_at_any_moment_leaves_no_torn_value(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    run_writers("killed", folder)
    values = read_store(folder)
    assert len(values) > 15
    for key, value in values.items():
        assert value.shape == (50_000,) and bool((value == int.from_bytes(key, "big")).all())
    assert len(list(folder.glob("part-*"))) * 4 >= len(values)  # what was cut off lies under no part's name


def test_processes_that_fill_a_store_at_once_leave_it_whole(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    run_writers("together", folder)
    trees = [random_tree(seed) for seed in range(60)]
    values, usage = ask(folder, trees, forbidden)
    assert usage.misses == 0 and equal(values, made_up(trees))
    assert len(list(folder.glob("part-*"))) == 4 * 30  # they did write at once: no one found any of another's


def test_a_disk_that_is_full_while_values_are_stored_ends_the_run_and_loses_none_of_those_before(
    tmp_path, small_disk: Callable[[int], Path], monkeypatch, capsys
):
    """On a real file system of 24 KiB; with room again the pass goes on where it stopped."""
    monkeypatch.setattr("dpo.reference.WRITE_EVERY_TREES", 2)
    write_small_rows(tmp_path / "rows.jsonl")
    runs, store = Runs(tmp_path, []), small_disk(24 * 1024) / "store"
    assert dpo.train.main(runs.argv("objective=responses", f"reference.store={store}")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "o space left" in said and str(store) in said
    (folder,) = store.iterdir()
    kept = len(read_store(folder))
    assert kept > 0 and not list(store.rglob(".*")) and main(["verify", str(store)]) == 0
    shutil.copytree(store, tmp_path / "store")
    results = runs.results("objective=responses", f"reference.store={tmp_path / 'store'}")
    assert results["reference"]["hits"] >= kept and results["step0_max_difference"] == 0


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two folders: one of three small parts, one of a torn part, a sound one and a killed writer's leftover."""
    root = tmp_path / "store"
    whole, torn = open_store(root, "w" * 32, tag()), open_store(root, "v" * 32, tag())
    for begin in (0, 10, 20):
        numbered(whole, begin, begin + 10)
    numbered(torn, 0, 10)
    (part,) = parts_of(torn)
    part.write_bytes(part.read_bytes()[:-3])
    numbered(torn, 10, 20)
    leftover, young = torn / ".part-1.tmp", torn / ".part-2.tmp"
    leftover.touch(), young.touch()
    os.utime(leftover, (0, 0))
    os.utime(whole / "identity.json", (time.time() - 40 * 86_400,) * 2)
    return root


def folders(store: Path) -> dict[str, Path]:
    return {path.name[0]: path for path in store.iterdir()}


def test_stat_lists_each_folder_with_its_parts_values_torn_parts_and_identity(store, capsys, monkeypatch):
    assert main(["stat", f"reference.store={store}"]) == 0
    named = capsys.readouterr().out
    assert main(["stat", str(store)]) == 0
    said = capsys.readouterr().out
    monkeypatch.setenv("HOME", str(store.parent))
    assert main(["stat", f"reference.store=~/{store.name}"]) == 0
    assert said == named == capsys.readouterr().out
    torn, whole = (next(line for line in said.splitlines() if line.startswith(letter)).split() for letter in "vw")
    assert torn[1:4] == ["2", "1", "10"] and whole[1:4] == ["3", "0", "30"]
    assert said.index("\nv") < said.index("\nw")  # the one used last first
    assert said.count("dtype: torch.float32") == 2 and "weights: " + "w" * 32 in said


def test_verify_names_what_is_bad_and_exits_1_until_prune_has_dropped_it(store, capsys):
    assert main(["verify", str(store)]) == 1
    said = capsys.readouterr().out
    assert said.count("BAD ") == 1 and str(folders(store)["v"]) in said and "40 sound values" in said
    assert main(["prune", str(store)]) == 0 and main(["verify", str(store)]) == 0


def test_prune_keeps_every_sound_value_in_few_parts_and_only_young_leftovers(store):
    torn, whole = folders(store)["v"], folders(store)["w"]
    before = read_store(whole)
    assert main(["prune", str(store)]) == 0
    assert len(parts_of(whole)) == len(parts_of(torn)) == 1
    assert read_values(whole, set(KEYS)).keys() == before.keys() and is_numbered(read_store(whole))
    assert read_store(torn).keys() == set(KEYS[10:20]) and is_numbered(read_store(torn))
    assert [path.name for path in torn.glob(".*")] == [".part-2.tmp"]


def test_prune_leaves_large_sound_parts_alone_and_keeps_what_a_part_has_beside_a_torn_value(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.store.PART_BYTES", 6000)
    folder = open_store(tmp_path, "w", tag())
    numbered(folder, 0, 1000)
    (large,) = parts_of(folder)
    for begin in range(1000, 2000, 50):
        numbered(folder, begin, begin + 50)
    assert main(["prune", str(tmp_path)]) == 0
    assert large in parts_of(folder) and 2 < len(parts_of(folder)) < 15 and is_numbered(read_store(folder))
    data = bytearray(large.read_bytes())
    data[-1] ^= 1
    large.write_bytes(data)
    assert main(["prune", str(tmp_path)]) == 0
    assert not large.exists() and len(read_store(folder)) == 1999 and is_numbered(read_store(folder))


def test_prune_removes_what_was_not_used_lately_and_a_dry_run_nothing(store, capsys):
    size = sum(path.stat().st_size for path in folders(store)["v"].rglob("*"))
    for option, value in (("--older-than", "30"), ("--keep-bytes", str(size))):
        before = sorted(store.rglob("*"))
        assert main(["prune", str(store), option, value, "--dry-run"]) == 0
        assert "would remove" in (said := capsys.readouterr().out) and str(folders(store)["w"]) in said
        assert sorted(store.rglob("*")) == before
    assert main(["prune", str(store), "--older-than", "30"]) == 0
    assert list(folders(store)) == ["v"]
    assert main(["prune", str(store), "--keep-bytes", "0"]) == 0
    assert list(store.iterdir()) == []


def test_prune_leaves_alone_what_is_not_the_stores_though_it_be_given_the_wrong_folder(store):
    for stranger in (store / "project" / ".git", store / "notes-2026", folders(store)["v"] / ".mine"):
        stranger.mkdir(parents=True)
        os.utime(stranger, (0, 0)), os.utime(stranger.parent, (0, 0))
    assert main(["prune", str(store), "--older-than", "30"]) == 0 and len(list(store.rglob(".mine"))) == 1
    assert main(["prune", str(store), "--keep-bytes", "0"]) == 0
    assert sorted(path.name for path in store.rglob("*")) == [".git", "notes-2026", "project"]


def test_an_identity_that_was_damaged_is_named(store, capsys):
    (folders(store)["w"] / "identity.json").write_text("{")
    assert main(["stat", str(store)]) == 2
    assert f"error: {folders(store)['w'] / 'identity.json'}:1: broken JSON" in capsys.readouterr().err


def test_a_run_marks_its_folder_as_used(store):
    open_store(store, "w" * 32, tag())
    assert main(["prune", str(store), "--older-than", "30"]) == 0
    assert len(folders(store)) == 2


def test_the_command_looks_into_the_cache_and_names_a_store_that_is_not_there(store, tmp_path):
    command = [sys.executable, "-m", "dpo.reference", "stat"]
    environment = os.environ | {"DPO_CACHE": str(tmp_path)}
    missing = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert missing.returncode == 2 and f"error: {tmp_path / 'reference'}: there is no such folder" in missing.stderr
    store.rename(tmp_path / "reference")
    found = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count("torch.float32") == 2
