"""Print the tables and draw the chart of docs/experiments.md, from the figures of every run made
so far.

A run takes minutes and its results are large, so one line of extras/experiments.jsonl keeps the
figures that the tables need. To reproduce a row, run it again and compare. Add finished runs, and
print everything:

    python extras/experiments.py results/*.seed*
    python extras/experiments.py --chart docs/mask.png      # needs matplotlib
"""

import collections
import statistics
from pathlib import Path

import root
import evaluate
import tools
from build_data import LEVELS
from extras import failures, report, terminal

FIGURES = root.ROOT / "extras" / "experiments.jsonl"
BUDGETS = ["4", "6", "8", "12", "16", "24", "32"]
SHARES = ["incorrect", "unfinished", "void", "guess", "guess, shape", "guess, digit", "hint first"]
# the chart's two panels: accuracy over turns, and over the baseline b
CURVES = {"half": "masked, b = 0.5", "completed": "masked, b = precision of the completed",
          "group": "masked, b = the group's success rate", "no_mask": "not masked"}
BASELINES = {"tight_0": 0, "tight_017": 0.17, "tight": 0.5, "tight_085": 0.85, "tight_1": 1}


# ---- One run ------------------------------------------------------------------------------------


def measure_shares(rows):
    """Return {kind: share} for SHARES, about the conversations of one level. "guess, shape" and
    "guess, digit" are shares of the questions about a shape or a digit."""
    def count(rows, source_ending):
        return sum(row["source"].endswith(source_ending) for row in rows)

    guesses = [row for row in rows if "Guess" in row["turns"][-1]["text"]]
    incorrect = [row for row in rows if row["finish_reason"] == "answer" and row["reward"] == 0]
    unfinished = [row for row in rows if row["finish_reason"].startswith("over_")]
    void = [row for row in rows if row["finish_reason"] == "void"]
    hint_first = [row for row in rows if failures.plan_of(row) == failures.PLANS[0]]
    return {"incorrect": len(incorrect) / len(rows),
            "unfinished": len(unfinished) / len(rows),
            "void": len(void) / len(rows),
            "guess": len(guesses) / len(rows),
            "guess, shape": count(guesses, "shape") / count(rows, "shape"),
            "guess, digit": count(guesses, "digit") / count(rows, "digit"),
            "hint first": len(hint_first) / len(rows)}


def measure(folder):
    """Return the row of extras/experiments.jsonl about one run, which was evaluated into
    results/NAME.seedN and trained in checkpoints/NAME.seedN. Levels have the same weight."""
    # 1. what evaluation and training have written
    name, seed = report.name_and_seed(folder)
    table = report.read_table(folder)
    steps = tools.read_jsonl(Path("checkpoints") / folder.name / "metrics.jsonl")
    # 2. figures of all levels, and their means
    level_shares = [measure_shares(tools.read_jsonl(folder / f"{level}.jsonl")) for level in LEVELS]
    mean_shares = {}
    for kind in SHARES:
        values = [shares[kind] for shares in level_shares]
        mean_shares[kind] = round(statistics.fmean(values), 4)
    accuracy = {}
    for level in [*LEVELS, "mean"]:
        accuracy[level] = {budget: round(table[level]["accuracy"][budget], 4) for budget in BUDGETS}
    mean_turns = statistics.fmean(table[level]["mean_turns_correct"] or 0 for level in LEVELS)
    return {"run": name, "seed": seed,
            "num_sampled_tokens": sum(step["num_sampled_tokens"] for step in steps),
            "accuracy": accuracy, "mean_turns_correct": round(mean_turns, 2),
            "shares": mean_shares}


# ---- Tables and chart ---------------------------------------------------------------------------


def format_seeds(values, scale=100):
    """Return the mean ± half of its 95% interval over seeds. One seed: the mean alone."""
    return report.format_figure(report.over_seeds(values), scale)


