"""A sweep's arms as they lie on disk: begun, finished, or kept of a run whose folder is gone; may they go on?

    an Arm -> its run folder, ROOT/NAME-sweep/ARM/NAME/latest -> what it was begun with and of, against what holds now

An arm is finished when its report is there, or when results= keeps its verdicts under the same configuration. Both are
refused where rows, weights or sources are others now. No dimension letters.
Read next: dpo/sweep.py, which runs what is not finished.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, cast

from dpo.config import Config, config_dict
from dpo.inputs import Inputs, pick_device, read_inputs, reference_fingerprint
from dpo.log import source_digest
from dpo.losses import check_loss
from dpo.results import Results
from dpo.rows import columns_of
from dpo.runs import MAY_DIFFER, flat, home_of, resumed_folder
from dpo.settings import Arm
from dpo.sweep_figures import Kept, KeptArm
from models.errors import UserError
from models.files import read_json_object

FREE = {"loss", "lora", "train", "log", "run"}  # sections that neither rows nor log-probs before training depend on


# --- where they lie ---------------------------------------------------------------------------------------------------


def begun_folder(arm: Arm, *, judging: bool = False) -> Path | None:
    """The run folder of an arm that was begun; UserError where that was under another configuration."""
    if not (home_of(arm.config, judging=judging) / "latest" / "config.json").is_file():
        return None
    try:
        return resumed_folder(arm.config, "latest", judging=judging)
    except UserError as error:
        raise UserError(f"{error}. For a sweep from the start move that folder away, or set run.root") from None


def finished_folder(arm: Arm) -> Path | None:
    """The run folder of an arm whose report.html, the last thing that a run writes, is there."""
    folder = begun_folder(arm)
    return folder if folder and (folder / "report.html").is_file() else None


def source_of(run: Path) -> str:
    """dpo.log.source_digest of the product that began this run; "" where that said none."""
    return str(read_json_object(run / "env.json").get("source", ""))


def verdicts_file(arm: Arm) -> str:
    """The file that its verdicts are kept in."""
    return f"{arm.name}.jsonl.gz"


def kept_in(folder: Path, arms: Sequence[Arm]) -> dict[str, KeptArm]:
    """By name, the arms that `folder` keeps as finished and whose run folders are not here, or not finished.

    UserError where it keeps some that are not among these, which would be lost, or under another configuration, or
    without one.
    """
    if not (folder / "arms.json").is_file():
        return {}
    records = {arm["verdicts"]: arm for arm in cast(Kept, read_json_object(folder / "arms.json"))["arms"]}
    other = "give another results= or move the folder away"
    if others := set(records) - {verdicts_file(arm) for arm in arms}:
        raise UserError(
            f"results: {folder} keeps arms that are not of this sweep ({', '.join(sorted(others))}), and they "
            f"would be lost; {other}"
        )
    found = {}
    for arm in arms:
        record = records.get(verdicts_file(arm))
        if not record or finished_folder(arm) or not (folder / record["verdicts"]).is_file():
            continue
        if "config" not in record:
            raise UserError(
                f"results: {folder} keeps {record['verdicts']} without its configuration, as older versions did, and "
                f"it would be lost; {other}"
            )
        before, now = record["config"], settings_of(arm.config)
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            raise UserError(
                f"results: {folder} keeps {record['verdicts']} of another configuration ({', '.join(changed)}); {other}"
            )
        found[arm.name] = record
    return found


def settings_of(config: Config) -> dict[str, object]:
    """What a run's figures hang on and is not the default, by key; of a file its name, not where it lies."""
    default, now = flat(config_dict(Config(exp=config.exp))), flat(config_dict(config))
    own = {key: value for key, value in now.items() if key not in MAY_DIFFER and value != default[key]}
    return {key: Path(of).name if isinstance(of, str) and of.startswith("/") else of for key, of in own.items()}


# --- what they are of -------------------------------------------------------------------------------------------------


