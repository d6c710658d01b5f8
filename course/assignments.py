"""Six assignments: make a student's copy of the repository, and grade it.

    python course/assignments.py list
    python course/assignments.py start 4 ../mine      # a copy in which assignment 4 is to be written
    cd ../mine && python course/assignments.py grade 4

A task is a few functions, found by name, whose bodies are taken out of the student's copy, and the
tests that grade them: tests of the project itself. A task's tests need no other task of the
assignment, so that it can be graded before the others are done. The pages are in course.

A grader is code and can be wrong, so it is tested itself (in the project, not in a student's copy):

    python course/assignments.py prove 4

1. The copy as it is handed out fails every test. 2. The project's own code has all points, and each
task has them when all other tasks are blank. 3. Every mutant of course/mutants.py, a mistake that
students make, loses points in the task that it belongs to. 4. No three lines in a row of a solution
stand anywhere in the copy.
"""

import argparse
import ast
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECRET = ["mutants.py", "teaching.md"]     # files that are not in a student's copy
TIMEOUT = 600   # seconds for the tests of a task: a loop that never ends is a failure, too


class Task(NamedTuple):
    """functions: "file.py:name" or "file.py:Class.name"; tests: {"test_file.py::name": points}."""
    title: str
    functions: list
    tests: dict


class Assignment(NamedTuple):
    title: str
    hours: int
    tasks: list


