"""Specification of extras/failures.py: one conversation of each kind, by hand."""

import json

import pytest

import build_data
import tools
from extras import failures

CALL = '<grounding>{"bbox_2d": [0.0, 0.0, 0.333, 0.333], "source": "original_image"}</grounding>'
QUESTION = {"colour": "red", "target_attribute": "star"}      # What digit is on the red star?


@pytest.mark.parametrize("kind, text, finish_reason, prediction, reward", [
    ("correct", "<think>I see red star 6. Want star. Yes. Answer 6.</think><answer>6</answer>",
     "answer", "6", 1.0),
    ("guess, correct", "<think>I see no red. Guess 6.</think><answer>6</answer>",
     "answer", "6", 1.0),
    ("guess", "<think>I see no red. Guess 7.</think><answer>7</answer>", "answer", "7", 0.0),
    ("tag", "<think>I see red star 6. Want star. Yes. Answer 6.</think><answer>8</answer>",
     "answer", "8", 0.0),
    ("tag", "<answer>8</answer>", "answer", "8", 0.0),
    ("claim", "<think>I see red square 7. Want star. Yes. Answer 7.</think><answer>7</answer>",
     "answer", "7", 0.0),
    ("claim", "<think>I see cyan star 7. Want star. Yes. Answer 7.</think><answer>7</answer>",
     "answer", "7", 0.0),
    ("misread", "<think>I see red star 7. Want star. Yes. Answer 7.</think><answer>7</answer>",
     "answer", "7", 0.0),
    ("list", "<think>In observation_1 top. In observation_2 left. In observation_1 top.",
     "void", None, 0.0),
    ("void", "<think>I see no red.</think>", "void", None, 0.0),
    ("over_turn", "<think>Later top. Go top.</think>" + CALL, "over_turn", None, 0.0)])
def test_kind_of_a_conversation(kind, text, finish_reason, prediction, reward):
    row = {"turns": [{"text": text}], "finish_reason": finish_reason, "prediction": prediction,
           "reward": reward}
    assert failures.kind_of(row, QUESTION) == kind


@pytest.mark.parametrize("plan, text", [
    ("Scan.", "<think>I see no red walls. Scan. Later top."), ("none", "<think>Go top.")])
def test_plan_of_a_first_turn(plan, text):
    assert failures.plan_of({"turns": [{"text": text}]}) == plan


@pytest.mark.parametrize("text, expected", [
    ("Hint. Later right top-left top top-right left center bottom-left bottom bottom-right. Go "
     "right.", True),
    ("Hint. Later right top-left top top-right left center bottom-left bottom bottom. Go right.",
     False),                                                        # one twice, one not at all
    ("Hint. Later right top-left top top-right left center bottom-left bottom. Go right.", False),
    ("Hint. Later right top-left top top-right left center bottom-left bottom bottom-right top. "
     "Go right.", False),
    ("I see no red. Go right.", None)])
def test_a_plan_is_complete_if_it_names_every_region_once(text, expected):
    assert failures.is_complete({"turns": [{"text": f"<think>{text}</think>{CALL}"}]}) is expected
    assert failures.is_complete({"turns": []}) is None


def test_shares_are_printed_in_order_and_only_if_they_occur():
    assert failures.format_shares(["a", "c", "a", "b"], ["b", "d"]) == "b 25.0  a 50.0  c 25.0"


@pytest.fixture
def evaluated(tmp_path):
    """A folder with results of one easy question, for which a server gave no reply, next to stale
    ones of a hard question; and the questions in data/."""
    (tmp_path / "data").mkdir()
    for level in ("easy", "hard"):
        question = build_data.make_question((level, 0, level), tmp_path / "data", 0)
        tools.write_jsonl(tmp_path / f"data/{level}.jsonl", [question])
        refused = {"id": question["id"], "turns": [], "reward": None, "finish_reason": None}
        tools.write_jsonl(tmp_path / f"{level}.jsonl", [refused])
    accuracy = {"accuracy": {"1": 0.5}, "standard_error": {"1": 0.0}}
    (tmp_path / "table.json").write_text(json.dumps({"easy": accuracy}))
    return tmp_path


def run(monkeypatch, folder):
    monkeypatch.setattr("sys.argv", ["failures.py", str(folder), "--data", str(folder / "data")])
    failures.main()


def test_only_levels_of_the_table_are_read(evaluated, monkeypatch, capsys):
    run(monkeypatch, evaluated)
    assert capsys.readouterr().out == (
        f"{evaluated.name} easy: no reply 100.0\n    plan: none 100.0\n")


def test_other_questions_are_told(evaluated, monkeypatch):
    path = evaluated / "data/easy.jsonl"
    [row] = tools.read_jsonl(path)
    tools.write_jsonl(path, [{**row, "id": "other"}])
    with pytest.raises(tools.InputError, match="question easy_00000 is not in .*easy.jsonl; name "):
        run(monkeypatch, evaluated)
    tools.write_jsonl(path, [{"id": "1", "image": "1.jpg", "question": "?", "answer": "7"}])
    with pytest.raises(tools.InputError, match="easy.jsonl:1: .* with a layout"):
        run(monkeypatch, evaluated)
