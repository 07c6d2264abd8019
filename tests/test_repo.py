"""The house: budgets of lines, layers, imports, experiments and README are what they are said to be."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.settings import keys, load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dpo", "models", "kernels")  # from the top layer to the bottom one: each imports itself and what follows
LIBRARIES = {"torch", "safetensors", "tokenizers", "numpy", "pydantic", "jinja2", "tqdm", "pyarrow"}
LIBRARIES |= {"matplotlib", "wandb", "gguf", "triton", "openai", "huggingface_hub"}
CORE = ("losses", "pairs", "logprobs", "reference", "packing", "step", "loop")
# Of the product, about 3,000 are kernels and what certifies them without a GPU (static, roofline, bench).
PRODUCT_LINES, CORE_LINES, FILE_LINES = 20_233, 1500, 500

PRODUCT = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))
README = ROOT / "README.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def imports_of(file: Path) -> list[tuple[int, str]]:
    """Line and full name of every module the file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: imports are absolute"
            found.append((node.lineno, node.module or ""))
    return found


def is_kernel(function: ast.FunctionDef) -> bool:
    """Triton's arguments are pointers and constants: it has no types or docstrings for them."""
    return any("triton" in ast.unparse(mark) for mark in function.decorator_list)


def tracked_files() -> list[Path]:
    """What git has or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_longer_than_a_reader_bears() -> None:
    files = [*PRODUCT, *(ROOT / "tests").glob("*.py")]
    assert {name_of(file): lines_of(file) for file in files if lines_of(file) > FILE_LINES} == {}


def test_what_the_product_reads_beside_its_code_is_installed_with_it() -> None:
    installed = [glob for globs in re.findall(r"^        \"[\w.]+\": \[(.+)\],$", (ROOT / "setup.py").read_text(), re.M)
                 for glob in re.findall(r"\"([^\"]+)\"", globs)]  # fmt: skip
    read = [path for path in tracked_files() if path.suffix not in (".py", "")]
    beside = [path for path in read if path.relative_to(ROOT).parts[0] in PACKAGES]
    assert len(beside) > 10 and [path for path in beside if not any(path.match(glob) for glob in installed)] == []


def test_the_product_and_its_core_keep_to_their_budgets() -> None:
    assert sum(map(lines_of, PRODUCT)) <= PRODUCT_LINES
    core = [ROOT / "dpo" / f"{name}.py" for name in CORE]
    assert sum(lines_of(file) for file in core if file.exists()) <= CORE_LINES


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_loads_and_opens_with_its_question(file: Path) -> None:
    assert load_config([f"exp={file}"]).exp == file.stem
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ") and "?" in first
    assert 8 <= lines_of(file) <= 20


def test_every_config_field_is_read_outside_the_config() -> None:
    if not (ROOT / "dpo" / "train.py").exists():
        pytest.skip("dpo/train.py is not written yet")
    source = "\n".join(file.read_text() for file in PRODUCT if name_of(file) != "dpo/config.py")
    unread = []
    for key in keys():
        section, _, field = key.rpartition(".")
        read = re.search(rf"\b(?:{section or 'config'}|config)\.{field}\b", source)
        modules = [file for file in PRODUCT if section and name_of(file).startswith(f"dpo/{section}")]
        taken = any(
            re.search(rf"^    {field}: ", file.read_text(), flags=re.M) for file in modules
        )  # handed over whole
        unread += [] if read or taken or key == "exp" else [key]
    assert unread == []


def test_layers_import_downwards_only() -> None:
    wrong = []
    for file in PRODUCT:
        package = file.relative_to(ROOT).parts[0]
        above = PACKAGES[: PACKAGES.index(package)]
        wrong += [f"{name_of(file)}:{line}: {name}" for line, name in imports_of(file) if name.split(".")[0] in above]
    assert wrong == []


def test_the_product_imports_only_its_few_libraries() -> None:
    allowed = LIBRARIES | set(PACKAGES) | sys.stdlib_module_names
    wrong = [
        f"{name_of(file)}:{line}: {name}"
        for file in PRODUCT
        for line, name in imports_of(file)
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_every_file_and_every_public_function_says_what_it_is() -> None:
    silent = []
    for file in PRODUCT:
        module = ast.parse(file.read_text())
        if module.body and not ast.get_docstring(module):
            silent.append(name_of(file))
        for node in module.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or is_kernel(node):
                continue
            silent += [] if ast.get_docstring(node) else [f"{name_of(file)}:{node.lineno}: {node.name}"]
    assert silent == []


def test_every_function_is_annotated_in_full() -> None:
    bare = []
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or is_kernel(node):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [more for more in (node.args.vararg, node.args.kwarg) if more]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            if untyped or node.returns is None:
                bare.append(f"{name_of(file)}:{node.lineno}: {node.name}({', '.join(untyped)})")
    assert bare == []


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    wrong = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture, say
        numbered = enumerate([name_of(file), *text.splitlines()])
        wrong += [f"{name_of(file)}:{number}" for number, line in numbered if re.search(r"/(work|root|home)/", line)]
    assert wrong == []


def test_a_foreign_package_named_kernels_is_detected_and_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise AssertionError('looked at, but not imported')")
    outcomes = []
    for order in ([tmp_path, ROOT], [ROOT, tmp_path]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, order))}
        command = [sys.executable, "-c", "import dpo"]
        outcomes.append(subprocess.run(command, env=environment, cwd=tmp_path.parent, capture_output=True, text=True))
    foreign, ours = outcomes
    assert foreign.returncode != 0 and f"another project's package: {tmp_path / 'kernels'}" in foreign.stderr
    assert ours.returncode == 0, ours.stderr


# README.md: what it names exists, what it tells to type works --------------------------------------------------------


def readme_commands() -> list[str]:
    """Every line of a fenced block and every `...`, joined where a backslash ends a line."""
    text = README.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.strip() for block in blocks for line in block.splitlines()] + spans


@needs_readme
def test_every_path_in_the_readme_exists() -> None:
    text = README.read_text()
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)}|tests|experiments)/[\w./-]*", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    named = {name.rstrip(".") for name in named if not re.search(r"\b[A-Z]{2,}\b(?!\.md)", name)}  # NAME is a blank
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@needs_readme
def test_the_readmes_line_counts_are_about_right() -> None:
    named = re.findall(r"`([\w/]+\.py)` \((\d+)\)", README.read_text())
    assert len(named) > 20
    wrong = {name: lines_of(ROOT / name) for name, told in named if abs(lines_of(ROOT / name) - int(told)) > 15}
    assert wrong == {}


@needs_readme
def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {match[1] for command in readme_commands() if (match := re.match(r"make ([a-z][\w-]*)", command))}
    assert named, "the README tells how to make something"
    assert named <= targets


@needs_readme
def test_every_module_and_experiment_in_the_readme_exists() -> None:
    wrong = []
    for command in readme_commands():
        for module in re.findall(r"\bpython3? -m ([\w.]+)", command):
            ours = module.split(".")[0] in PACKAGES
            if ours and importlib.util.find_spec(module) is None:
                wrong.append(command)
        for name in re.findall(r"\bexp=([a-z]\S*)", command):
            if not (ROOT / "experiments" / f"{name}.toml").exists() and not (ROOT / name).exists():
                wrong.append(command)
    assert wrong == []


@needs_readme
def test_every_training_command_in_the_readme_is_understood() -> None:
    """A blank (NAME, [key=value ...]) is nothing to check; the rest is loaded, without running it."""
    for command in readme_commands():
        words = shlex.split(command.split("#")[0]) if "dpo.train" in command else []
        arguments = words[words.index("dpo.train") + 1 :] if "dpo.train" in words else []
        if arguments and not any(re.search(r"\[|\.\.\.|=[A-Z]+\b|--", argument) for argument in arguments):
            load_config(arguments)