def print_tables(runs):
    """Print the mean accuracy of the levels over turns, and that on hard questions at 32; then
    shares at 32 turns. runs: {name: its rows, one for each seed}."""
    # 1. accuracy
    table = []
    for name, rows in runs.items():
        cells = [format_seeds([row["accuracy"]["mean"][budget] for row in rows])
                 for budget in BUDGETS]
        hard = format_seeds([row["accuracy"]["hard"]["32"] for row in rows])
        table.append([f"`{name}`", str(len(rows)), *cells, hard])
    evaluate.print_rows(["mean of levels", "seeds", *(f"T={budget}" for budget in BUDGETS),
                         "hard, T=32"], table)
    print()
    # 2. shares, turns and tokens
    table = []
    for name, rows in runs.items():
        cells = [format_seeds([row["shares"][kind] for row in rows]) for kind in SHARES]
        turns = format_seeds([row["mean_turns_correct"] for row in rows], 1)
        thousand_tokens = format_seeds([row["num_sampled_tokens"] for row in rows], 0.001)
        table.append([f"`{name}`", *cells, turns, thousand_tokens])
    evaluate.print_rows(["shares at 32 turns", *SHARES, "turns of correct ones",
                         "1,000 tokens sampled in RL"], table)


def draw(runs, path):
    """Draw the mean accuracy of the levels with its 95% interval over seeds: over turns, for some
    ways to treat unfinished conversations; and at 6 and at 32 turns over the baseline b."""
    from matplotlib.figure import Figure

    def accuracy(name, budget):
        return report.over_seeds([row["accuracy"]["mean"][budget] for row in runs[name]])

    figure = Figure(figsize=(11, 4), layout="constrained")
    over_turns, over_baseline = figure.subplots(1, 2)

    # 1. over turns
    turns = [int(budget) for budget in BUDGETS]
    for name, label in CURVES.items():
        if name in runs:
            figures = [accuracy(name, budget) for budget in BUDGETS]
            report.draw_line(over_turns, turns, figures, label)
    report.label_turns(over_turns, turns)
    over_turns.set(title="RL with at most 4 turns: default, SGD, all levels")

    # 2. over the baseline
    names = [name for name in BASELINES if name in runs]
    for budget in ("6", "32"):
        figures = [accuracy(name, budget) for name in names]
        report.draw_line(over_baseline, [BASELINES[name] for name in names], figures,
                         f"{budget} turns")
    over_baseline.set(xlabel="baseline b, paid for an unfinished conversation",
                      title="AdamW, hard questions, over b")

    for axes in (over_turns, over_baseline):
        axes.set(ylim=(0, 100), ylabel="accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    report.save_chart(figure, path)


def main():
    """Add the runs that are named, then print the tables and draw the chart of all runs."""
    parser = terminal.make_parser("Print the tables of docs/experiments.md.")
    parser.add_argument("results", nargs="*", type=Path,
                        help="folders NAME.seedN to add (default: none)")
    parser.add_argument("--chart", type=Path, help="draw accuracy over turns and over the baseline "
                        "into this PNG or SVG, with matplotlib (default: not drawn)")
    args = parser.parse_args()
    report.check_chart(args.chart)

    # 1. all rows, with new runs added; a folder without table.json is still running
    rows = {}
    if FIGURES.exists():
        rows = {(row["run"], row["seed"]): row for row in tools.read_jsonl(FIGURES)}
    for folder in args.results:
        report.name_and_seed(folder)    # refuses other folders, also those without a table
        if (folder / "table.json").exists():
            row = measure(folder)
            rows[row["run"], row["seed"]] = row
    if args.results:
        tools.write_jsonl(FIGURES, rows.values())

    # 2. by run
    runs = collections.defaultdict(list)
    for row in rows.values():
        runs[row["run"]].append(row)
    if args.chart:
        draw(runs, args.chart)
    print_tables(runs)


if __name__ == "__main__":
    terminal.run(main)