def what_is_read(arm: Arm) -> str:
    """All of an arm's configuration that its inputs depend on."""
    return arm.config.model_dump_json(exclude=FREE)


class Read(NamedTuple):
    """Digests of what an arm reads."""

    trees: str  # as dpo/loop.py's TrainState has them
    test_rows: str
    reference: str

    def not_of(self, told: Mapping[str, object]) -> str:
        """What a finished run, which told this of what it read, read otherwise, if anything."""
        words = {"test_rows": "test rows", "trees": "training or validation rows", "reference": "weights"}
        now = self._asdict()
        return next((words[key] for key in words if told.get(key, now[key]) != now[key]), "")


def read_by(run: Path) -> dict[str, object]:
    """What of Read a finished run tells of itself."""
    ends = run / "checkpoints" / "finished.json"
    saved = read_json_object(ends) if ends.is_file() else {}  # critiques have theirs by the round
    told = {key: saved[name] for key, name in (("trees", "data"), ("reference", "reference")) if name in saved}
    data = cast(Results, read_json_object(run / "results.json"))["data"]
    return told | ({"test_rows": data["test_sha256"]} if "test_sha256" in data else {})


def digests_of(inputs: Inputs, config: Config) -> Read:
    """Those of all that these inputs are of."""
    trees = f"{inputs.train_trees.digest} {inputs.validation_trees.digest}"
    return Read(trees, str(inputs.splits.report["test_sha256"]), reference_fingerprint(inputs, config))


# --- may they go on? --------------------------------------------------------------------------------------------------


def check_arms(arms: Sequence[Arm], kept: Mapping[str, KeptArm], *, any_source: bool) -> dict[str, str]:
    """By name, what each arm that is not finished, nor `kept`, asks of the reference: equal where all is shared.

    UserError where an arm would be refused when its turn comes: its folder's config, what it reads, its loss; where a
    finished one read other rows or weights; and, but for `any_source`, where another version of the product began it.
    """
    check_sources(arms, kept, any_source=any_source)
    known: dict[str, tuple[set[str], Read]] = {}  # columns of the rows and digests of all that is read
    asks = {}
    for arm in arms:
        try:
            if (read := what_is_read(arm)) not in known:
                inputs = read_inputs(arm.config, pick_device(arm.config))
                columns = columns_of(chain(inputs.splits.train, inputs.splits.validation))
                known[read] = columns, digests_of(inputs, arm.config)
            columns, of = known[read]
            name, run = arm.name, finished_folder(arm)
            if run or name in kept:
                if old := of.not_of(read_by(run) if run else kept[name]["read"]):
                    where = run or kept[name]["verdicts"]
                    raise UserError(
                        f"{where} was finished with other {old} than are read now; move it away to run again"
                    )
                continue
            check_loss(arm.config.loss, columns)
            asks[name] = f"{arm.config.model_dump_json(exclude={*FREE, 'seed'})} {of}"
        except UserError as error:
            raise UserError(f"{error} ({arm.sources}: the arm {arm.name})") from None
    return asks


def check_sources(arms: Sequence[Arm], kept: Mapping[str, KeptArm], *, any_source: bool, judging: bool = False) -> None:
    """UserError where another version of the product began an arm, unless any will do."""
    now = source_digest()
    sources = {name: arm["source"] for name, arm in kept.items()}
    sources |= {arm.name: source_of(run) for arm in arms if (run := begun_folder(arm, judging=judging))}
    old = {name: source for name, source in sources.items() if source != now}
    if old and not any_source:
        raise UserError(
            f"{', '.join(old)}: begun by other sources ({', '.join(sorted({*old.values()}))}; now {now}), "
            f"so their figures may not be this one's; move their folders in {Path(arms[0].config.run.root).parent} "
            "(and from results= their verdicts) away to run them again, or (python -m dpo.sweep) take them as they are "
            "with source=any"
        )
