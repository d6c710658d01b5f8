"""Six assignments: make a student's copy of the repository, and grade it.

    python course/assignments.py list
    python course/assignments.py start 4 ../mine      # a copy without the solution of assignment 4
    cd ../mine && python course/assignments.py grade 4

A task is a few functions, found by name, and the tests that grade them, which are tests of the
project itself. In the student's copy the bodies of these functions are missing. A task's tests need
no other task of the assignment, so it can be graded before the others are solved. The pages for
students are course/1.md to course/6.md.

A grader is code and can be wrong, so the grader is tested, too (in the project, not in a student's
copy):

    python course/assignments.py prove 4

1. The copy as it is handed out fails every test. 2. The project's own code has all points, and each
task has all of its points when all other tasks are blank. 3. Every mutant of course/mutants.py, a
mistake that students make, loses points in the task that it belongs to. 4. No three lines in a row
of a solution are anywhere in the copy.
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
GENERATED = [".git", ".venv", "__pycache__", ".pytest_cache", "data", "checkpoints", "results",
             ".run", "downloads", "grade.json"]    # neither are these
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.md"]    # of checkpoints/: a copy has them
TIMEOUT = 600   # seconds for the tests of a task; a loop that never ends is a failure, too


class Task(NamedTuple):
    title: str
    functions: list     # "file.py:name" or "file.py:Class.name"
    tests: dict         # {"test_file.py::name": points}; test files are in tests/


class Assignment(NamedTuple):
    title: str
    hours: int
    tasks: list


ASSIGNMENTS = {
    1: Assignment("The agent's world: turns, zooms, views and answers", 4, [
        Task("read a turn", ["tools.py:first_tag", "tools.py:parse_turn"], {
            "test_tools.py::test_the_four_kinds_of_turn": 6,
            "test_tools.py::test_thoughts_are_ignored": 6,
            "test_tools.py::test_the_first_complete_tag_wins": 4,
            "test_tools.py::test_an_incomplete_tag_is_none": 2,
            "test_tools.py::test_boxes_that_are_refused": 4,
            "test_tools.py::test_sources_that_are_refused": 2,
            "test_tools.py::test_calls_that_are_refused": 4,
            "test_tools.py::test_calls_that_are_accepted": 2}),
        Task("crop a zoom", ["tools.py:zoom"], {
            "test_tools.py::test_zoom_returns_exactly_these_pixels": 8,
            "test_tools.py::test_a_crop_has_the_pixels_that_its_box_touches_and_no_others": 2,
            "test_tools.py::test_zoom_into_an_observation_uses_its_native_pixels": 6,
            "test_tools.py::test_a_box_between_two_neighbouring_floats_still_holds_a_pixel": 4,
            "test_tools.py::test_how_narrow_a_box_may_be": 2,
            "test_tools.py::test_zoom_refuses_with_one_sentence": 3}),
        Task("the result of a turn", ["tools.py:take_turn"], {
            "test_tools.py::test_what_a_turn_leads_to_by_what_it_asks_for": 20}),
        Task("what the model sees", ["tools.py:size_for_model"], {
            "test_tools.py::test_sizes_that_the_model_sees_by_hand": 8,
            "test_tools.py::test_sizes_agree_with_qwens_own_processor": 6,
            "test_tools.py::test_resizing_keeps_a_fitting_image_and_repeats_nothing": 1}),
        Task("is the answer right", ["tools.py:option_index", "tools.py:match_answer"], {
            "test_tools.py::test_open_answers": 4,
            "test_tools.py::test_multiple_choice": 6})]),
    2: Assignment("From a conversation to tensors, and to a loss", 6, [
        Task("positions and a packed batch", ["sft.py:mrope_positions", "sft.py:collate"], {
            "test_sft.py::test_positions_by_hand": 8,
            "test_sft.py::test_positions_of_patches_that_are_not_merged_by_hand": 4,
            "test_sft.py::test_positions_like_the_library_of_an_untrained_policy": 8,
            "test_sft.py::test_a_packed_batch_by_hand": 4,
            "test_sft.py::test_each_conversation_of_a_packed_batch_attends_to_itself": 2,
            "test_sft.py::test_a_conversation_may_have_several_images": 2,
            "test_sft.py::test_all_tensors_of_a_batch_are_on_the_policys_device": 2}),
        Task("tokens and their loss mask", ["sft.py:encode"], {
            "test_sft.py::test_mask_covers_the_assistants_tokens_and_stop_tokens_only": 5,
            "test_sft.py::test_deliberate_mistakes_are_context_not_target": 5,
            "test_sft.py::test_a_question_cannot_inject_special_tokens": 3,
            "test_sft.py::test_a_conversation_by_hand": 7,
            "test_sft.py::test_a_row_whose_images_cannot_be_made_is_an_input_error": 1,
            "test_sft.py::test_nothing_comes_after_the_last_turn": 4}),
        Task("log-probabilities of the policy's tokens",
             ["sft.py:vocab_logprobs", "sft.py:token_logprobs"], {
                 "test_sft.py::test_suppressed_ids_have_no_probability": 4,
                 "test_sft.py::test_the_softmax_of_a_bfloat16_model_is_in_float32": 2,
                 "test_sft.py::test_logprobs_of_texts_equal_the_library": 7,
                 "test_sft.py::test_logits_never_exist_whole": 6,
                 "test_sft.py::test_chunks_and_what_is_computed_again": 3,
                 "test_sft.py::test_logprobs_of_no_token_still_have_a_gradient": 3}),
        Task("batches, epochs and the learning rate",
             ["sft.py:micro_batches", "sft.py:rows_of_step", "sft.py:learning_rate"], {
                 "test_sft.py::test_micro_batches_keep_every_conversation_within_the_budget": 7,
                 "test_sft.py::test_steps_visit_every_row_once_per_epoch": 4,
                 "test_sft.py::test_every_seed_and_every_epoch_has_its_own_order": 2,
                 "test_sft.py::test_the_order_of_rows_leaves_other_random_streams_alone": 1,
                 "test_sft.py::test_learning_rate_by_hand": 3,
                 "test_sft.py::test_learning_rate_with_a_peak_of_4_by_hand": 3})]),
    3: Assignment("The rollout engine: a cache over turns, samples, and drafts that change nothing",
                  7, [
        Task("a sample is a function of its own number",
             ["evaluate.py:sample", "evaluate.py:Rollout.next_uniforms"], {
                 "test_evaluate.py::test_sampling_follows_the_distribution": 6,
                 "test_evaluate.py::"
                 "test_a_suppressed_id_is_not_sampled_when_rounding_took_some_of_the_mass": 2,
                 "test_evaluate.py::test_greedy_takes_the_most_likely_token": 2,
                 "test_evaluate.py::test_random_numbers_are_indexed_by_position": 10}),
        Task("slots that each attend to themselves",
             ["evaluate.py:plan_spans", "evaluate.py:plan_rows", "evaluate.py:SlotCache.plan"], {
                 "test_evaluate.py::test_spans_by_hand": 6,
                 "test_evaluate.py::test_rows_of_two_slots_by_hand": 3,
                 "test_evaluate.py::test_rows_of_many_slots": 2,
                 "test_evaluate.py::test_the_plan_of_two_slots_by_hand": 2,
                 "test_evaluate.py::test_each_span_has_its_own_length": 1,
                 "test_evaluate.py::"
                 "test_only_a_slot_with_more_than_64_new_tokens_has_no_mask": 1,
                 "test_evaluate.py::test_no_more_room_is_made_than_is_needed": 1,
                 "test_evaluate.py::test_attention_over_slots_of_an_untrained_policy": 9}),
        Task("a table of n-grams",
             ["evaluate.py:NgramProposer.update", "evaluate.py:NgramProposer.propose"], {
                 "test_evaluate.py::test_a_turn_is_proposed_after_it_was_written_once": 4,
                 "test_evaluate.py::test_a_guess_that_is_often_wrong_is_replaced": 3,
                 "test_evaluate.py::test_the_hit_rate_moves_by_a_fifth": 3,
                 "test_evaluate.py::test_a_long_ngram_is_added_when_its_end_was_there_before": 2,
                 "test_evaluate.py::test_the_longest_ngram_decides_even_if_a_shorter_one_is_right_"
                 "more_often": 3,
                 "test_evaluate.py::test_a_draft_has_at_most_max_tokens_and_leaves_the_"
                 "conversation_alone": 3,
                 "test_evaluate.py::test_a_full_table_is_cleared_and_continues_to_learn": 2}),
        Task("propose, verify, accept",
             ["evaluate.py:Engine.draft_for", "evaluate.py:Engine.accept"], {
                 "test_evaluate.py::test_what_is_drafted_by_hand": 7,
                 "test_evaluate.py::test_without_speculative_tokens_nothing_is_drafted": 1,
                 "test_evaluate.py::test_what_is_accepted_of_a_draft_by_hand": 7,
                 "test_evaluate.py::test_positions_go_back_by_what_was_rejected": 3,
                 "test_evaluate.py::test_a_turn_is_over_when_it_is_full_or_stops": 3,
                 "test_evaluate.py::test_every_token_is_learned_once": 4}),
        Task("Avg@K over turn budgets",
             ["evaluate.py:accuracy_per_question", "evaluate.py:avg_at_k"], {
                 "test_evaluate.py::test_avg_at_k_by_hand": 4,
                 "test_evaluate.py::test_samples_that_agree_are_no_more_evidence_than_one": 3,
                 "test_evaluate.py::test_a_question_counts_once_however_many_samples_it_has": 1,
                 "test_evaluate.py::test_what_was_not_scored_is_not_wrong": 2})]),
    4: Assignment("GRPO, the over-turn mask, and what an unfinished conversation is worth", 5, [
        Task("advantages of a group", ["rl.py:group_baselines", "rl.py:group_advantages"], {
            "test_rl.py::test_group_advantages_by_hand": 5,
            "test_rl.py::test_group_advantages_one_by_one": 3,
            "test_rl.py::test_groups_do_not_know_of_each_other": 3,
            "test_rl.py::test_no_spread_means_no_advantage_and_never_nan": 3,
            "test_rl.py::"
            "test_equal_rewards_have_no_advantage_even_if_their_mean_is_rounded": 2,
            "test_rl.py::test_a_number_needs_a_spread_too": 3,
            "test_rl.py::test_one_completed_response_outside_the_baseline_has_no_advantage": 3,
            "test_rl.py::test_masked_responses_never_carry_advantage": 3,
            "test_rl.py::test_the_advantages_of_many_groups_follow_that_gradient": 5}),
        Task("the clipped loss and its denominator",
             ["rl.py:count_denominator", "rl.py:grpo_loss"], {
                 "test_rl.py::test_grpo_loss_by_hand": 8,
                 "test_rl.py::test_a_response_without_a_token_adds_nothing_but_is_counted": 2,
                 "test_rl.py::test_grpo_loss_equals_the_formula": 6,
                 "test_rl.py::test_gradient_by_finite_differences": 3,
                 "test_rl.py::test_micro_batches_add_up": 9,
                 "test_rl.py::test_masked_responses_get_no_gradient_and_no_garbage": 6,
                 "test_rl.py::test_nothing_kept_is_a_zero_loss_still_connected": 3,
                 "test_rl.py::test_unknown_flags_are_refused": 3}),
        Task("who is masked, and the baseline of a step",
             ["rl.py:is_unfinished", "rl.py:is_kept", "rl.py:step_baseline"], {
                 "test_rl.py::test_who_is_masked": 10,
                 "test_rl.py::test_the_baseline_of_a_step": 10}),
        Task("conversations beyond the training cap", ["rl.py:truncate_rollout"], {
            "test_rl.py::test_a_conversation_is_cut_after_its_last_turn_within_the_cap": 9,
            "test_rl.py::test_a_conversation_within_the_cap_is_returned_as_it_is": 1})]),
    5: Assignment("Data parallel by hand: sums that do not depend on who computes", 6, [
        Task("buckets", ["sft.py:make_buckets"], {
            "test_sft.py::test_buckets_by_hand": 12,
            "test_sft.py::test_buckets_of_random_parameters": 3}),
        Task("objects and weights of all ranks",
             ["sft.py:all_gather_objects", "sft.py:broadcast_weights"], {
                 "test_sft.py::test_one_process_needs_no_group": 4,
                 "test_sft.py::test_numbers_objects_and_weights_of_two_processes": 16}),
        Task("gradients that are sent while backward runs",
             ["sft.py:Bucket.flatten_gradients", "sft.py:Optimizer.mark_ready",
              "sft.py:Optimizer.reduce_bucket", "sft.py:Optimizer.wait_for_oldest"], {
                 "test_sft.py::test_gradients_of_a_bucket_by_hand": 5,
                 "test_sft.py::test_one_process_sums_its_micro_batches": 5,
                 "test_sft.py::test_gradients_of_two_processes_by_hand": 15,
                 "test_sft.py::test_gradients_are_reduced_while_backward_runs": 10,
                 "test_sft.py::test_buckets_are_reduced_in_their_order": 5,
                 "test_sft.py::test_a_bucket_is_reduced_once_all_its_gradients_are_complete": 2,
                 "test_sft.py::test_few_buckets_are_in_flight_and_all_are_waited_for": 2,
                 "test_sft.py::test_outside_of_the_optimizers_backward_nothing_is_reduced": 1}),
        Task("who trains on which conversations",
             ["rl.py:deal_micro_batches", "rl.py:fill_evenly", "rl.py:mini_batches"], {
                 "test_rl.py::test_balance_by_hand": 5,
                 "test_rl.py::test_who_played_a_conversation_does_not_matter": 2,
                 "test_rl.py::test_conversations_are_balanced_by_tokens": 6,
                 "test_rl.py::test_mini_batches_are_cut_from_the_groups_with_signal": 5,
                 "test_rl.py::test_mini_batches_are_cut_from_the_groups_of_all_ranks": 2})]),
    6: Assignment("The sharded optimizer: shards, float32 masters, and another world size", 7, [
        Task("a step on shards",
             ["sft.py:Bucket.__init__", "sft.py:Optimizer.reduce_bucket",
              "sft.py:Optimizer.wait_for_oldest", "sft.py:Optimizer.step",
              "sft.py:Optimizer.all_gather_weights"], {
                 "test_sft.py::test_a_bucket_by_hand": 10,
                 "test_sft.py::test_a_bucket_has_no_more_padding_than_it_needs": 2,
                 "test_sft.py::test_a_bucket_is_on_the_device_of_its_parameters": 2,
                 "test_sft.py::"
                 "test_naive_data_parallel_and_the_optimizer_give_the_same_gradients": 5,
                 "test_sft.py::test_which_messages_are_sent": 10,
                 "test_sft.py::test_sharded_optimizer_equals_adamw_on_one_process": 20,
                 "test_sft.py::test_a_gradient_within_the_limit_is_left_as_it_is": 5,
                 "test_sft.py::test_the_squares_of_large_gradients_do_not_overflow": 1,
                 "test_sft.py::test_an_unhealthy_step_changes_nothing": 5,
                 "test_sft.py::test_steps_that_are_not_finite_are_skipped_and_counted": 10}),
        Task("resume under another world size",
             ["sft.py:Optimizer.load", "sft.py:Bucket.reshard"], {
                 "test_sft.py::test_state_is_resharded_by_hand": 8,
                 "test_sft.py::test_every_bucket_gets_its_own_state": 2,
                 "test_sft.py::test_state_of_any_number_of_ranks_is_resharded": 2,
                 "test_sft.py::test_the_state_of_another_model_is_refused": 4,
                 "test_sft.py::"
                 "test_the_state_of_another_model_is_refused_before_anything_changes": 2,
                 "test_sft.py::test_a_loaded_state_continues_like_the_saved_one": 12})]),
}


# ---- The student's copy -------------------------------------------------------------------------


def find_function(tree, name):
    """Return the syntax tree of a function, named "name" or "Class.name". Raise KeyError if there
    is none."""
    for part in name.split("."):
        definitions = {node.name: node for node in tree.body
                       if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        tree = definitions[part]
    return tree


def body_lines(function):
    """Return the (first, last) line of a function's body after its docstring, counted from 1."""
    first_statement = function.body[0]
    if ast.get_docstring(function) is None:
        return first_statement.lineno, function.end_lineno
    # a comment between docstring and code belongs to the body
    return first_statement.end_lineno + 1, function.end_lineno


