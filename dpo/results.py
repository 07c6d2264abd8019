"""What a finished run says about itself: the shape of results.json and env.json, and metrics.jsonl read back.

No dimension letters. Read next: dpo/report.py.
"""

import json
import math
from pathlib import Path
from typing import NotRequired, TypedDict

from dpo.judge.benchmarks import Benchmark
from dpo.judge.controls import Conclusion
from dpo.judge.robustness import Bias, Success
from dpo.judge.statistics import Comparison, PairedTest, Summary
from models.errors import UserError
from models.files import read_text

Counts = dict[str, int]
Metrics = list[dict[str, float]]
"""The lines of metrics.jsonl: every one has a "step"; what was not finite is NaN."""


class Judgement(Conclusion):
    base: Summary
    trained: Summary
    comparison: Comparison
    subset_tests: NotRequired[dict[str, PairedTest]]  # of the comparison, by subset


class Data(TypedDict):
    rows: Counts  # by split, as the next two
    pairs: Counts
    groups: Counts
    subsets: dict[str, Counts]
    unused_rows: int
    dropped: Counts  # while reading, by reason
    formats: NotRequired[list[str]]  # of the row files (dpo/formats.py)
    leaks: Counts  # by kind
    test_sha256: NotRequired[str]  # of the test rows' texts
    attacked: NotRequired[Counts]  # training rows whose wrong answers attack, by how
    too_long: NotRequired[Counts]  # rows left out for it, by split; not where nothing became tokens, as the next two
    truncated: NotRequired[Counts]  # rows whose prompt was cut, by split
    boundary_differs: NotRequired[Counts]  # rows with an answer that the tokenizer would join to its prompt, by split


class Alarm(TypedDict):
    name: str
    step: int
    value: float
    meaning: str
    advice: str


class Endpoint(TypedDict):
    """What an endpoint's answers took; `found` ones were kept from before, and cost what they once did."""

    found: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None  # dollars
    price: NotRequired[list[float] | None]  # dollars a token, read and written
    time_s: float


class Results(TypedDict):
    step0_loss: float
    step0_max_difference: float
    reference: Counts
    judge: Judgement
    train: dict[str, float | str]
    alarms: list[Alarm]
    data: Data
    time_s: dict[str, float]
    answers: NotRequired[int]  # that dpo.judge had of its judge
    endpoint: NotRequired[Endpoint]  # where it asked one
    benchmark: NotRequired[Benchmark]  # of its rows or protocol
    attacks: NotRequired[list[Success]]
    biases: NotRequired[list[Bias]]
    critiques: NotRequired[list[Counts]]  # of objective=critiques, by round


class Environment(TypedDict):
    command: str
    cpu: str
    cores: int
    gpu: str | None
    packages: dict[str, str]
    git: dict[str, object] | None


def read_metrics(path: Path, *, torn: bool = False) -> Metrics:
    """The lines of metrics.jsonl. A broken one is a UserError, but for the last one where a kill may have `torn` it."""
    lines = read_text(path).splitlines()
    metrics: Metrics = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            float(values["step"])
            metrics.append({name: math.nan if value is None else float(value) for name, value in values.items()})
        except (ValueError, TypeError, AttributeError, KeyError):
            if torn and number == len(lines):
                return metrics
            raise UserError(f"{path}:{number}: no metrics of a step: {line[:80]!r}; mend or remove the line") from None
    if not lines:
        raise UserError(f"{path}: is empty; a run writes a line a step")
    return metrics
