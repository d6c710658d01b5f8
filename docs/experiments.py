"""Tables and chart of docs/experiments.md, from the raw figures of every run that has been made.

Runs take minutes each and their results are large, so what the tables need of each is kept as one
line of docs/experiments.jsonl: rerun a row, and compare. Add finished runs, and print everything:

    python docs/experiments.py results/*.seed*
    python docs/experiments.py --chart docs/value.png      # needs matplotlib
"""

import argparse
import collections
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import evaluate
import failures
import report
import tools
from build_data import LEVELS

FIGURES = ROOT / "docs" / "experiments.jsonl"
BUDGETS = ["4", "6", "8", "12", "16", "24", "32"]
SHARES = ["wrong", "unfinished", "void", "guess", "guess, shape", "guess, digit", "hint first"]
# rows of the figure over b: without the mask an unfinished conversation is paid nothing
BASELINES = {"tight_no_mask": 0, "tight_017": 0.17, "tight": 0.5, "tight_085": 0.85, "tight_1": 1}


def measure(folder):
    """One run, evaluated at results/NAME.seedN and trained at checkpoints/NAME.seedN, as a row of
    docs/experiments.jsonl. Shares are of all conversations, levels weighing the same."""
    name, _, seed = folder.name.rpartition(".seed")
    table = report.read_table(folder)
    steps = tools.read_jsonl(Path("checkpoints") / folder.name / "metrics.jsonl")
    shares = collections.defaultdict(list)
    for level in LEVELS:
        rows = tools.read_jsonl(folder / f"{level}.jsonl")
        guesses = [row for row in rows if "Guess" in row["turns"][-1]["text"]]
        for kind, found in {
                "wrong": [r for r in rows if r["finish"] == "answer" and r["reward"] == 0],
                "unfinished": [r for r in rows if r["finish"].startswith("over_")],
                "void": [r for r in rows if r["finish"] == "void"], "guess": guesses,
                "hint first": [r for r in rows if failures.plan_of(r) == failures.PLANS[0]]}.items():
            shares[kind].append(len(found) / len(rows))
        for kind in ("shape", "digit"):
            asked = sum(row["source"].endswith(kind) for row in rows)
            found = sum(row["source"].endswith(kind) for row in guesses)
            shares[f"guess, {kind}"].append(found / asked)
    return {"run": name, "seed": int(seed),
            "tokens": sum(s["sampled_tokens"] for s in steps),
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
    """Accuracy (mean over levels) at 6 and at 32 turns over b, with 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, T in zip(figure.subplots(1, 2), ("6", "32")):
        for level in ("mean", "hard"):
            found = [(b, *report.over_seeds([row["accuracy"][level][T] for row in runs[name]]))
                     for name, b in BASELINES.items() if name in runs]
            axes.errorbar([b for b, _, _ in found], [100 * mean for _, mean, _ in found],
                          [100 * (half or 0) for _, _, half in found], marker="o", capsize=3,
                          label={"mean": "mean of levels"}.get(level, level))
        axes.set(title=f"at most {T} turns", xlabel="b, paid for an unfinished conversation",
                 ylabel="accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend()
    tools.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description="Tables of the experiments.")
    parser.add_argument("results", nargs="*", type=Path, help="folders NAME.seedN to add")
    parser.add_argument("--chart", type=Path, help="draw accuracy over b into this PNG")
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
