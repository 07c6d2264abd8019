"""The card of an exported judge says what its report says, and how to ask it."""

from pathlib import Path

import pytest
from test_report import results_of_a_run, write_run

from dpo.report import write_report


def card_of(folder: Path) -> str:
    exported = folder / "export" / "model"
    exported.mkdir(parents=True)
    (exported / "LICENSE").write_text("Terms")
    write_report([folder])
    return (exported / "README.md").read_text()


def test_a_card_holds_figures_with_intervals_data_limits_template_and_commands(tmp_path: Path) -> None:
    card = card_of(write_run(tmp_path / "run"))
    report = (tmp_path / "run" / "report.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlibrary_name")
    assert "apache-2.0; see LICENSE." in card
    for section in ("Verdicts", "By subset", "Position and looks", "Data"):
        tables = [line for line in report.partition(f"## {section}\n")[2].split("\n## ")[0].splitlines() if "|" in line]
        assert tables and all(line in card.splitlines() for line in tables)
    assert "Answer A: {{ answer_a }}" in card and "vllm serve THIS_FOLDER" in card
    trained = results_of_a_run()["judge"]["trained"]
    assert f"It says A in {100 * trained['raw_a_rate']:.1f} %" in card
    assert "Not shown to be above chance, order-averaged, in per cent: " in card and "](plots/" not in card
    assert "Nor was what an answer written to win" in card


@pytest.mark.parametrize(
    ("readme", "told"),
    [
        ("---\nlanguage: en\nlicense: llama3.2\n---\n# Base\nlicense: mit\n", "license: llama3.2"),
        ("# Base\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_base_models_own_card_says(
    tmp_path: Path, readme: str | None, told: str | None
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if readme:
        (base / "README.md").write_text(readme)
    card = card_of(write_run(tmp_path / "run", model={"path": str(base)}, judge={"sighted": False}))
    assert (f"\n{told}\n" in card) if told else ("license:" not in card and "not said in its folder" in card)
    assert "base_model" not in card and "data.path=rows.jsonl judge.sighted=false" in card


def test_a_judge_that_writes_is_asked_to_write(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", judge={"critique": "greedy"}, critiques={"max_tokens": 40})
    card = card_of(run)
    assert "rows.jsonl judge.critique=greedy critiques.max_tokens=40\n" in card
    assert "rows.jsonl judge.template=compare_critique endpoint.max_tokens=40\n" in card
    assert "It writes a critique" in card and "Compare the two answers briefly" in card


def test_a_run_whose_export_is_gone_or_one_of_several_has_no_card(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    (two / "export" / "model").mkdir(parents=True)
    write_report([one])
    write_report([two, one])
    assert not [*tmp_path.rglob("README.md")]
