"""Debug an agent: what happened in every conversation of an evaluation, by kind, which plan it
began with, and how many of these plans are complete.

An accuracy says how often a policy fails, not how. In the default world a thought says what is
seen, what is asked for and what follows, so each failure can be assigned to the step at which it
happened:

    guess           the answer is called a guess
    tag             the answer in the tag is not the one that the thought arrives at
    claim           "Yes", although what it says it sees is not what the question asks for
    misread         "Yes" to an object of the right name, but the image shows another one
    list            the turn broke off at the token cap in a list that repeats itself
    void            any other turn with neither a call nor an answer
    over_turn, over_context     ran out of turns or tokens

A plan is a list of nine regions: "Hint. Later top-right bottom top-left ... Go top-right." It is
complete if it names each of them once. Its end is used only after many turns, so this is where a
policy that was trained with few turns decays first (docs/worse.md).

    python extras/failures.py results/sft results/rl
"""

import collections
import re
from pathlib import Path

import root  # noqa: F401
import tools
from build_data import LEVELS, PHRASES, POSITIONS
from collect_coldstart import check_layout
from extras import report, terminal

KINDS = ["correct", "guess", "tag", "claim", "misread", "list", "void", "over_turn", "over_context"]
PLANS = [PHRASES[name].strip() for name in ("hint", "scan", "shuffle")]


def kind_of(row, question):
    """Return one of KINDS, or "guess, correct". row: an evaluated conversation; question: the row
    of data/ with its layout."""
    if not row["turns"]:    # a server gave no usable reply
        return "no reply"
    text = row["turns"][-1]["text"]
    if row["reward"] == 1.0:
        return "guess, correct" if "Guess" in text else "correct"
    # conversations without an answer
    if row["finish_reason"] == "void" and repeats(text):
        return "list"
    if row["finish_reason"] != "answer":
        return row["finish_reason"]
    # incorrect answers
    if "Guess" in text:
        return "guess"
    conclusion = re.search(r"Answer (\w+)\.", text)
    if conclusion is None or conclusion[1] != row["prediction"]:
        return "tag"
    claims = re.findall(r"I see (\w+) (\w+) (\d)\. Want \w+\. Yes\.", text)
    if not claims:
        return "claim"
    claimed_object = claims[-1]     # (colour, shape, digit)
    if (claimed_object[0] != question["colour"]
            or question["target_attribute"] not in claimed_object):
        return "claim"
    return "misread"


def repeats(text):
    """Return whether a thought lists cells of the same observation twice, or is a long text without
    a call: lists that never end do both."""
    sources = re.findall(r"In (observation_\d+)", text)
    if len(sources) > len(set(sources)):
        return True
    return "<grounding>" not in text and len(text.split()) > 40


def plan_of(row):
    """Return the plan in a conversation's first turn: one of PLANS, or "none"."""
    for plan in PLANS:
        if row["turns"] and plan in row["turns"][0]["text"]:
            return plan
    return "none"


def is_complete(row):
    """Return whether the plan of the first turn names every region once; None if it has no plan."""
    plan = re.search(r"Later (.*?)\. Go ", row["turns"][0]["text"]) if row["turns"] else None
    if plan is None:
        return None
    return sorted(plan[1].split()) == sorted(POSITIONS)


def format_shares(labels, order):
    """Return a text with the share of every label in %: those of `order` first, then the others by
    name. A label that does not occur is left out."""
    counts = collections.Counter(labels)
    names = [*order, *sorted(counts.keys() - set(order))]
    return "  ".join(f"{name} {100 * counts[name] / len(labels):.1f}"
                     for name in names if counts[name])


def main():
    """Print the shares of kinds and of plans, for every level of every evaluation."""
    # 1. flags
    parser = terminal.make_parser(
        "Print what happened in every conversation of an evaluation, by kind.")
    parser.add_argument("results", nargs="+", type=Path, help="folders written by evaluate.py")
    parser.add_argument("--data", type=Path, default=Path("data"),
                        help="folder of the questions with their layout")
    args = parser.parse_args()
    # 2. one level after the other; its questions have the layout, which its results have not
    for folder in args.results:
        levels = [level for level in LEVELS if level in report.read_table(folder)]
        tools.check(levels, f"{folder}/table.json has none of {', '.join(LEVELS)}; make them with: "
                    "python evaluate.py")
        for level in levels:
            question_rows = tools.read_questions(args.data / f"{level}.jsonl", check_layout,
                                                 hint="python build_data.py")
            questions = {row["id"]: row for row in question_rows}
            rows = tools.read_jsonl(folder / f"{level}.jsonl")
            for row in rows:
                tools.check(row["id"] in questions, f"{folder}/{level}.jsonl: question "
                            f"{row['id']} is not in {args.data}/{level}.jsonl; name its folder "
                            "with --data")
            kinds = [kind_of(row, questions[row["id"]]) for row in rows]
            plans = [plan_of(row) for row in rows]
            print(f"{folder.name} {level}: {format_shares(kinds, KINDS)}")
            complete = [is_complete(row) for row in rows if is_complete(row) is not None]
            share = f"; complete {100 * sum(complete) / len(complete):.1f}" if complete else ""
            print(f"    plan: {format_shares(plans, PLANS)}{share}")


if __name__ == "__main__":
    terminal.run(main)