def blank(source, names, label):
    """Return Python source in which the bodies of some functions, except for their docstrings, are
    one line that raises NotImplementedError."""
    lines = source.splitlines()
    tree = ast.parse(source)
    functions = [find_function(tree, name) for name in names]
    # from the end of the file, so that line numbers stay right
    for function in sorted(functions, key=lambda function: function.lineno, reverse=True):
        first, last = body_lines(function)
        indentation = " " * (function.col_offset + 4)
        lines[first - 1:last] = [f'{indentation}raise NotImplementedError("{label}")']
    return "\n".join(lines) + "\n"


def blank_tasks(folder, number, task_indices):
    """Remove the bodies of these tasks' functions from a copy."""
    for task_index in task_indices:
        for function in ASSIGNMENTS[number].tasks[task_index].functions:
            file, name = function.split(":")
            path = folder / file
            label = f"assignment {number}, task {task_index + 1}: {name}"
            path.write_text(blank(path.read_text(), [name], label))


def copy_project(folder):
    """Copy the project without generated files, and without those that would give answers away."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*GENERATED, *SECRET),
                    dirs_exist_ok=True)


def copy_models(folder):
    """Copy the models base, sft and rl, without what training keeps beside them."""
    for name in (".", "base", "sft", "rl"):
        for pattern in MODEL_FILES:
            for path in (ROOT / "checkpoints" / name).glob(pattern):
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def start(number, folder):
    """Make a student's copy in a new folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder} is not empty, or a file: name a new folder")
    if ROOT in folder.resolve().parents:
        sys.exit(f"{folder} is inside the project itself: name a folder outside of it")
    copy_project(folder)
    copy_models(folder)
    blank_tasks(folder, number, range(len(ASSIGNMENTS[number].tasks)))
    print(f"assignment {number} is in {folder}: read course/{number}.md there, and grade "
          f"it with: python course/assignments.py grade {number}")


