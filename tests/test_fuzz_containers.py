"""Mutated containers (.gz, .zst, .parquet): each is read as a strict reader does, or refused with file and reason.

The strict reader takes all of the file at once, with Python's own gzip where it can, and gives what comes out to
tests/strict_rows.py. What it takes may be refused (zeros behind a gzip stream), never the other way round.
"""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dpo.rows import iterate_rows
from models.errors import UserError
from tests.foreign_rows import COMPRESSED, CONTAINERS, Record, as_parquet
from tests.strict_rows import Found, Refused, strict_reading
from tests.test_fuzz_rows import outcome

ENDINGS = [f"{container}{codec}" for container in CONTAINERS for codec in COMPRESSED]
ENDINGS = [ending for ending in ENDINGS if ending not in (".jsonl", ".json", ".csv")]  # of tests/test_fuzz_rows.py
COLUMNS = ("id", "subset", "prompt", "chosen", "rejected", "weight")


def good_records(draw: random.Random, ending: str) -> list[Record]:
    texts = [[f"{key} {n} {draw.choice(('é', 'x' * 40, '日本', 'a, b'))}" for key in COLUMNS[:5]] for n in range(9)]
    records: list[Record] = [dict(zip(COLUMNS, (*row, draw.choice((2.5, 1.0))), strict=True)) for row in texts]
    if ending.startswith(".csv"):
        return records
    return [record | {"rejected": [f"worse {n}", str(record["rejected"])]} for n, record in enumerate(records)]


def mutate_container(draw: random.Random, data: bytes) -> bytes:
    """Flipped bits, other bytes, bytes more or less, an end too early or too late; often where the footers are."""
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(draw.choice((0, max(0, len(data) - 900))), len(data))
        size, more = draw.choice((1, 2, 9)), draw.randbytes(draw.choice((1, 2, 9)))
        data = draw.choice(
            (
                data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
                data[:at] + more + data[at + len(more) :],
                data[:at] + more + data[at:],
                data[:at] + data[at + size :] + b"\n",
                data[: at + 1],
                data + draw.choice((bytes(size), more, data, data[:size])),
            )
        )
    return data


def without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def strict_container(path: Path, name: str) -> tuple[Found, int] | None:
    """What the container `name` at `path` holds, read as a whole; None where there is a fault in it."""
    plain = path.with_name("plain") / name.removesuffix(".gz").removesuffix(".zst")
    try:
        data = path.read_bytes()
        if name.endswith(".gz"):
            data = gzip.decompress(data)
        elif name.endswith(".zst"):
            data = pyarrow.input_stream(pyarrow.py_buffer(data), compression="zstd").read()
        if plain.suffix == ".parquet":
            table = pyarrow.parquet.read_table(pyarrow.py_buffer(data), use_threads=False)
            plain, data = plain.with_suffix(".json"), json.dumps(without_nulls(table.to_pylist())).encode()
        plain.parent.mkdir(exist_ok=True)
        plain.write_bytes(data)
        return strict_reading(plain, "ours")
    except (Refused, Exception):  # of whatever kind: the strict reader may have tracebacks
        return None


def check_container(folder: Path, seed: int) -> bool:
    """Whether the mutated container of this seed was read; an AssertionError where it was neither right nor refused."""
    draw = random.Random(seed)
    ending = ENDINGS[seed % len(ENDINGS)]
    container, codec = (f".{ending.split('.')[1]}", "".join(ending.split(".")[2:]))
    data = CONTAINERS[container](good_records(draw, ending))
    inside = container == ".parquet" and codec and draw.random() < 0.5
    data = COMPRESSED[f".{codec}" if codec else ""](mutate_container(draw, data) if inside else data)
    path = folder / f"r{ending}"
    path.write_bytes(data if inside else mutate_container(draw, data))
    result = outcome(path, "ours")
    if isinstance(result, str):
        place = rf"({re.escape(path.name)}:\d+|data\.path={re.escape(str(path))}|{re.escape(path.name)}): ."
        assert re.match(place, result), f"seed {seed}: a refusal without file and reason: {result}"
        assert "\n" not in result and len(result) < 1000, f"seed {seed}: {result!r}"
    else:
        expected = strict_container(path, path.name)
        assert result == expected, f"seed {seed}: {ending} is read as {result}, not as {expected}"
    return not isinstance(result, str)


def test_400_mutated_containers_are_read_strictly_or_refused(tmp_path: Path) -> None:
    read_whole = sum(check_container(tmp_path, seed) for seed in range(400))
    assert 5 < read_whole < 380, "both ways are taken"


@pytest.mark.long
def test_6000_mutated_containers_are_read_strictly_or_refused(tmp_path: Path) -> None:
    read_whole = sum(check_container(tmp_path, seed) for seed in range(400, 6_400))
    assert 75 < read_whole < 5_700, "both ways are taken"


@pytest.mark.parametrize("ending", ENDINGS)
def test_containers_that_nobody_touched_are_read(ending: str, tmp_path: Path) -> None:
    container, codec = f".{ending.split('.')[1]}", ending.removeprefix(f".{ending.split('.')[1]}")
    path = tmp_path / f"r{ending}"
    path.write_bytes(COMPRESSED[codec](CONTAINERS[container](good_records(random.Random(0), ending))))
    result = outcome(path, "ours")
    assert len(result[0]) == 9 and result == strict_container(path, path.name)


def test_a_flipped_byte_in_a_parquet_file_with_page_checksums_is_never_read_as_another_row(tmp_path: Path) -> None:
    path, data = tmp_path / "r.parquet", as_parquet(good_records(random.Random(0), ".parquet"), page_checksums=True)
    path.write_bytes(data)
    whole, refused = outcome(path, "ours"), 0
    for place in (found.start() for found in re.finditer(b"worse|prompt [0-9]", data[:-900])):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        result = outcome(path, "ours")
        assert result == whole or "cannot be read" in str(result)  # the same: a column's statistics, which no row needs
        refused += isinstance(result, str)
    assert refused >= 3


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_a_container_that_breaks_off_names_the_last_row_that_could_be_read(codec: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [
        {"id": str(n), "subset": "s", "prompt": str(n), "chosen": "a", "rejected": draw.randbytes(99).hex()}
        for n in range(2000)
    ]
    data = COMPRESSED[codec](CONTAINERS[".jsonl"](lines))
    path = tmp_path / f"r.jsonl{codec}"
    path.write_bytes(data[: len(data) * 2 // 3])
    rows = iterate_rows(path, "ours", Counter())
    with pytest.raises(UserError, match=rf"^r\.jsonl\{codec}:(\d+): behind this row the file cannot be read") as caught:
        last = ""
        while True:
            last = next(rows).where
    assert str(caught.value).startswith(f"{last}: ") and 800 < int(last.rpartition(":")[2]) < 1400
