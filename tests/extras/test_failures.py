"""Specification of extras/failures.py: one conversation of each kind, by hand."""

import pytest

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


def test_shares_are_printed_in_order_and_only_if_they_occur():
    assert failures.format_shares(["a", "c", "a", "b"], ["b", "d"]) == "b 25.0  a 50.0  c 25.0"
