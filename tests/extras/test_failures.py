"""Specification of failures.py: one conversation of each kind, by hand."""

import pytest

from extras import failures

CALL = '<grounding>{"bbox_2d": [0.0, 0.0, 0.333, 0.333], "source": "original_image"}</grounding>'
QUESTION = {"colour": "red", "target_attribute": "star"}      # What digit is on the red star?


@pytest.mark.parametrize("kind, text, finish, prediction, reward", [
    ("right", "<think>I see red star 6. Want star. Yes. Answer 6.</think><answer>6</answer>",
     "answer", "6", 1.0),
    ("guess, right", "<think>I see no red. Guess 6.</think><answer>6</answer>", "answer", "6", 1.0),
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
def test_kinds(kind, text, finish, prediction, reward):
    row = {"turns": [{"text": text}], "finish_reason": finish, "prediction": prediction, "reward": reward}
    assert failures.kind_of(row, QUESTION) == kind


def test_plans_and_shares():
    assert failures.plan_of({"turns": [
        {"text": "<think>I see no red walls. Scan. Later top."}]}) == "Scan."
    assert failures.plan_of({"turns": [{"text": "<think>Go top."}]}) == "none"
    assert failures.shares(["a", "c", "a", "b"], ["b", "d"]) == "b 25.0  a 50.0  c 25.0"
