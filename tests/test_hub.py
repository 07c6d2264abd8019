"""models/hub.py against a stand-in for the Hub on the loopback, which speaks as much of its API as a download needs."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dpo.inputs import read_inputs
from dpo.runs import new_folder
from dpo.settings import load_config
from models import hub
from models.errors import UserError
from models.gguf_import import resolve_model_path
from models.hub import fetch_data, is_hub_id

ENDINGS = (".jsonl", ".parquet")
COMMITS = {"main": "a" * 40, "old": "b" * 40}
TOKEN = "hf_of_this_test"


class Hub(ThreadingHTTPServer):
    """Repositories by "models/org/name": file -> bytes. `requests` holds (method, path) of all that was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path))
        words = path.strip("/").split("/")
        api = words[0] == "api"
        words = words[1:] if api else words if words[0] == "datasets" else ["models", *words]
        repo, (verb, revision, *inside) = "/".join(words[:3]), words[3:]
        files = self.server.repos.get(repo)
        commit = COMMITS.get(revision, revision)
        if files is None:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif commit not in COMMITS.values():
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            self.answer_json({"id": repo.partition("/")[2], "sha": commit})
        elif verb == "tree":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        elif repo in self.server.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        else:
            data = files["/".join(inside)]
            self.answer(200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data)

    def answer_json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(first: int, count: int) -> bytes:
    made = (
        {"id": str(i), "subset": "s", "prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
        for i in range(first, first + count)
    )
    return "".join(json.dumps(row) + "\n" for row in made).encode()


@pytest.fixture
def stand_in(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, holding a model with other copies of its weights and five datasets; its client's cache is empty."""
    server = Hub()
    others = {"original/model.safetensors": b"x", "consolidated.safetensors": b"x", "pytorch_model.bin": b"x"}
    server.repos = {
        "models/org/tiny": files_of(tiny_folder) | others,
        "datasets/org/one": {"README.md": b"# Rows\n", "data/rows.jsonl": rows(0, 40)},
        "datasets/org/shards": {f"data/train-0000{i}-of-00002.jsonl": rows(20 * i, 20) for i in (0, 1)},
        "datasets/org/several": {"train.jsonl": rows(0, 20), "more/test.jsonl": rows(20, 20)},
        "datasets/org/none": {"README.md": b"# Nothing\n"},
    }
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "_fetched", {})
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def fetch_tiny(name: str = "org/tiny") -> Path:
    return resolve_model_path(name, Path("cache"))


def test_a_model_is_fetched_without_other_copies_of_its_weights_and_only_once(stand_in: Hub, tiny_folder: Path) -> None:
    folder = fetch_tiny()
    assert files_of(folder) == files_of(tiny_folder)
    assert hub.revisions() == {"model org/tiny": COMMITS["main"]}
    asked = len(stand_in.requests)
    assert fetch_tiny() == folder and len(stand_in.requests) == asked
    hub._fetched.clear()  # the next process
    assert fetch_tiny() == folder
    assert not [path for method, path in stand_in.requests[asked:] if "resolve" in path]


def test_a_revision_is_a_branch_a_tag_or_a_commit(stand_in: Hub) -> None:
    for revision in ("old", COMMITS["old"]):
        assert fetch_tiny(f"org/tiny@{revision}").name == COMMITS["old"]
    with pytest.raises(UserError, match=r"model.path = 'org/tiny@gone'.* on the Hub it has no such revision; take one"):
        fetch_tiny("org/tiny@gone")


def test_a_path_that_exists_goes_before_the_hub(stand_in: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_folder)
    assert fetch_tiny() == Path("org/tiny")
    assert stand_in.requests == [] and hub.revisions() == {}


def test_only_a_name_of_two_parts_reads_as_an_id() -> None:
    assert all(map(is_hub_id, ("org/name", "org/name@main", "o-1/n.a_m-e@refs/pr/1", "org/name@v1:a/b.jsonl")))
    assert not any(
        map(is_hub_id, ("name", "./name", "../name", "/org/name", "a/b/c", "~/name", "org/", "org/näme", ""))
    )
    assert is_hub_id("rows/train.jsonl") and not is_hub_id("rows/train.jsonl", (".jsonl",))


def test_what_is_not_on_the_hub_is_named_with_both_readings(stand_in: Hub) -> None:
    with pytest.raises(
        UserError, match=r"reference.path = 'org/gone': there is no such path here, and on the Hub it is "
    ):
        resolve_model_path("org/gone", Path("cache"), "reference.path")
    with pytest.raises(UserError, match=r"data.path = 'org/tiny'.* is no dataset there, or a private one; .*HF_TOKEN"):
        fetch_data("org/tiny", "data.path", ENDINGS)
    with pytest.raises(UserError, match="model.path = 'org/tiny:sub': a model is a whole repository; leave :sub away"):
        fetch_tiny("org/tiny:sub")


def test_a_gated_model_needs_the_token_of_the_environment(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.gated.add("models/org/tiny")
    with pytest.raises(UserError, match=r"model.path = 'org/tiny'.* is gated; accept its terms .*HF_TOKEN"):
        fetch_tiny()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch_tiny() / "config.json").is_file()


def test_offline_the_cache_serves_and_what_it_lacks_is_named(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_tiny()
    hub._fetched.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_tiny() == folder
    assert hub.revisions() == {"model org/tiny": COMMITS["main"]}
    with pytest.raises(UserError, match=r"'org/one'.* on the Hub it is not in the cache, and HF_HUB_OFFLINE forbids"):
        fetch_data("org/one", "data.path", ENDINGS)


def test_without_a_network_the_cache_serves_and_what_it_lacks_is_named(
    stand_in: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_tiny()
    hub._fetched.clear()
    stand_in.shutdown()
    stand_in.server_close()
    assert fetch_tiny() == folder
    with pytest.raises(UserError, match=r"'org/one'.*not in the cache, and the Hub could not be reached \(.*refused"):
        fetch_data("org/one", "data.path", ENDINGS)


def test_a_dataset_is_its_one_file_its_shards_or_the_file_that_is_named(stand_in: Hub) -> None:
    assert fetch_data("org/one", "data.path", ENDINGS).read_bytes() == rows(0, 40)
    shards = fetch_data("org/shards", "data.path", ENDINGS)
    assert shards.name == "data" and len(list(shards.iterdir())) == 2
    assert fetch_data("org/several:more/test.jsonl", "data.path", ENDINGS).read_bytes() == rows(20, 20)
    assert [path.name for path in fetch_data("org/several:more", "data.path", ENDINGS).iterdir()] == ["test.jsonl"]
    with pytest.raises(
        UserError, match=r"data.path = 'org/several': .*\(more/test.jsonl, train.jsonl\).*=org/several:"
    ):
        fetch_data("org/several", "data.path", ENDINGS)
    for name in ("org/none", "org/several:gone.jsonl"):
        with pytest.raises(UserError, match=f"data.path = '{name}': the dataset has no such file; name one"):
            fetch_data(name, "data.path", ENDINGS)


def test_a_run_reads_model_and_rows_from_the_hub_and_env_json_keeps_their_commits(stand_in: Hub) -> None:
    settings = [
        "exp=smoke",
        "model.path=org/tiny",
        "reference.path=org/tiny@old",
        "data.path=org/one",
        "run.cache=cache",
    ]
    config = load_config(settings)
    inputs = read_inputs(config, "cpu")
    assert sum(map(len, (inputs.splits.train, inputs.splits.validation, inputs.splits.test))) <= 40
    environment = json.loads((new_folder(config) / "env.json").read_text())
    commits = {"model org/tiny": "main", "model org/tiny@old": "old", "dataset org/one": "main"}
    assert environment["hub"] == {asked: COMMITS[revision] for asked, revision in commits.items()}


@pytest.mark.long
def test_a_whole_run_trains_a_model_of_the_hub(stand_in: Hub, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{stand_in.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "dpo.train", "exp=smoke", "train.max_steps=1", "model.path=org/tiny"]
    command += ["data.path=org/one", "run.cache=cache"]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    environment = json.loads((tmp_path / "runs" / "smoke" / "latest" / "env.json").read_text())
    assert environment["hub"]["model org/tiny"] == COMMITS["main"]