ASSIGNMENTS = {
    1: Assignment("The agent's world: turns, zooms, views and answers", 4, [
        Task("read a turn", ["tools.py:first_tag", "tools.py:parse_turn"], {
            "test_tools.py::test_the_four_kinds_of_turn": 6,
            "test_tools.py::test_thoughts_are_ignored": 6,
            "test_tools.py::test_the_first_complete_tag_wins": 6,
            "test_tools.py::test_boxes_that_are_refused": 4,
            "test_tools.py::test_sources_that_are_refused": 2,
            "test_tools.py::test_calls_that_are_refused": 4,
            "test_tools.py::test_calls_that_are_accepted": 2}),
        Task("crop a zoom", ["tools.py:zoom"], {
            "test_tools.py::test_zoom_returns_exactly_these_pixels": 10,
            "test_tools.py::test_zoom_into_an_observation_uses_its_native_pixels": 6,
            "test_tools.py::test_a_box_between_two_neighbouring_floats_still_holds_a_pixel": 4,
            "test_tools.py::test_how_narrow_a_box_may_be": 2,
            "test_tools.py::test_zoom_refuses_with_one_sentence": 3}),
        Task("where a turn leads", ["tools.py:take_turn"], {
            "test_tools.py::test_what_a_turn_leads_to_by_what_it_asks_for": 20}),
        Task("what the model sees", ["tools.py:size_for_model"], {
            "test_tools.py::test_sizes_that_the_model_sees_by_hand": 8,
            "test_tools.py::test_sizes_agree_with_qwens_own_processor": 6,
            "test_tools.py::test_resizing_keeps_a_fitting_image_and_repeats_nothing": 1}),
        Task("is it right", ["tools.py:option_index", "tools.py:match_answer"], {
            "test_tools.py::test_open_answers": 4,
            "test_tools.py::test_multiple_choice": 6})]),
    2: Assignment("From a conversation to tensors, and to a loss", 6, [
        Task("positions and a packed batch", ["sft.py:mrope_positions", "sft.py:collate"], {
            "test_sft.py::test_positions_by_hand": 12,
            "test_sft.py::test_positions_like_the_library_of_an_untrained_policy": 8,
            "test_sft.py::test_a_packed_batch_by_hand": 10}),
        Task("tokens and their mask", ["sft.py:encode"], {
            "test_sft.py::test_mask_covers_the_assistants_tokens_and_stop_tokens_only": 5,
            "test_sft.py::test_deliberate_mistakes_are_context_not_target": 5,
            "test_sft.py::test_a_question_cannot_inject_special_tokens": 3,
            "test_sft.py::test_a_conversation_by_hand": 8,
            "test_sft.py::test_nothing_comes_behind_the_last_turn": 4}),
        Task("log-probabilities of what was written", ["sft.py:vocab_logprobs", "sft.py:token_logprobs"], {
            "test_sft.py::test_banned_ids_have_no_probability": 6,
            "test_sft.py::test_logprobs_of_texts_equal_the_library": 8,
            "test_sft.py::test_logits_never_exist_whole": 8,
            "test_sft.py::test_nothing_written_is_still_connected": 3}),
        Task("batches, epochs and the rate", ["sft.py:micro_batches", "sft.py:rows_of_step",
                                              "sft.py:learning_rate"], {
            "test_sft.py::test_micro_batches_keep_every_conversation_within_the_budget": 7,
            "test_sft.py::test_step_rows_visit_every_row_once_per_epoch": 7,
            "test_sft.py::test_learning_rate_by_hand": 6})]),
    3: Assignment("The rollout engine: a cache over turns, draws, and drafts that cannot lie", 7, [
        Task("a draw is a function of its own number",
             ["evaluate.py:Engine.draw", "evaluate.py:Rollout.uniform"], {
                 "test_evaluate.py::test_draw_follows_the_distribution": 10,
                 "test_evaluate.py::test_random_numbers_are_indexed_by_position": 10}),
        Task("slots that attend each to itself",
             ["evaluate.py:plan_spans", "evaluate.py:SlotCache.at"], {
                 "test_evaluate.py::test_spans_by_hand": 6,
                 "test_evaluate.py::test_places_of_two_slots_by_hand": 7,
                 "test_evaluate.py::test_attention_over_slots_of_an_untrained_policy": 12}),
        Task("a table of drafts", ["evaluate.py:NgramProposer.learn", "evaluate.py:NgramProposer.after"], {
            "test_evaluate.py::test_draft_table_by_hand": 12,
            "test_evaluate.py::test_which_guess_is_followed": 8}),
        Task("draft, and keep what agrees",
             ["evaluate.py:Engine.guess", "evaluate.py:Engine.keep"], {
                 "test_evaluate.py::test_what_is_drafted_by_hand": 8,
                 "test_evaluate.py::test_what_is_kept_of_a_draft_by_hand": 13,
                 "test_evaluate.py::test_every_token_is_learned_once": 4}),
        Task("Avg@K over turn budgets", ["evaluate.py:accuracy_per_question", "evaluate.py:avg_at_k"], {
            "test_evaluate.py::test_avg_at_k_by_hand": 7,
            "test_evaluate.py::test_benchmarks_are_scored_as_their_authors_do": 3})]),
    4: Assignment("GRPO: advantages, the over-turn mask and the value of what is unfinished", 5, [
        Task("advantages of a group", ["rl.py:group_advantages"], {
            "test_rl.py::test_group_advantages_by_hand": 7,
            "test_rl.py::test_groups_do_not_know_of_each_other": 3,
            "test_rl.py::test_no_spread_means_no_advantage_and_never_nan": 4,
            "test_rl.py::test_a_number_needs_a_spread_too": 4,
            "test_rl.py::test_one_completed_response_outside_the_baseline_has_no_advantage": 3,
            "test_rl.py::test_incomplete_responses_never_carry_advantage": 3,
            "test_rl.py::test_the_advantages_of_many_groups_follow_that_gradient": 6}),
        Task("the clipped loss and what it is divided by",
             ["rl.py:count_denominator", "rl.py:grpo_loss"], {
                 "test_rl.py::test_grpo_loss_by_hand": 10,
                 "test_rl.py::test_grpo_loss_equals_the_formula": 6,
                 "test_rl.py::test_gradient_by_finite_differences": 3,
                 "test_rl.py::test_micro_batches_add_up": 6,
                 "test_rl.py::test_masked_responses_get_no_gradient_and_no_garbage": 6,
                 "test_rl.py::test_nothing_completed_is_a_zero_loss_still_connected": 3,
                 "test_rl.py::test_dual_clip_bounds_a_negative_advantage_by_hand": 3,
                 "test_rl.py::test_unknown_flags_are_refused": 3}),
        Task("who is masked, and what is step_baseline",
             ["rl.py:is_unfinished", "rl.py:is_kept", "rl.py:step_baseline"], {
                 "test_rl.py::test_who_is_masked": 10,
                 "test_rl.py::test_what_is_subtracted_in_a_step": 10}),
        Task("conversations that were played on", ["rl.py:truncate_rollout"], {
            "test_rl.py::test_outcome_trains_on_the_turns_before_the_cap": 10})]),
    5: Assignment("Data parallel by hand: sums that do not depend on who computes", 6, [
        Task("buckets", ["sft.py:make_buckets"], {"test_sft.py::test_buckets_by_hand": 15}),
        Task("objects and weights of all ranks", ["sft.py:all_gather_objects", "sft.py:broadcast_weights"], {
            "test_sft.py::test_one_process_needs_no_group": 4,
            "test_sft.py::test_numbers_objects_and_weights_of_two_processes": 16}),
        Task("gradients that travel while backward runs",
             ["sft.py:Bucket.take_gradients", "sft.py:Optimizer.arrived", "sft.py:Optimizer.send",
              "sft.py:Optimizer.receive"], {
                 "test_sft.py::test_gradients_of_a_bucket_by_hand": 5,
                 "test_sft.py::test_one_process_sums_its_micro_batches": 5,
                 "test_sft.py::test_gradients_of_two_processes_by_hand": 15,
                 "test_sft.py::test_gradients_are_sent_while_backward_runs": 10,
                 "test_sft.py::test_buckets_travel_in_their_order": 5,
                 "test_sft.py::test_a_bucket_travels_whole_and_few_at_once": 5}),
        Task("who trains on which conversations", ["rl.py:balance_by_tokens", "rl.py:mini_batches"], {
            "test_rl.py::test_dealing_by_hand": 7,
            "test_rl.py::test_conversations_are_dealt_out_by_length": 6,
            "test_rl.py::test_minibatches_are_cut_from_the_groups_with_signal": 7})]),
    6: Assignment("The sharded optimizer: pieces, float32 masters, and another world size", 7, [
        Task("a step on pieces",
             ["sft.py:Bucket.__init__", "sft.py:Optimizer.send", "sft.py:Optimizer.receive",
              "sft.py:Optimizer.step", "sft.py:Optimizer.spread"], {
                 "test_sft.py::test_a_bucket_by_hand": 15,
                 "test_sft.py::test_which_messages_are_sent": 10,
                 "test_sft.py::test_sharded_optimizer_equals_adamw_on_one_process": 25,
                 "test_sft.py::test_a_gradient_within_the_limit_is_left_as_it_is": 5,
                 "test_sft.py::test_an_unhealthy_step_changes_nothing": 5,
                 "test_sft.py::test_steps_that_are_not_finite_are_skipped_and_counted": 10}),
        Task("resume under another world size", ["sft.py:Optimizer.load"], {
            "test_sft.py::test_state_is_cut_anew_by_hand": 18,
            "test_sft.py::test_a_state_that_was_loaded_goes_on_like_the_one_that_was_saved": 12})]),
}