# ---- Grading ------------------------------------------------------------------------------------


def failure_message(case):
    """Return the first line of what went wrong in a test case of a report, None if it passed."""
    for kind in ("failure", "error", "skipped"):
        for element in case.findall(kind):
            lines = element.get("message", "").splitlines()
            return lines[0] if lines else "no message"
    return None


def read_outcomes(report, tests, otherwise="did not run"):
    """Return {test: None if it passed, otherwise what went wrong} from pytest's report.

    A test with several cases passes if all of them do. A test that is not in the report has not
    passed: its message is `otherwise`.
    """
    messages = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").split(".")[-1]
            function = case.get("name").split("[")[0]
            test = f"{module}.py::{function}"
            messages[test] = messages.get(test) or failure_message(case)
    return {test: messages.get(test, otherwise) for test in tests}


def pytest_arguments(task, report):
    """Return the arguments with which pytest runs the tests of a task."""
    return ["-q", "-p", "no:cacheprovider", f"--junitxml={report}",
            *(f"tests/{test}" for test in task.tests)]


def import_error(output):
    """Return why pytest stopped before its first test, from its output: a file that cannot be
    imported."""
    errors = [line[1:].strip() for line in output.splitlines() if line.startswith("E ")]
    places = [line for line in errors if line.startswith("File ")]
    return " in ".join([*errors[-1:], *places[-1:]]) or "did not run"


