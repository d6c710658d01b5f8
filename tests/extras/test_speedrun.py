"""Specification of extras/speedrun.py: what counts, by hand, and what does not."""

import json

import pytest

import tools
from extras import speedrun


def write_run(folder, name, at_32=0.95, at_6=0.44, questions=200, samples=800, steps=(1, 2),
              **metrics):
    """Write a run of two steps and its evaluation; every level has the same figures."""
    level = {"accuracy": {"6": at_6, "32": at_32}, "standard_error": {"6": 0.01, "32": 0.01},
             "questions": questions, "samples": samples}
    table = dict.fromkeys(("easy", "medium", "hard"), level)
    (folder / "results" / name).mkdir(parents=True)
    (folder / "results" / name / "table.json").write_text(json.dumps(table))
    figures = {"num_sampled_tokens": 4000, "num_trained_tokens": 1000, "seconds_rollout": 15.0,
               "seconds_wait": 5.0, "seconds_update": 10.0, **metrics}
    tools.write_jsonl(folder / "checkpoints" / name / "metrics.jsonl",
                      [{"step": step, **figures} for step in steps])


def check(monkeypatch, *folders):
    monkeypatch.setattr("sys.argv", ["speedrun.py", *map(str, folders)])
    speedrun.main()


@pytest.fixture
def seeds(tmp_path, monkeypatch):
    """Two seeds of a run; the third is that of a test."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "mine.seed0", num_sampled_tokens=7000)
    write_run(tmp_path, "mine.seed1", at_32=0.99)
    return ["results/mine.seed0", "results/mine.seed1", "results/mine.seed2"]


def test_a_run_that_counts_by_hand(seeds, tmp_path, monkeypatch, capsys):
    """Tokens sampled: 14, 8 and 8 thousand; trained on: 2 thousand; one minute each."""
    write_run(tmp_path, "mine.seed2")
    check(monkeypatch, *seeds)
    printed = capsys.readouterr().out
    assert ("| `mine` | 12 | 10 | 2 | 1.0 | 95.0, 99.0, 95.0 | 44.0, 44.0, 44.0 |" in printed
            and "it counts" in printed)


@pytest.mark.parametrize("changes, message", [
    ({"at_32": 0.9499}, "does not count: at 32 turns mine.seed2 has less than 95%"),
    ({"at_6": 0.43}, "does not count: at 6 turns mine.seed2 has less than 44%"),
    ({"questions": 100, "samples": 400}, "easy was not evaluated on all 200 questions"),
    ({"samples": 200}, "4 times each"),
    ({"steps": (1, 3)}, "every step from 1 on"), ({"steps": (11, 12)}, "every step from 1 on"),
    ({"steps": ()}, "every step from 1 on"),
    ({"num_trained_tokens": None}, "without 'num_trained_tokens'"),
    ({"num_sampled_tokens": -5}, "without 'num_sampled_tokens'")], ids=str)
def test_a_run_that_does_not_count(seeds, tmp_path, monkeypatch, changes, message):
    write_run(tmp_path, "mine.seed2", **changes)
    with pytest.raises(tools.InputError, match=message):
        check(monkeypatch, *seeds)


def test_three_seeds_of_one_run(seeds, tmp_path, monkeypatch):
    write_run(tmp_path, "mine.seed2")
    write_run(tmp_path, "other.seed2")
    for folders in (seeds[:2], [*seeds[:2], seeds[0]], [*seeds[:2], "results/other.seed2"],
                    [*seeds, seeds[0]]):
        with pytest.raises(tools.InputError, match="name 3 seeds of one run"):
            check(monkeypatch, *folders)
    with pytest.raises(tools.InputError, match="is not a folder NAME.seedN"):
        check(monkeypatch, "results")


def test_exactly_the_goal_counts(seeds, tmp_path, monkeypatch, capsys):
    """Levels with 288, 399 and 369 of 800 right have a mean of 0.44, which is less in floats."""
    write_run(tmp_path, "mine.seed2")
    path = tmp_path / "results/mine.seed2/table.json"
    table = json.loads(path.read_text())
    for level, count in zip(table.values(), (288, 399, 369)):
        level["accuracy"]["6"] = count / 800
    path.write_text(json.dumps(table))
    check(monkeypatch, *seeds)
    assert "it counts" in capsys.readouterr().out
