"""Check a speedrun of RL, and print its row for docs/speedrun.md: how many tokens did it take from
the cold start to 95% at 32 turns and 44% at 6?

    python extras/speedrun.py results/mine.seed0 results/mine.seed1 results/mine.seed2

A run is trained in checkpoints/NAME.seedN and evaluated into results/NAME.seedN. What counts are
the tokens that the policy wrote in its conversations plus those that it was trained on, which do
not depend on the machine. Those of evaluations are free.
"""

import math
import statistics
from pathlib import Path

import root  # noqa: F401
import evaluate
import tools
from build_data import LEVELS
from extras import report, terminal

# accuracy, in the mean of levels, by number of turns
GOALS = {"32": 0.95, "6": 0.44}
NUM_SEEDS = 3
NUM_QUESTIONS = 200     # of each level
NUM_SAMPLES = 4         # of each question


def measure(folder):
    """Return the figures of one run: accuracy {number of turns: mean of levels}, tokens sampled,
    tokens trained on, and minutes of its steps. Raise InputError unless every question was asked
    four times and the log has every step."""
    # 1. the evaluation: the default one, of the whole test sets
    table = report.read_table(folder)
    for level in LEVELS:
        figures = table.get(level, {})
        size = figures.get("questions"), figures.get("samples")
        tools.check(size == (NUM_QUESTIONS, NUM_QUESTIONS * NUM_SAMPLES),
                    f"{folder}: {level} was not evaluated on all {NUM_QUESTIONS} questions, "
                    f"{NUM_SAMPLES} times each; evaluate with the defaults of evaluate.py")
    accuracy = {}
    for turns in GOALS:
        levels = [table[level]["accuracy"] for level in LEVELS]
        tools.check(all(turns in level for level in levels),
                    f"{folder} has no accuracy at {turns} turns")
        accuracy[turns] = statistics.fmean(level[turns] for level in levels)
    # 2. the log of training, all steps of it
    path = Path("checkpoints") / folder.name / "metrics.jsonl"
    steps = tools.read_jsonl(path, report.check_step)
    complete = [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    tools.check(steps and complete, f"{path} does not hold every step from 1 on")
    sums = {}
    for name in ("num_sampled_tokens", "num_trained_tokens", "seconds_rollout", "seconds_wait",
                 "seconds_update"):
        values = [step.get(name) for step in steps]
        tools.check(all(isinstance(value, (int, float)) and 0 <= value < math.inf
                        for value in values), f"{path} has a step without '{name}'")
        sums[name] = sum(values)
    minutes = (sums["seconds_rollout"] + sums["seconds_wait"] + sums["seconds_update"]) / 60
    return {"accuracy": accuracy, "sampled": sums["num_sampled_tokens"],
            "trained": sums["num_trained_tokens"], "minutes": minutes}


def check_seeds(folders):
    """Return the name of the run. Raise InputError unless these are three seeds of one run."""
    names, seeds = zip(*map(report.name_and_seed, folders))
    tools.check(len(set(names)) == 1 and len(set(seeds)) == len(folders) == NUM_SEEDS,
                f"name {NUM_SEEDS} seeds of one run: NAME.seed0 NAME.seed1 NAME.seed2")
    return names[0]


def main():
    """Print the row of a run, and whether every seed reaches both goals."""
    parser = terminal.make_parser("Check a speedrun, and print its row for docs/speedrun.md.")
    parser.add_argument("results", nargs="+", type=Path,
                        help="folders NAME.seed0, NAME.seed1, NAME.seed2 of evaluations")
    folders = parser.parse_args().results
    name = check_seeds(folders)
    runs = [measure(folder) for folder in folders]

    # 1. the row: means over seeds, and the accuracy of each
    sampled, trained, minutes = (statistics.fmean(run[figure] for run in runs)
                                 for figure in ("sampled", "trained", "minutes"))
    accuracies = []
    for turns in GOALS:
        accuracies.append(", ".join(f"{100 * run['accuracy'][turns]:.1f}" for run in runs))
    evaluate.print_rows(
        ["run", "1,000 tokens", "sampled", "trained on", "minutes",
         *(f"T={turns} of each seed" for turns in GOALS)],
        [[f"`{name}`", *(f"{count / 1000:,.0f}" for count in (sampled + trained, sampled, trained)),
          f"{minutes:.1f}", *accuracies]])

    # 2. does it count?
    for turns, goal in GOALS.items():
        failed = [folder.name for folder, run in zip(folders, runs)
                  if run["accuracy"][turns] < goal - 1e-9]     # a mean of floats may miss it
        tools.check(not failed, f"it does not count: at {turns} turns {' and '.join(failed)} has "
                    f"less than {100 * goal:.0f}%")
    print("it counts: every seed reaches both goals")


if __name__ == "__main__":
    terminal.run(main)