def grade_task(task):
    """Run the tests of a task of this copy. Return {test: None, or why it failed}."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        try:
            completed = subprocess.run(
                [sys.executable, "-m", "pytest", *pytest_arguments(task, report)], cwd=ROOT,
                env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(task.tests, f"not done after {TIMEOUT} seconds")
        return read_outcomes(report, task.tests, import_error(completed.stdout + completed.stderr))


def grade(number):
    """Grade a student's copy. Print the points of every task, and write grade.json."""
    # 1. every task on its own
    rows = []
    for task_number, task in enumerate(ASSIGNMENTS[number].tasks, 1):
        failed = {test: message for test, message in grade_task(task).items() if message}
        points = sum(value for test, value in task.tests.items() if test not in failed)
        maximum = sum(task.tests.values())
        rows.append({"task": task.title, "points": points, "of": maximum, "failed": failed})
        print(f"task {task_number}, {task.title}: {points} of {maximum} points", flush=True)
        for test, message in failed.items():
            print(f"    {task.tests[test]} points lost, tests/{test}: {message}", flush=True)
    # 2. the sum
    points = sum(row["points"] for row in rows)
    maximum = sum(row["of"] for row in rows)
    print(f"assignment {number}: {points} of {maximum} points")
    result = {"assignment": number, "points": points, "of": maximum, "tasks": rows}
    (ROOT / "grade.json").write_text(json.dumps(result, indent=1) + "\n")


