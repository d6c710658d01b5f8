"""Specification of extras/experiments.py: one run as one line, by hand, and what is printed."""

import json

import pytest

import evaluate
import tools
from extras import experiments


def conversation(kind, text, reward, finish_reason="answer"):
    """Return the row of a conversation of two turns about a shape or a digit."""
    first_turn = {"text": "<think>I see no red walls. Hint. Go top."}
    return {"id": f"{kind}_{text}_{reward}", "source": f"synthetic_{kind}", "reward": reward,
            "finish_reason": finish_reason, "turns": [first_turn, {"text": text}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write a run, evaluated and trained, and return its results. A level has four conversations: a
    correct and an incorrect one, a lucky guess, an unfinished one. Training had two steps."""
    rows = [conversation("shape", "Answer star.", 1.0), conversation("digit", "Answer 7.", 0.0),
            conversation("shape", "Guess star.", 1.0),
            conversation("digit", "Go top.", 0.0, "over_turn")]
    out = tmp_path / "results" / "half.seed3"
    levels = dict.fromkeys(("easy", "medium", "hard"), rows)
    for level in levels:
        tools.write_jsonl(out / f"{level}.jsonl", rows)
    table = evaluate.summarise(levels, [1, *map(int, experiments.BUDGETS)])
    (out / "table.json").write_text(json.dumps(table))
    tools.write_jsonl(tmp_path / "checkpoints" / "half.seed3" / "metrics.jsonl",
                      [{"num_sampled_tokens": 1000}, {"num_sampled_tokens": 500}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "FIGURES", tmp_path / "experiments.jsonl")
    return out


def test_a_run_is_one_line(folder, monkeypatch, capsys):
    """A run is added once, however often it is named. A folder without a table is skipped."""
    (folder.parent / "x.seed0").mkdir()
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["experiments.py", "results/half.seed3", "results/x.seed0"])
        experiments.main()
    row, = tools.read_jsonl(experiments.FIGURES)
    assert (row["run"], row["seed"]) == ("half", 3)
    assert (row["num_sampled_tokens"], row["mean_turns_correct"]) == (1500, 2.0)
    assert row["accuracy"]["hard"] == dict.fromkeys(experiments.BUDGETS, 0.5)
    assert row["shares"] == {"incorrect": 0.25, "unfinished": 0.25, "void": 0.0, "guess": 0.25,
                             "guess, shape": 0.5, "guess, digit": 0.0, "hint first": 1.0}
    printed = capsys.readouterr().out
    assert "| `half` | 1 |" + " 50.0 |" * 7 in printed and "| 2.0 | 1.5 |" in printed


def test_seeds_are_put_together(folder, monkeypatch, capsys):
    """By hand: 0.5 and 0.7 have the mean 0.6 and s = 0.1414; 12.706 s / sqrt(2) is 1.27."""
    row = experiments.measure(folder)
    accuracy = {level: dict.fromkeys(experiments.BUDGETS, 0.7) for level in row["accuracy"]}
    other = {**row, "seed": 4, "accuracy": accuracy}
    experiments.print_tables({"half": [row, other]})
    assert "| `half` | 2 | 60.0 ± 127.1 |" in capsys.readouterr().out


def test_a_chart_without_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["experiments.py", "--chart", "mask.png"])
    message = "^--chart needs matplotlib: pip install matplotlib$"
    with pytest.raises(tools.InputError, match=message):
        experiments.main()
