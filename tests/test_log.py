"""metrics.jsonl, its resumption and its mirror at wandb; times; the environment."""

import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpo.log
from dpo.config import Config, LogConfig, config_dict
from dpo.log import MetricsLog, environment, git_state, peak_rss_mib, progress, source_digest, stage
from models.errors import UserError

CONFIG = Config(exp="trial")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder: Path, begin: int, end: int, config: Config = CONFIG) -> None:
    """What a run writes from step `begin` to `end`: a validation at 0 and every second step, a line a step."""
    with MetricsLog(folder, config, begin) as log:
        if begin == 0:
            log.write(0, {"eval/loss": 0.7})
        for step in range(begin + 1, end + 1):
            log.write(step, {"loss": 1 / step, "rewards/margins": 0.1 * step})
            if step % 2 == 0:
                log.write(step, {"eval/loss": 2 / step})


def test_every_call_is_a_line_at_once_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, CONFIG, 0) as log:
        log.write(1, {"loss": 0.5, "grad_norm": math.nan, "lr": math.inf})
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": None, "lr": None}]  # before it is closed
        log.write(2, {"loss": 1 / 3})
    assert lines(tmp_path)[1] == {"step": 2, "loss": 1 / 3}


@pytest.mark.parametrize("checkpoint", range(7))
@pytest.mark.parametrize("torn", ["", '{"step": 7, "lo', "\x00\x00"])
def test_a_resumed_file_ends_as_an_uninterrupted_one(tmp_path: Path, checkpoint: int, torn: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    write_steps(whole, 0, 8)
    write_steps(resumed, 0, 6)
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write(torn)
    write_steps(resumed, checkpoint, 8)
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in resumed.iterdir()] == ["metrics.jsonl"]


def test_a_broken_line_amid_the_others_is_an_error_and_the_file_stays(tmp_path: Path) -> None:
    text = '{"step": 1}\n{"loss": 2}\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "), MetricsLog(tmp_path, CONFIG, 1):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_ranks_after_the_first_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, CONFIG, 0, first=False) as log:
        log.write(1, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == []


# wandb ----------------------------------------------------------------------------------------------------------------


class FakeWandb:
    """Remembers what it is told."""

    Error = type("Error", (Exception,), {})
    errors = SimpleNamespace(Error=Error)

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.started, self.logged, self.ended = refuses, [], [], []

    def init(self, **settings: object) -> "FakeWandb":
        if self.refuses:
            raise self.Error("no key")
        self.started.append(settings)
        return self

    def Settings(self, **settings: object) -> dict[str, object]:
        return settings

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def with_wandb(mode: str) -> Config:
    return Config(exp="trial", log=LogConfig(wandb=mode, project="judges"))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_gets_the_same_names_and_steps(tmp_path: Path, monkeypatch, mode: str) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsLog(tmp_path, with_wandb(mode), 0) as log:
        log.write(1, {"loss": 0.5, "rewards/margins": 0.1, "grad_norm": math.nan})
    (settings,) = fake.started
    assert settings["mode"] == mode and settings["project"] == "judges" and settings["dir"] == tmp_path
    assert settings["config"] == config_dict(with_wandb(mode)) and settings["name"] == f"trial-{tmp_path.name}"
    assert fake.logged == [(1, {"loss": 0.5, "rewards/margins": 0.1})] and fake.ended == [0]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_another_folder_does_not(tmp_path: Path, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        with MetricsLog(tmp_path / name, with_wandb("offline"), 0):
            pass
    first, again, other = (settings["id"] for settings in fake.started)
    assert first == again != other


def test_wandb_hears_of_a_failure(tmp_path: Path, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path, with_wandb("offline"), 0):
        raise KeyboardInterrupt
    assert fake.ended == [1]


def test_where_wandb_does_not_start_the_user_is_told_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses=True))
    with (
        pytest.raises(UserError, match=r"log\.wandb=online: .*no key.*log\.wandb=offline"),
        MetricsLog(tmp_path, with_wandb("online"), 0),
    ):
        pass


def test_the_real_wandb_logs_offline_into_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    write_steps(tmp_path, 0, 3, with_wandb("offline"))
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert len(lines(tmp_path)) == 5
    deadline = time.monotonic() + 20  # wandb's own process may write a moment after finish() has returned
    while b"rewards/margins" not in record.read_bytes():
        assert time.monotonic() < deadline, "wandb has not written the metrics"
        time.sleep(0.05)


def test_wandb_is_not_even_imported_when_off() -> None:
    code = "import sys, dpo.log; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# times, bars, environment ---------------------------------------------------------------------------------------------


def test_a_stage_notes_its_seconds(monkeypatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(dpo.log.time, "perf_counter", lambda: next(clock))
    times = {"inputs": 1.0}
    with stage("train", times):
        pass
    assert times == {"inputs": 1.0, "train": 2.5}


def test_a_bar_is_silent_where_stderr_is_no_terminal(capsys) -> None:
    with progress(3, "training", "steps", 1) as bar:
        bar.update(2)
        bar.set_postfix_str("loss 0.5")
    assert capsys.readouterr() == ("", "")


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("rank", "draws"), [("0", True), ("1", False)])
def test_a_bar_on_a_terminal_shows_eta_and_throughput_of_the_first_process(monkeypatch, rank: str, draws: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("RANK", rank)
    with progress(3, "training", "steps") as bar:
        bar.update(1)
        bar.refresh()
    assert ("training:  33%" in terminal.text and " steps/s" in terminal.text) == draws
    assert bool(terminal.text) == draws


def test_peak_memory_is_in_mebibytes() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water_kib = int(status["VmHWM"].split()[0])
    assert peak_rss_mib() >= high_water_kib / 1024 * 0.9 and peak_rss_mib() < high_water_kib
    block = torch.ones(16 * 2**20)  # 64 MiB
    assert peak_rss_mib() >= block.numel() * 4 / 2**20


def test_the_environment_is_json_and_names_machine_versions_command_and_commit() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"] == version("torch") and found["packages"]["numpy"] == version("numpy")
    assert found["threads"] == torch.get_num_threads() and found["cpu"] and isinstance(found["amx"], bool)
    assert found["start_utc"].endswith("+00:00") and found["command"].startswith("python ")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if head.returncode == 0:
        assert found["git"]["commit"] == head.stdout.strip() and isinstance(found["git"]["dirty"], bool)


def test_a_commit_is_as_it_was_whatever_results_a_sweep_keeps_in_the_tree(tmp_path: Path) -> None:
    source, result = tmp_path / "dpo" / "loop.py", tmp_path / "experiments" / "results" / "q_a" / "arms.json"

    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    for file in (source, result):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    assert git_state(tmp_path) is None
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    result.write_text("2\n")
    state = git_state(tmp_path)
    assert state and len(str(state["commit"])) == 40 and state["dirty"] is False
    source.write_text("2\n")
    assert git_state(tmp_path) == state | {"dirty": True}


def test_where_git_is_absent_there_is_no_commit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None


def test_what_only_shows_results_is_no_part_of_the_sources_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is laid out anew leaves a sweep's arms finished; anything that makes figures does not."""
    read, whole = Path.read_bytes, source_digest.__wrapped__()
    for name, same in (("sweep_report.py", True), ("plots.py", True), ("report.toml", True), ("loop.py", False)):
        monkeypatch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.name == name))
        assert (source_digest.__wrapped__() == whole) is same, name
