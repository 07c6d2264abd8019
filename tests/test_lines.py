"""Rows and trees stay on disk: what comes back is what was kept, and memory hardly grows with their number."""

import dataclasses
import gc
import json
import tracemalloc
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from dpo.inputs import read_inputs
from dpo.rows import PairValues, Row, keep_rows
from dpo.settings import load_config

CHAT = ({"role": "system", "content": "é 日本 🙂\u2028"}, {"role": "user", "content": 'a "b"\n\\'})
ROWS = [
    Row(
        f"r{n}",
        "s",
        CHAT[n % 2 :],
        ("yes", "ja"),
        ("no",),
        f"g{n}",
        split,
        f"f:{n}",
        (PairValues(0.1), PairValues()),
        (("ja", "hm"),),
    )
    for n, split in enumerate(["train", None, "test", None, None])
]


def test_kept_rows_come_back_as_they_were_whole_in_part_and_in_any_order(tmp_path: Path) -> None:
    kept = keep_rows(iter(ROWS), tmp_path)
    assert list(kept) == ROWS and kept == ROWS and kept == keep_rows(ROWS) and len(kept) == 5
    assert [row.where for row in kept] == [row.where for row in ROWS]  # which equality leaves out
    assert kept[-1] == ROWS[-1] and kept[1:3] == ROWS[1:3] and kept[::-2] == ROWS[::-2]
    assert kept.take([4, 0, 4]) == [ROWS[4], ROWS[0], ROWS[4]] and kept.take([]) == [] == keep_rows([])
    assert kept.take([3, 1]).take([1]) == [ROWS[1]]
    assert kept != ROWS[:4] and kept != [*ROWS[:4], dataclasses.replace(ROWS[4], group="other")]
    with pytest.raises(IndexError):
        kept[5]


def test_kept_rows_leave_no_file_behind(tmp_path: Path) -> None:
    kept = keep_rows(ROWS, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [] and kept == ROWS


def test_threads_read_at_once_what_each_asks_for() -> None:
    kept = keep_rows(ROWS)
    with ThreadPool(4) as pool:
        assert pool.map(lambda n: kept[n % 5] == ROWS[n % 5], range(2000)) == [True] * 2000


def test_a_row_more_costs_less_memory_than_its_text(tmp_path: Path) -> None:
    def traced(rows: int) -> tuple[int, int]:
        """Bytes held after reading so many rows of 250 characters, splitting and tokenising them, and at the worst."""
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for n in range(rows):
                row = {"id": f"{n}", "subset": "s", "prompt": f"{n} {'x' * 150}", "split": "train" if n else "test"}
                file.write(json.dumps(row | {"chosen": f"{n} {'y' * 40}", "rejected": f"{n} {'z' * 40}"}) + "\n")
        places = [f"data.path={path}", f"run.root={tmp_path}", f"run.cache={tmp_path / str(rows)}"]
        tracemalloc.start()
        inputs = read_inputs(
            load_config(["exp=smoke", "objective=responses", "data.validation_fraction=0", *places]), "cpu"
        )
        worst = tracemalloc.get_traced_memory()[1]
        gc.collect()  # a chat template's rendering leaves cycles, and how many are left is the collector's own affair
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(inputs.splits.train) == len(inputs.train_trees) == rows - 1
        return held, worst

    traced(10)  # what is made once
    (few, worst_of_few), (many, worst_of_many) = traced(260), traced(660)
    assert many - few < 400 * 100 and worst_of_many - worst_of_few < 400 * 400