# ---- The grader is tested, too ------------------------------------------------------------------


@contextlib.contextmanager
def copied(number, blank_indices=(), mutant=None):
    """Yield a temporary copy of the project, with some tasks blank and one mutant applied."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_project(folder)
        if mutant is not None:
            path = folder / mutant.file
            source = path.read_text()
            if source.count(mutant.old) != 1:
                raise ValueError(f"mutant '{mutant.mistake}' no longer applies to {mutant.file}")
            path.write_text(source.replace(mutant.old, mutant.new))
        blank_tasks(folder, number, blank_indices)
        yield folder


def stripped_lines(text):
    """Return the lines of a text without indentation."""
    return [line.strip() for line in text.splitlines()]


def solution_lines(function):
    """Return the lines of the project's own solution of "file.py:name"."""
    file, name = function.split(":")
    source = (ROOT / file).read_text()
    first, last = body_lines(find_function(ast.parse(source), name))
    return stripped_lines(source)[first - 1:last]


def given_away(number):
    """Return a message for every three lines in a row of a solution that are in the student's
    copy."""
    # 1. where in the copy any three lines in a row are
    files_of_lines = {}     # {three lines: {path}}
    with copied(number, range(len(ASSIGNMENTS[number].tasks))) as folder:
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".md"):
                lines = stripped_lines(path.read_text())
                for three_lines in zip(lines, lines[1:], lines[2:]):
                    files_of_lines.setdefault(three_lines, set()).add(path.relative_to(folder))
    # 2. those of the solutions
    messages = []
    for task in ASSIGNMENTS[number].tasks:
        for function in task.functions:
            lines = solution_lines(function)
            for three_lines in zip(lines, lines[1:], lines[2:]):
                for path in sorted(files_of_lines.get(three_lines, ())):
                    messages.append(f"{path} has lines of {function}: {three_lines[0]}")
    return messages


