"""A parquet of made rows with RewardBench 2's exact schema and counts, for the tests: seeded, none of its text."""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

COUNTS = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
TIES_TRAIN_ROWS, TIES_TRAIN_PAIRS = 82, 1159  # of the study: so many of the 102 were drawn, with so many wrong answers
TEXTS, TEXT = pyarrow.list_(pyarrow.string()), pyarrow.string()
METADATA = pyarrow.struct(
    {
        "category": TEXT,
        "correct": TEXT,
        "index": pyarrow.float64(),
        "instruction_id_list": TEXTS,
        "label": TEXT,
        "method": TEXT,
        "models": TEXTS,
        "prompt_norm": TEXT,
        "subcategory": TEXT,
        "valid": pyarrow.float64(),
    }
)
SCHEMA = pyarrow.schema(
    {
        "id": TEXT,
        "prompt": TEXT,
        "chosen": TEXTS,
        "rejected": TEXTS,
        "num_correct": pyarrow.int64(),
        "num_incorrect": pyarrow.int64(),
        "total_completions": pyarrow.int64(),
        "models": TEXTS,
        "subset": TEXT,
        "additional_metadata": METADATA,
    }
)
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "kelp", "larch", "maple"]


def made_records(drawn: set[str] | None = None, seed: int = 0) -> list[dict[str, object]]:
    """1,865 rows. A question of Ties is two: ref:N with one right answer, tied:N with several, and N's wrong ones.

    How many wrong answers each real Ties row has is not known here. It is 14 a row, and one more for
    enough of the rows named in `drawn` to give those 82 the study's 1,159 in all.
    """
    draw = random.Random(seed)
    more = TIES_TRAIN_PAIRS - 14 * TIES_TRAIN_ROWS
    records: list[dict[str, object]] = []
    for subset, count in COUNTS.items():
        for number in range(count):
            ties = subset == "Ties"
            name = f"{'tied' if number % 2 else 'ref'}:{number // 2}" if ties else str(len(records))
            key = f"{subset} {number // 2 if ties else number}"
            question = f"{key}: which of these goes with {draw.choice(WORDS)}?"
            extra = ties and name in (drawn or ()) and more > 0
            more -= extra
            right, wrong = (1 + 5 * (number % 2), 14 + extra) if ties else (1, 3)
            more_words = [] if ties else WORDS  # answers to a Ties question are short, and its two rows share them
            chosen, rejected = (
                [" ".join((kind, f"{key}.{i}", *draw.sample(more_words, k=len(more_words)))) for i in range(n)]
                for kind, n in (("right", right), ("wrong", wrong))
            )
            records.append(
                {
                    "id": name,
                    "prompt": question + (" Name the first." if name.startswith("ref") else ""),
                    "chosen": chosen,
                    "rejected": rejected,
                    "num_correct": right,
                    "num_incorrect": wrong,
                    "total_completions": right + wrong,
                    "models": ["made"] * (right + wrong),
                    "subset": subset,
                    "additional_metadata": {"category": None, "index": float(number), "label": "made"},
                }
            )
    return records


def write_parquet(path: Path, records: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, schema=SCHEMA), path)
    return path
