"""How an agent is debugged: what became of every conversation of an evaluation, by kind, and which
plan it began with.

An accuracy says how often a policy fails, not how. In the default world a thought says what is
seen, what is wanted and what follows, so each failure can be put down to the step at which it
happened:

    guess           the answer is called a guess
    tag             the answer is not the one that the thought arrives at
    claim           "Yes", although what it says it sees is not what the question asks for
    misread         "Yes" to something of the right name, but that is not what the image shows
    list            broke off at the token cap in a list that repeats itself
    void            any other turn with neither a call nor an answer
    over_turn, over_context     ran out of turns or tokens

    python extras/failures.py results/sft results/rl
"""

import argparse
import collections
import re
import sys
from pathlib import Path

import root  # noqa: F401
import tools
from build_data import LEVELS

KINDS = ["right", "guess", "tag", "claim", "misread", "list", "void", "over_turn", "over_context"]
PLANS = [tools.PHRASES[name].strip() for name in ("hint", "scan", "shuffle")]


def kind_of(row, question):
    """One of KINDS. row: an evaluated conversation; question: the row of data/ with its layout."""
    text = row["turns"][-1]["text"]
    if row["reward"] == 1.0:
        return "guess, right" if "Guess" in text else "right"
    if row["finish_reason"] != "answer":
        return "list" if row["finish_reason"] == "void" and repeats(text) else row["finish_reason"]
    if "Guess" in text:
        return "guess"
    said = re.search(r"Answer (\w+)\.", text)
    if not said or said[1] != row["prediction"]:
        return "tag"
    claims = re.findall(r"I see (\w+) (\w+) (\d)\. Want \w+\. Yes\.", text)
    if not claims or claims[-1][0] != question["colour"] or question["target_attribute"] not in claims[-1]:
        return "claim"
    return "misread"


def repeats(text):
    """Whether a thought notes places of the same observation twice, as lists do that never end."""
    sources = re.findall(r"In (observation_\d+)", text)
    return len(sources) > len(set(sources)) or "<grounding>" not in text and len(text.split()) > 40


def plan_of(row):
    return next((plan for plan in PLANS if plan in row["turns"][0]["text"]), "none")


def shares(labels, order):
    """In % of all conversations, kinds that never occur left out."""
    counts = collections.Counter(labels)
    return "  ".join(f"{label} {100 * counts[label] / len(labels):.1f}"
                     for label in [*order, *sorted(counts.keys() - set(order))] if counts[label])


def main():
    parser = argparse.ArgumentParser(description="What became of every conversation, by kind.")
    parser.add_argument("results", nargs="+", type=Path, help="folders written by evaluate.py")
    parser.add_argument("--data", type=Path, default=Path("data"), help="questions with layout")
    args = parser.parse_args()
    for folder in args.results:
        levels = [level for level in LEVELS if (folder / f"{level}.jsonl").exists()]
        if not levels:
            raise tools.InputError(f"{folder} has no easy, medium or hard.jsonl; make them with: "
                                   "python evaluate.py")
        for level in levels:
            asked = tools.read_questions(args.data / f"{level}.jsonl", "python build_data.py")
            questions = {row["id"]: row for row in asked}
            rows = tools.read_jsonl(folder / f"{level}.jsonl")
            kinds = [kind_of(row, questions[row["id"]]) for row in rows]
            print(f"{folder.name} {level}: {shares(kinds, KINDS)}")
            print(f"    plan: {shares([plan_of(row) for row in rows], PLANS)}")


if __name__ == "__main__":
    tools.run(main)