def grade_copy(number, task_index, blank_indices=(), mutant=None):
    """Run the tests of one task in a copy, in this process, with a mutant up to the first one that
    is lost. Return {test: None, or why it failed}.

    The process must be a fork that has not imported the project yet. A fork saves the seconds in
    which torch is imported.
    """
    task = ASSIGNMENTS[number].tasks[task_index]
    with copied(number, blank_indices, mutant) as folder:
        os.chdir(folder)
        report = folder / "report.xml"
        output = io.StringIO()
        # one lost test is enough to see a mutant
        arguments = [*pytest_arguments(task, report), *(["-x"] if mutant is not None else [])]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            pytest.main(arguments)
        return read_outcomes(report, task.tests)


def prove(number):
    """Check everything that the docstring above says of the grader. Return what is wrong, a message
    each."""
    from mutants import MUTANTS
    tasks = ASSIGNMENTS[number].tasks
    all_indices = list(range(len(tasks)))
    mutants = [mutant for mutant in MUTANTS if mutant.assignment == number]
    messages = given_away(number)

    # one fork for every run of tests, so that two copies never share a module
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        # 1. start all runs
        def submit(task_index, *options):
            return pool.apply_async(grade_copy, (number, task_index, *options))

        all_blank = [submit(index, all_indices) for index in all_indices]
        others_blank = []
        for index in all_indices:
            others = [other for other in all_indices if other != index]
            others_blank.append(submit(index, others))
        mutated = [submit(mutant.task - 1, (), mutant) for mutant in mutants]

        # 2. collect what is wrong
        for index in all_indices:
            for test, message in all_blank[index].get(TIMEOUT).items():
                if message is None:
                    messages.append(f"task {index + 1}: {test} passes on the blank copy")
            for test, message in others_blank[index].get(TIMEOUT).items():
                if message is not None:
                    messages.append(f"task {index + 1} alone: {test}: {message}")
        for mutant, run in zip(mutants, mutated):
            if not any(run.get(TIMEOUT).values()):
                messages.append(f"task {mutant.task}: nothing is lost by '{mutant.mistake}'")
    if len(mutants) < 8:
        messages.append(f"there are {len(mutants)} mutants, fewer than eight")

    for message in messages:
        print(f"assignment {number}: {message}")
    print(f"assignment {number}: {len(tasks)} tasks, {len(mutants)} mutants, "
          f"{len(messages)} faults")
    return messages


