"""Tables and chart of docs/experiments.md, from the raw figures of every run that has been made.

Runs take minutes each and their results are large, so what the tables need of each is kept as one
line of extras/experiments.jsonl: rerun a row, and compare. Add finished runs, and print everything:

    python extras/experiments.py results/*.seed*
    python extras/experiments.py --chart docs/mask.png      # needs matplotlib
"""

import argparse
import collections
import statistics
import sys
from pathlib import Path

import root  # noqa: F401
import evaluate
from extras import failures, report
import tools
from build_data import LEVELS

FIGURES = root.ROOT / "docs" / "experiments.jsonl"
BUDGETS = ["4", "6", "8", "12", "16", "24", "32"]
SHARES = ["incorrect", "unfinished", "void", "guess", "guess, shape", "guess, digit", "hint first"]
# rows of the chart: over turns, and over b
CURVES = {"tight": "masked, b = 0.5", "tight_completed": "masked, b = precision of the completed",
          "tight_group": "masked, b = the group's success rate", "tight_no_mask": "not masked"}
BASELINES = {"tight_0": 0, "tight_017": 0.17, "tight": 0.5, "tight_085": 0.85, "tight_1": 1}


def measure(folder):
    """One run, evaluated at results/NAME.seedN and trained at checkpoints/NAME.seedN, as a row of
    extras/experiments.jsonl. Shares are of all conversations, levels weighing the same."""
    name, _, seed = folder.name.rpartition(".seed")
    table = report.read_table(folder)
    steps = tools.read_jsonl(Path("checkpoints") / folder.name / "metrics.jsonl")
    shares = collections.defaultdict(list)
    for level in LEVELS:
        rows = tools.read_jsonl(folder / f"{level}.jsonl")
        guesses = [row for row in rows if "Guess" in row["turns"][-1]["text"]]
        found = {"incorrect": [r for r in rows if r["finish_reason"] == "answer" and r["reward"] == 0],
                 "unfinished": [r for r in rows if r["finish_reason"].startswith("over_")],
                 "void": [r for r in rows if r["finish_reason"] == "void"], "guess": guesses,
                 "hint first": [r for r in rows if failures.plan_of(r) == failures.PLANS[0]]}
        for kind, part in found.items():
            shares[kind].append(len(part) / len(rows))
        for kind in ("shape", "digit"):
            asked = sum(row["source"].endswith(kind) for row in rows)
            guessed = sum(row["source"].endswith(kind) for row in guesses)
            shares[f"guess, {kind}"].append(guessed / asked)
    return {"run": name, "seed": int(seed),
            "tokens": sum(s["num_sampled_tokens"] for s in steps),
            "accuracy": {level: {T: round(table[level]["accuracy"][T], 4) for T in BUDGETS}
                         for level in [*LEVELS, "mean"]},
            "turns": round(statistics.fmean(table[level]["mean_turns_correct"] or 0
                                            for level in LEVELS), 2),
            "shares": {kind: round(statistics.fmean(shares[kind]), 4) for kind in SHARES}}


def shown(values, scale=100):
    """Mean ± half of its 95% interval over seeds; the mean alone of one seed."""
    mean, half = report.over_seeds(values)
    return f"{scale * mean:.1f}" + ("" if half is None else f" ± {scale * half:.1f}")


def print_tables(runs):
    """runs: {name: its rows, one a seed}. Accuracy by level over turns; shares at 32 turns."""
    for level in ("mean", "hard"):
        evaluate.print_rows([level, "seeds", *(f"T={T}" for T in BUDGETS)], [
            [f"`{name}`", str(len(rows)),
             *(shown([row["accuracy"][level][T] for row in rows]) for T in BUDGETS)]
            for name, rows in runs.items()])
        print()
    evaluate.print_rows(["shares at 32 turns", *SHARES, "turns of correct ones",
                         "1,000 tokens sampled in RL"], [
        [f"`{name}`", *(shown([row["shares"][kind] for row in rows]) for kind in SHARES),
         shown([row["turns"] for row in rows], 1), shown([row["tokens"] for row in rows], 0.001)]
        for name, rows in runs.items()])


def draw(runs, path):
    """Accuracy, the mean of levels with its 95% interval over seeds: over turns, for some ways to
    treat what is unfinished; and at 6 and at 32 turns over b."""
    from matplotlib.figure import Figure

    def line(axes, xs, values, label):
        means, halves = zip(*map(report.over_seeds, values))
        axes.errorbar(xs, [100 * mean for mean in means], [100 * (half or 0) for half in halves],
                      marker="o", markersize=4, capsize=3, label=label)

    def values(name, T):
        return [row["accuracy"]["mean"][T] for row in runs[name]]

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in CURVES.items():
        if name in runs:
            line(left, [int(T) for T in BUDGETS], [values(name, T) for T in BUDGETS], label)
    left.set_xscale("log", base=2)
    left.set_xticks([int(T) for T in BUDGETS], BUDGETS, minor=False)
    left.set(xlabel="turns allowed at test time", title="RL with at most 4 turns")
    known = {name: b for name, b in BASELINES.items() if name in runs}
    for T in ("6", "32"):
        line(right, list(known.values()), [values(name, T) for name in known], f"{T} turns")
    right.set(xlabel="b, paid for an unfinished conversation", title="the same, over b")
    for axes in (left, right):
        axes.set(ylim=(0, 100), ylabel="accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    tools.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description="Tables of the experiments.")
    parser.add_argument("results", nargs="*", type=Path, help="folders NAME.seedN to add")
    parser.add_argument("--chart", type=Path, help="draw accuracy over turns and b into this PNG")
    args = parser.parse_args()
    rows = {(row["run"], row["seed"]): row
            for row in (tools.read_jsonl(FIGURES) if FIGURES.exists() else [])}
    for folder in args.results:
        if (folder / "table.json").exists():    # else it is still running
            row = measure(folder)
            rows[row["run"], row["seed"]] = row
    tools.write_jsonl(FIGURES, rows.values())
    runs = collections.defaultdict(list)
    for row in rows.values():
        runs[row["run"]].append(row)
    print_tables(runs)
    if args.chart:
        draw(runs, args.chart)


if __name__ == "__main__":
    tools.run(main)