# -------------------------------------------------------------------------------------------------
# The student's copy


def find(tree, name):
    """The syntax tree of a function, by "name" or "Class.name". Raises KeyError."""
    for part in name.split("."):
        tree = {node.name: node for node in tree.body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}[part]
    return tree


def body_of(node):
    """(first, last) line of a function's body behind its docstring, counted from 1."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None     # comments behind it go, too
    return first.end_lineno + 1 if has_docstring else first.lineno, node.end_lineno


def blank(source, names, label):
    """Python source in which the bodies of some functions, but for their docstrings, are one line
    that raises NotImplementedError."""
    lines, tree = source.splitlines(), ast.parse(source)
    found = sorted((*body_of(find(tree, name)), find(tree, name).col_offset) for name in names)
    for first, last, indent in reversed(found):     # from the end: line numbers stay true
        lines[first - 1:last] = [" " * (indent + 4) + f'raise NotImplementedError("{label}")']
    return "\n".join(lines) + "\n"


def blank_tasks(folder, number, tasks):
    """Take out the functions of these tasks (indices) of an assignment, in a copy."""
    for index in tasks:
        for function in ASSIGNMENTS[number].tasks[index].functions:
            file, name = function.split(":")
            path = folder / file
            path.write_text(blank(path.read_text(), [name],
                                  f"assignment {number}, task {index + 1}: {name}"))


def copy_project(folder):
    """The project without what was made in it, and without what would give answers away."""
    made = (".git", ".venv", "__pycache__", ".pytest_cache", "data", "checkpoints", "results",
            "downloads", "grade.json")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made, *SECRET),
                    dirs_exist_ok=True)


def start(number, folder):
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: name a new folder")
    if ROOT in folder.resolve().parents:
        sys.exit(f"{folder} lies in the project itself: name a folder outside of it")
    copy_project(folder)
    blank_tasks(folder, number, range(len(ASSIGNMENTS[number].tasks)))
    print(f"assignment {number} is in {folder}: read course/{number}.md there, and grade "
          f"it with: python course/assignments.py grade {number}")


# -------------------------------------------------------------------------------------------------
# Grading


def outcomes(report, tests, otherwise="did not run"):
    """{test: None if it passed, else the first line of what went wrong}, from pytest's report. A
    test with several cases passes if all of them do; one that did not run has not passed."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        file, name = case.get("classname", "").split(".")[-1], case.get("name").split("[")[0]
        wrong = [part.get("message", "").splitlines() or ["no message"]
                 for kind in ("failure", "error", "skipped") for part in case.findall(kind)]
        name = f"{file}.py::{name}"
        found[name] = found.get(name) or (wrong[0][0] if wrong else None)
    return {test: found.get(test, otherwise) for test in tests}


def arguments(task, report):
    """pytest's, for the tests of a task."""
    return ["-q", "-p", "no:cacheprovider", f"--junitxml={report}",
            *(f"tests/{test}" for test in task.tests)]


def grade_task(task):
    """Run the tests of a task of this copy: {test: None, or why it failed}."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        try:
            done = subprocess.run([sys.executable, "-m", "pytest", *arguments(task, report)],
                                  cwd=ROOT, env=environment, capture_output=True, text=True,
                                  timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(task.tests, f"not done after {TIMEOUT} seconds")
        # a file that cannot be imported stops pytest before its first test
        errors = [line[1:].strip() for line in (done.stdout + done.stderr).splitlines()
                  if line.startswith("E ")]
        where = [line for line in errors if line.startswith("File ")]
        why = " in ".join([*errors[-1:], *where[-1:]]) or "did not run"
        return outcomes(report, task.tests, why)


def grade(number):
    """Grade a student's copy: prints points per task, writes grade.json."""
    rows = []
    for place, task in enumerate(ASSIGNMENTS[number].tasks, 1):
        failed = {test: why for test, why in grade_task(task).items() if why}
        points = sum(p for test, p in task.tests.items() if test not in failed)
        rows.append({"task": task.title, "points": points, "of": sum(task.tests.values()),
                     "failed": failed})
        print(f"task {place}, {task.title}: {points} of {rows[-1]['of']} points", flush=True)
        for test, why in failed.items():
            print(f"    {task.tests[test]} points lost, tests/{test}: {why}", flush=True)
    total, most = (sum(row[key] for row in rows) for key in ("points", "of"))
    print(f"assignment {number}: {total} of {most} points")
    (ROOT / "grade.json").write_text(json.dumps(
        {"assignment": number, "points": total, "of": most, "tasks": rows}, indent=1) + "\n")


# -------------------------------------------------------------------------------------------------
# The grader is tested itself


@contextlib.contextmanager
def copied(number, blanks=(), mutant=None):
    """A copy of the project, some tasks blank, one line mistaken."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_project(folder)
        if mutant:
            path = folder / mutant.file
            source = path.read_text()
            if source.count(mutant.old) != 1:
                raise ValueError(f"mutant '{mutant.mistake}' no longer applies to {mutant.file}")
            path.write_text(source.replace(mutant.old, mutant.new))
        blank_tasks(folder, number, blanks)
        yield folder


def given_away(number):
    """Where in the student's copy three lines in a row of a solution stand."""
    found = []
    with copied(number, range(len(ASSIGNMENTS[number].tasks))) as folder:
        texts = {path.relative_to(folder): [line.strip() for line in path.read_text().splitlines()]
                 for path in folder.rglob("*") if path.suffix in (".py", ".md")}
        for task in ASSIGNMENTS[number].tasks:
            for function in task.functions:
                file, name = function.split(":")
                source = (ROOT / file).read_text()
                first, last = body_of(find(ast.parse(source), name))
                solution = [line.strip() for line in source.splitlines()[first - 1:last]]
                for i in range(len(solution) - 2):
                    three = solution[i:i + 3]
                    found += [f"{path} has lines of {function}: {three[0]}"
                              for path, lines in texts.items()
                              if any(lines[j:j + 3] == three for j in range(len(lines) - 2))]
    return found


def grade_copy(number, place, blanks=(), mutant=None):
    """The tests of one task in a copy, in this process, which must be a fork that has not imported
    the project yet: that saves the seconds in which torch is imported."""
    task = ASSIGNMENTS[number].tasks[place]
    with copied(number, blanks, mutant) as folder:
        os.chdir(folder)
        report, silence = folder / "report.xml", io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            pytest.main(arguments(task, report))
        return outcomes(report, task.tests)


def prove(number):
    """Everything that is said of the grader above; returns what is wrong, a line each."""
    from mutants import MUTANTS
    tasks, wrong = ASSIGNMENTS[number].tasks, given_away(number)
    every, mine = range(len(tasks)), [m for m in MUTANTS if m.assignment == number]
    # a fork for each: two copies never share a module
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        def ask(place, *how):
            return pool.apply_async(grade_copy, (number, place, *how))

        blank = [ask(place, every) for place in every]
        alone = [ask(place, [other for other in every if other != place]) for place in every]
        mutants = [ask(mutant.task - 1, (), mutant) for mutant in mine]
        for place, (blanked, only) in enumerate(zip(blank, alone), 1):
            wrong += [f"task {place}: {test} passes on the blank copy"
                      for test, why in blanked.get(TIMEOUT).items() if why is None]
            wrong += [f"task {place} alone: {test}: {why}"
                      for test, why in only.get(TIMEOUT).items() if why]
        wrong += [f"task {mutant.task}: nothing is lost by '{mutant.mistake}'"
                  for mutant, graded in zip(mine, mutants) if not any(graded.get(TIMEOUT).values())]
    if len(mine) < 8:
        wrong.append(f"there are {len(mine)} mutants, fewer than eight")
    for line in wrong:
        print(f"assignment {number}: {line}")
    print(f"assignment {number}: {len(tasks)} tasks, {len(mine)} mutants, {len(wrong)} faults")
    return wrong


def main():
    parser = argparse.ArgumentParser(description="Assignments: make, grade, prove.")
    parser.add_argument("action", choices=["list", "start", "grade", "prove"])
    parser.add_argument("number", type=int, nargs="?", choices=list(ASSIGNMENTS))
    parser.add_argument("folder", type=Path, nargs="?", help="of the new copy (start)")
    args = parser.parse_args()
    if args.action == "list":
        for number, (title, hours, tasks) in ASSIGNMENTS.items():
            functions = ", ".join(f for task in tasks for f in task.functions)
            points = sum(sum(task.tests.values()) for task in tasks)
            print(f"{number}  {title}: {len(tasks)} tasks, {functions}; {points} points, about "
                  f"{hours} hours")
        return
    if args.action in ("start", "prove") and not (ROOT / "tests" / "mutants.py").exists():
        sys.exit(f"this is a student's copy: {args.action} is for the project itself")
    if args.action == "prove":
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401, before the forks
        numbers = [args.number] if args.number else list(ASSIGNMENTS)
        sys.exit(1 if sum((prove(number) for number in numbers), []) else 0)
    if args.number is None or (args.folder is None) != (args.action == "grade"):
        parser.error("start needs a number and a folder, grade a number")
    if args.action == "grade":
        return grade(args.number)
    start(args.number, args.folder)


if __name__ == "__main__":
    main()