# ---- The command --------------------------------------------------------------------------------


def print_list():
    """Print a line about every assignment."""
    for number, (title, hours, tasks) in ASSIGNMENTS.items():
        functions = ", ".join(function for task in tasks for function in task.functions)
        points = sum(sum(task.tests.values()) for task in tasks)
        print(f"{number}  {title}: {len(tasks)} tasks, {functions}; {points} points, about "
              f"{hours} hours")


def main():
    """Do what the command line asks for."""
    # 1. flags
    parser = argparse.ArgumentParser(
        description="List, start and grade assignments; prove that their graders are right.")
    parser.add_argument("action", choices=["list", "start", "grade", "prove"], help="what to do")
    parser.add_argument("number", type=int, nargs="?", choices=list(ASSIGNMENTS),
                        help="which assignment (default of prove: all)")
    parser.add_argument("folder", type=Path, nargs="?", help="of the new copy (start)")
    args = parser.parse_args()
    # 2. a student's copy has no mutants, and its own assignment is blank already
    if args.action in ("start", "prove") and not (ROOT / "course" / "mutants.py").exists():
        sys.exit(f"this is a student's copy: {args.action} is for the project itself")
    # 3. the action
    if args.action == "list":
        print_list()
    elif args.action == "prove":
        # import torch and the model's code once, before the forks
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
        num_faults = 0
        for number in [args.number] if args.number else ASSIGNMENTS:
            num_faults += len(prove(number))
        sys.exit(1 if num_faults else 0)
    elif args.action == "start" and args.number and args.folder:
        start(args.number, args.folder)
    elif args.action == "grade" and args.number and not args.folder:
        grade(args.number)
    else:
        parser.error("start needs a number and a folder, grade a number")


if __name__ == "__main__":
    main()
