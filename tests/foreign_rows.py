"""Our rows written as others write theirs, for the tests of reading them: one function a format, one pair a record."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from dpo.rows import Row

Record = dict[str, object]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def together(row: Row, chosen: str, rejected: str) -> Record:
    sides = {"preferred_output": [said("assistant", chosen)], "non_preferred_output": [said("assistant", rejected)]}
    return {"input": {"messages": list(row.prompt)}, **sides}


def ranked(row: Row, chosen: str, rejected: str) -> Record:
    order = [{"rank": 1, "completion": [said("assistant", rejected)]}]
    return {
        "context": list(row.prompt),
        "completions": [*order, {"rank": 0, "completion": [said("assistant", chosen)]}],
    }


def ultrafeedback(row: Row, chosen: str, rejected: str) -> Record:
    worse = {"model": "m", "response": rejected, "overall_score": 2.5, "critique": "Poor."}
    better = {"model": "n", "response": chosen, "overall_score": 7.0, "critique": "Good."}
    return {"source": "made", "instruction": row.prompt[-1]["content"], "completions": [worse, better]}


def binarized(row: Row, chosen: str, rejected: str) -> Record:
    chats = {"chosen": [*row.prompt, said("assistant", chosen)], "rejected": [*row.prompt, said("assistant", rejected)]}
    return {"prompt": row.prompt[-1]["content"], "prompt_id": "0f", **chats, "score_chosen": 8.5, "score_rejected": 5.0}


def hh(row: Row, chosen: str, rejected: str) -> Record:
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in row.prompt)
    return {"chosen": f"{turns}\n\nAssistant: {chosen}", "rejected": f"{turns}\n\nAssistant: {rejected}"}


def trl(row: Row, chosen: str, rejected: str) -> Record:
    return {"prompt": row.prompt[-1]["content"], "chosen": chosen, "rejected": rejected}


def trl_chat(row: Row, chosen: str, rejected: str) -> Record:
    answers = {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)]}
    return {"prompt": list(row.prompt), **answers}


def implicit_chat(row: Row, chosen: str, rejected: str) -> Record:
    return {
        "chosen": [*row.prompt, said("assistant", chosen)],
        "rejected": [*row.prompt, said("assistant", rejected)],
    }


def implicit_text(row: Row, chosen: str, rejected: str) -> Record:
    """The answers, made to differ from their first character on, behind the prompt and a line's end."""
    prompt = row.prompt[-1]["content"]
    return {"chosen": f"{prompt}\n+{chosen}", "rejected": f"{prompt}\n-{rejected}"}


def rb2(row: Row, chosen: str, rejected: str) -> Record:
    counts = {"num_correct": 1, "num_incorrect": 1, "total_completions": 2, "models": ["m"]}
    answers = {"chosen": [chosen], "rejected": [rejected]}
    return {"id": row.id, "prompt": row.prompt[-1]["content"], **answers, **counts, "subset": row.subset}


def ours(row: Row, chosen: str, rejected: str) -> Record:
    return {"id": row.id, "subset": row.subset, "prompt": list(row.prompt), "chosen": [chosen], "rejected": [rejected]}


def judgebench(row: Row, chosen: str, rejected: str) -> Record:
    label, *answers = ("A>B", chosen, rejected) if len(row.id) % 2 else ("B>A", rejected, chosen)
    return {"question": row.prompt[-1]["content"], "label": label, "response_A": answers[0], "response_B": answers[1]}


def llmbar(row: Row, chosen: str, rejected: str) -> Record:
    label = 1 + len(row.id) % 2
    outputs = {f"output_{label}": chosen, f"output_{3 - label}": rejected}
    return {"input": row.prompt[-1]["content"], "label": label} | outputs


def rmbench(row: Row, chosen: str, rejected: str) -> Record:
    answers = {"chosen": [chosen], "rejected": [rejected]}
    return {"id": row.id, "prompt": row.prompt[-1]["content"], "domain": row.subset} | answers


WRITERS: dict[str, tuple[str, Callable[[Row, str, str], Record]]] = {
    "ours": ("ours", ours),
    "together": ("together", together),
    "ranked": ("ranked", ranked),
    "ultrafeedback": ("ultrafeedback", ultrafeedback),
    "binarized": ("binarized", binarized),
    "hh": ("hh", hh),
    "trl": ("trl", trl),
    "trl_chat": ("trl", trl_chat),
    "implicit_chat": ("implicit", implicit_chat),
    "implicit_text": ("implicit", implicit_text),
    "rb2": ("rb2", rb2),
    "judgebench": ("judgebench", judgebench),
    "llmbar": ("llmbar", llmbar),
    "rmbench": ("rmbench", rmbench),
}
"""By shape: the format that it is of, and its writer."""
# Shapes whose prompt is one user's text.
ONE_TEXT = {"ultrafeedback", "trl", "implicit_text", "rb2", "judgebench", "llmbar", "rmbench"}


def as_jsonl(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_json(records: list[Record]) -> bytes:
    return json.dumps(records, indent=1).encode()


def as_csv(records: list[Record]) -> bytes:
    """For records of texts and numbers only."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def as_parquet(records: list[Record], page_checksums: bool = False) -> bytes:
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, sink, row_group_size=7, write_page_checksum=page_checksums)
    return sink.getvalue()


CONTAINERS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def write(path: Path, records: list[Record]) -> Path:
    """The records in the container and codec that the file's name asks for."""
    codec = path.suffix if path.suffix in COMPRESSED else ""
    container = path.suffixes[-2 if codec else -1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESSED[codec](CONTAINERS[container](records)))
    return path
