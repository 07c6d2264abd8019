"""Judging speed: a local judge's verdicts against transformers', and what asking an endpoint costs.

    python -m experiments.bench_judge [--rows 300] [--answers 2 | --data rows.jsonl] [--rounds 3]
                                      [--packs 1024 1472 2176 4096] [--batches 1 2 4 8 16]
    python -m experiments.bench_judge --client [--rows 1000]

Verdicts: 500 tokens in each order (a request of 85 words, two answers of 181, the judge's words), SmolLM2-135M, a
judgment being one order of one pair, the row's first answer with each of its others; or rows of a file, drawn from
those that every pack holds, with all their pairs. Tokens are made beforehand on both sides. transformers runs the
orders sorted by length, in padded batches with logits_to_keep=1; of both sides the fastest size, found on the first
rows, is raced over all of them, in turn. Client: python -m dpo.judge against a server on the loopback that answers at
once; then 5 % of its replies are faults; then the client is killed in the middle. Nothing else may run meanwhile.
Read next: dpo/judge/local.py, dpo/judge/endpoint.py.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

from dpo.config import Config, DataConfig, JudgeConfig, PackConfig
from dpo.distributed import Ranks
from dpo.inputs import DTYPES, cache_folder, judge_settings, set_up_cpu
from dpo.judge.local import replies
from dpo.logprobs import score_trees
from dpo.rows import Row, read_rows, write_rows
from dpo.tokens import token_trees
from dpo.trees import Tree
from kernels.bench import timed_s
from models.decoder import load_decoder
from models.gguf_import import resolve_model_path
from models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from judge_server import Reply, Script, completion, fault, serving  # type: ignore[import-not-found]  # noqa: E402

WORDS = (
    "a the of and to in letter weather harvest road house year page guest winter storm bread torn long short old new "
    "one two three came went said wrote found lost made kept under over before after while since because but so"
)
Judge = Callable[[int, int], list[float]]
"""Pack or batch size, and how many rows, to the log-odds of A of each order."""


def made_rows(n: int, answers: int = 2) -> list[Row]:
    """Rows that share no more than chance, the first answer the right one; RewardBench 2's have four answers."""

    def text(name: str, words: int) -> str:
        draw = random.Random(name)
        return " ".join(draw.choices(WORDS.split(), k=words))

    return [
        Row(
            f"row-{i}",
            "made",
            ({"role": "user", "content": text(f"request {i}", 85)},),
            (text(f"chosen {i}", 181),),
            tuple(text(f"rejected {i}" + ("" if one == 1 else f" {one}"), 181) for one in range(1, answers)),
            f"{i}",
        )
        for i in range(n)
    ]


def trees_of(rows: Sequence[Row], n: int, most: int, folder: Path) -> list[Tree]:
    """Of the first `n` rows that packs of `most` tokens hold, all pairs in both orders."""
    data, judge = DataConfig(too_long="drop"), JudgeConfig(pairs_per_row=0)
    config = Config(exp="bench", data=data, pack=PackConfig(tokens=most), judge=judge)
    with tempfile.TemporaryDirectory() as scratch:
        return list(token_trees(rows, load_tokenizer(folder), judge_settings(config, sighted=True), Path(scratch))[:n])


