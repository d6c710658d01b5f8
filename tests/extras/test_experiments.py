"""Specification of extras/experiments.py: one run as one line, by hand, and what is printed."""

import json

import pytest

import evaluate
from extras import experiments
import tools


def play(kind, text, reward, finish="answer"):
    return {"id": f"{kind}_{text}_{reward}", "source": f"synthetic_{kind}", "reward": reward,
            "finish_reason": finish, "turns": [{"text": "<think>I see no red walls. Hint. Go top."},
                                        {"text": text}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of four conversations a level: a right and a wrong one, a lucky guess, an unfinished
    one; and its two steps of training."""
    rows = [play("shape", "Answer star.", 1.0), play("digit", "Answer 7.", 0.0),
            play("shape", "Guess star.", 1.0), play("digit", "Go top.", 0.0, "over_turn")]
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
    """Added once, however often it is named; a folder that is not done yet is passed over."""
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["experiments.py", "results/half.seed3", "results/x.seed0"])
        experiments.main()
    row, = tools.read_jsonl(experiments.FIGURES)
    assert (row["run"], row["seed"], row["tokens"], row["turns"]) == ("half", 3, 1500, 2.0)
    assert row["accuracy"]["hard"] == dict.fromkeys(experiments.BUDGETS, 0.5)
    assert row["shares"] == {"incorrect": 0.25, "unfinished": 0.25, "void": 0.0, "guess": 0.25,
                             "guess, shape": 0.5, "guess, digit": 0.0, "hint first": 1.0}
    said = capsys.readouterr().out
    assert "| `half` | 1 |" + " 50.0 |" * 7 in said and "| 2.0 | 1.5 |" in said


def test_seeds_are_put_together(folder, monkeypatch, capsys):
    """By hand: 0.5 and 0.7 have the mean 0.6 and s = 0.1414; 12.706 s / sqrt(2) is 1.27."""
    row = experiments.measure(folder)
    other = {**row, "seed": 4, "accuracy": {
        level: dict.fromkeys(experiments.BUDGETS, 0.7) for level in row["accuracy"]}}
    experiments.print_tables({"half": [row, other]})
    assert "| `half` | 2 | 60.0 ± 127.1 |" in capsys.readouterr().out