def judges(folder: Path, dtype: torch.dtype, trees: Sequence[Tree]) -> dict[str, Judge]:
    """Both sides, on the same tokens."""
    ours = load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ranks = Ranks(0, 1, torch.device("cpu"))
    a, b = (completion.targets[0] for completion in trees[0].completions[:2])

    def of_ours(pack: int, n: int) -> list[float]:
        some = trees[:n]
        said = replies(some, score_trees(ours, some, PackConfig(tokens=pack), ranks, "ours"))
        return [float(odds) for reply_QL in said for odds in reply_QL[:, 0] - reply_QL[:, 1]]

    @torch.inference_mode()
    def of_theirs(batch: int, n: int) -> list[float]:
        every = [tree.prompt + branch for tree in trees[:n] for branch in tree.branches]
        odds = [0.0] * len(every)
        by_length = sorted(range(len(every)), key=lambda i: len(every[i]))
        for begin in range(0, len(every), batch):
            some = by_length[begin : begin + batch]
            width = max(len(every[i]) for i in some)
            pad = [width - len(every[i]) for i in some]
            ids = torch.tensor([[0] * more + list(every[i]) for i, more in zip(some, pad, strict=True)])
            mask = torch.tensor([[0] * more + [1] * (width - more) for more in pad])
            logits = theirs(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            for i, value in zip(some, (logits[:, a] - logits[:, b]).tolist(), strict=True):
                odds[i] = value
        return odds

    return {"ours": of_ours, "transformers": of_theirs}


def race(asked: argparse.Namespace, dtype: torch.dtype, cache: Path) -> str:
    """A line of the table."""
    folder = resolve_model_path(asked.model, cache)
    rows = list(read_rows(asked.data)) if asked.data else made_rows(asked.rows, asked.answers)
    random.Random("rows").shuffle(rows)
    trees = trees_of(rows, asked.rows, min(asked.packs), folder)
    tokens = [len(tree.prompt) + len(branch) for tree in trees for branch in tree.branches]
    both, few = judges(folder, dtype, trees), min(len(trees), 8)
    sizes = {}
    for (side, judge), tried in zip(both.items(), (asked.packs, asked.batches), strict=True):
        judge(tried[0], 1)  # warms up
        times_s = {size: timed_s(partial(judge, size, few), "cpu") for size in tried}
        sizes[side] = min(times_s, key=times_s.__getitem__)
    one, other = (both[side](sizes[side], few) for side in both)
    gap = max(abs(x - y) for x, y in zip(one, other, strict=True))
    times: dict[str, list[float]] = {side: [] for side in both}
    for _ in range(asked.rounds):
        for side, judge in both.items():
            times[side].append(timed_s(partial(judge, sizes[side], len(trees)), "cpu"))
    rates = {side: [len(tokens) / time_s for time_s in times[side]] for side in both}
    mine, their = (statistics.median(rates[side]) for side in both)
    each = ", ".join(f"{x:.2f} / {y:.2f}" for x, y in zip(*rates.values(), strict=True))
    return (
        f"| {dtype} | {len(trees)} | {len(tokens)} | {statistics.fmean(tokens):.0f} | {mine:.2f} ({sizes['ours']}) | "
        f"{their:.2f} ({sizes['transformers']}) | **{mine / their:.2f}** | {each} | {gap:.2g} |"
    )


# ---- the client of an endpoint


def instant(body: dict[str, object], before: int) -> Reply:
    return completion("A", {"A": -0.1, "B": -2.5, "The": -5.0})


def faulty() -> Script:
    """One reply of twenty is none."""
    draw = random.Random(0)
    faults = [fault(500), fault(503), fault(429, retry_after_ms="5"), Reply(b"{"), Reply(instant({}, 0).body, cut=50)]
    return lambda body, before: draw.choice(faults) if draw.random() < 0.05 else instant(body, before)


def kept_keys(home: Path) -> list[str]:
    """Of every answer that a run in `home` has kept."""
    return [json.loads(line)["key"] for path in home.glob("cache/answers/*.jsonl") for line in path.open("rb")]


def client(rows: int) -> int:
    """Prints what each of the three runs did; 1 where an answer was lost, doubled or asked for again, else 0."""
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        write_rows(data, made_rows(rows))
        for name, script in (("instant", instant), ("5 % faults", faulty()), ("killed", instant)):
            home = Path(scratch) / name.replace(" ", "_")
            with serving(script) as served:
                settings = [f"data.path={data}", f"run.root={home}", f"run.cache={home / 'cache'}"]
                settings += [f"endpoint.url={served.url}", "endpoint.model=judge-1"]
                command = [sys.executable, "-m", "dpo.judge", *settings]
                if name == "killed":
                    begun = subprocess.Popen(command, cwd=ROOT)
                    while served.answered.total() < rows and begun.poll() is None:
                        time.sleep(0.01)
                    begun.send_signal(signal.SIGKILL)
                    begun.wait()
                found, before = len(kept_keys(home)), served.asked.total()
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                asked = served.asked.total() - before
            results = json.loads((home / "judge" / "latest" / "results.json").read_text())
            usage, judged = results["endpoint"], results["judge"]["judge-1"]
            kept = kept_keys(home)
            sound = len(kept) == len(set(kept)) == 2 * rows and judged["invalid"] == 0
            sound = sound and asked == 2 * rows - found + usage["failed_tries"] and usage["found"] == found
            wrong += not sound
            print(
                f"{name}: {2 * rows:,} judgments, {found:,} kept from before, {asked:,} requests, "
                f"{usage['failed_tries']:,} of them failed, {(asked / usage['time_s']):.0f} requests/s; "
                f"{'each answered once' if sound else 'WRONG'}",
                flush=True,
            )
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", action="store_true")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--answers", type=int, default=2, help="of a row, the first the right one (default: 2)")
    parser.add_argument("--data", type=Path, help="rows to draw from, instead of made ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packs", type=int, nargs="+", default=[1024, 1472, 2176, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    asked = parser.parse_args()
    if asked.client:
        return client(asked.rows or 1000)
    asked.rows = asked.rows or 300
    if asked.answers < 2 or min(asked.rows, asked.rounds) < 1:
        parser.error("--answers must be 2 or more, --rows and --rounds 1 or more")
    set_up_cpu()  # as a run does; for both sides
    print(
        f"Rows of {asked.data or f'{asked.answers} answers'}, {torch.get_num_threads()} threads, "
        f"medians of {asked.rounds} in turn; judgments/s (size)\n"
    )
    print(
        "| dtype | rows | judgments | tokens | ours (pack) | transformers (batch) | ratio | each round | "
        "largest difference of log-odds |"
    )
    print("|---|" + "---:|" * 8)
    cache = cache_folder(Config(exp="bench"))
    for dtype in asked.dtype:
        print(race(asked, DTYPES[dtype], cache), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
