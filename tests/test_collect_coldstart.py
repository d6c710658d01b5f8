"""Specification of the scripted teacher and of the collection around it.

What the student learns from is true, legal and leads to the answer; deliberate mistakes are context
only. A killed collection goes on where it was, and its result is that of an undisturbed one, byte
for byte.
"""

import argparse
import collections
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import build_data
import collect_coldstart
from extras import crash
import tools
from build_data import LEVELS, describe_cell, describe_part, describe_walls, position_box, positions_with
from collect_coldstart import STRATEGIES, Teacher
from conftest import ROOT, ChatServer, Forked, picture_of, run_script
from tools import PHRASES, POSITIONS

SEARCHES = [pattern for pattern in STRATEGIES if pattern != "guess"]
PLACE_OF = {tuple(position_box(place)): index for index, place in enumerate(POSITIONS)}


def scene(level, index):
    return build_data.make_scene(np.random.default_rng([9, index]), level)


def lessons(pattern, count=30):
    """(scene, the teacher's [(text, learn), ...]) for `count` scenes of each level."""
    for level, index in itertools.product(LEVELS, range(count)):
        row = scene(level, index)
        yield row, list(Teacher(row, pattern, np.random.default_rng([1, index])).turns())


def follow(row, texts):
    """Play the calls on the layout. Yields (text, kind, view): the view that the text speaks about,
    (part, place) with None for "all of it", or "refused" after a call that the tool refuses; kind
    is parse_turn's, "error" for any refused call."""
    views, view = [(None, None)], (None, None)
    for text in texts:
        kind, value = tools.parse_turn(text)
        if kind == "zoom":
            index = int(value["source"].replace("original_image", "0").removeprefix("observation_"))
            kind = "zoom" if index < len(views) else "error"
        yield text, kind, view
        view = "refused"
        if kind == "zoom":
            part, place = views[index]
            assert place is None  # no pattern zooms into a single place: there is nothing smaller
            target = PLACE_OF[tuple(value["bbox_2d"])]
            view = (target, None) if part is None else (part, target)
            views.append(view)


def truth(row, view):
    """What an honest look at this view says first."""
    if view == "refused":
        return PHRASES["sorry"]
    part, place = view
    if part is None:
        return describe_walls(row["wallpaper"], row["colour"])
    if place is None:
        return describe_part(row["objects"], part, row["colour"])
    return describe_cell(row["objects"], part, place)


def later(text):
    """The parts that a thought says are still to be looked at, in its order."""
    said = re.search(PHRASES["later"].format(places="([a-z -]+)"), text)
    return [POSITIONS.index(place) for place in said[1].split()] if said else []


def visits(row, turns):
    """The views that a search asked for, wrong guesses left out, one list per scan: "Scan again"
    begins another."""
    scans = [[]]
    for text, _, view in follow(row, [text for text, _ in turns]):
        if view not in ("refused", (None, None)) and truth(row, view) != PHRASES["empty"]:
            scans[-1].append(view)
        if PHRASES["again"] in text:
            scans.append([])
    return scans


def tour(row, parts):
    """The views of a search through these parts: every part, then at once each place that holds the
    colour, in reading order. It does not stop at the target."""
    def candidates(part):
        return [(part, POSITIONS.index(place))
                for place in positions_with(row["objects"], part, row["colour"])]

    return [view for part in parts for view in [(part, None), *candidates(part)]]


def up_to_target(row, views):
    """Those views up to the target; all of them if it is not among them."""
    target = tuple(row["objects"][0][:2])
    return views[:views.index(target) + 1] if target in views else views


def ring(start):
    return [(start + i) % 9 for i in range(9)]


def hinted(row):
    """The parts that have the colour's wallpaper."""
    return [part for part in range(9) if row["wallpaper"][part] == row["colour"]]


# -------------------------------------------------------------------------------------------------
# The teacher


@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_pattern_finds_the_answer_and_only_then_gives_it(pattern):
    for row, turns in lessons(pattern):
        steps = list(follow(row, [text for text, _ in turns]))
        text, kind, view = steps[-1]
        assert tools.parse_turn(text) == ("answer", row["answer"])
        assert view == tuple(row["objects"][0][:2])  # it is looking at the target
        assert all(kind in ("zoom", "error") for _, kind, _ in steps[:-1])


@pytest.mark.parametrize("strategy", SEARCHES)
def test_every_taught_call_is_legal_and_goes_where_the_thought_says(pattern):
    for row, turns in lessons(pattern):
        for (text, learn), (_, kind, _) in zip(turns, follow(row, [text for text, _ in turns])):
            if learn and kind != "answer":
                assert kind == "zoom"
                place = POSITIONS[PLACE_OF[tuple(tools.parse_turn(text)[1]["bbox_2d"])]]
                assert PHRASES["go"].format(place=place) + "</think>" in text


@pytest.mark.parametrize("strategy", SEARCHES)
def test_mistakes_and_only_mistakes_are_not_learned(pattern):
    """A mistake is a call that the tool refuses, a false word about the view, or a zoom at a place
    with nothing on it."""
    found = collections.Counter()
    for row, turns in lessons(pattern):
        steps = list(follow(row, [text for text, _ in turns]))
        for (text, learn), (_, kind, view), after in zip(turns, steps,
                                                         [*(s[2] for s in steps[1:]), None]):
            at_place = kind == "zoom" and after[1] is not None
            empty = at_place and truth(row, after) == PHRASES["empty"]
            false = not text.startswith("<think>" + truth(row, view))
            assert learn == (kind != "error" and not empty and not false), text
            found.update({"error": kind == "error", "empty": empty, "false": false})
    expected = {"recover": "error", "backtrack": "empty", "search_again": "false"}.get(pattern)
    assert {name for name, times in found.items() if times} == ({expected} if expected else set())


@pytest.mark.parametrize("strategy", SEARCHES)
def test_verdicts_are_true(pattern):
    """ "Want square. Yes." is said in front of the target and nowhere else, "No." in front of every
    other object."""
    for row, turns in lessons(pattern, 10):
        for text, _, view in follow(row, [text for text, _ in turns]):
            at_place = view != "refused" and view[1] is not None
            at_object = at_place and truth(row, view) != PHRASES["empty"]
            verdict = re.search(r" Want (\w+)\. (Yes|No)\.", text)
            assert (verdict is not None) == at_object
            if verdict:
                assert verdict[1] == row["target_attribute"]
                assert (verdict[2] == "Yes") == (view == tuple(row["objects"][0][:2]))


def plan_of(text):
    """Which plan a first turn announces."""
    plan, = (name for name in ("scan", "shuffle", "hint") if PHRASES[name] in text)
    return plan


@pytest.mark.parametrize("strategy", SEARCHES)
def test_a_search_looks_where_its_first_turn_says(pattern):
    """Mistakes apart, it looks at the parts in the announced order, at every candidate once, and at
    nothing else, up to the target. Not found: the announced parts were too few, or the target was
    overlooked; then it scans all nine in a ring."""
    plans = set()
    for row, turns in lessons(pattern):
        plan, target = plan_of(turns[0][0]), tuple(row["objects"][0][:2])
        plans.add(plan)
        first, *more = visits(row, turns)
        views = up_to_target(row, tour(row, later(turns[0][0])))
        if pattern == "recheck":
            views.append(target)
        if pattern == "search_again":  # overlooked
            views = [view for view in tour(row, later(turns[0][0])) if view != target]
        assert first == views
        again = [later(text) for text, _ in turns if PHRASES["again"] in text]
        assert len(again) == len(more) == (target not in first)
        for parts, scan in zip(again, more):
            assert parts == ring(parts[0])
            assert scan == up_to_target(row, tour(row, parts))
    own = {"scan": "scan", "depth_first": "shuffle", "hint": "hint", "search_again": "hint"}
    assert plans == ({own[pattern]} if pattern in own else {"scan", "shuffle", "hint"})


@pytest.mark.parametrize("strategy", SEARCHES)
def test_plans_cover_all_nine_parts_in_their_own_order(pattern):
    """hint: the parts with the colour's wallpaper, then the others; scan: in reading order from a
    random start; depth first: at random."""
    starts, orders = set(), set()
    for row, turns in lessons(pattern):
        plan, parts, walls = plan_of(turns[0][0]), later(turns[0][0]), hinted(row)
        assert sorted(parts) == list(range(9))
        if plan == "hint":
            assert parts == walls + [part for part in range(9) if part not in walls]
        if plan == "scan":
            assert parts == ring(parts[0])
            starts.add(parts[0])
        if plan == "shuffle":
            orders.add(tuple(parts))
    assert pattern != "scan" or starts == set(range(9))
    # the teacher's dice are the same for each level
    assert pattern != "depth_first" or len(orders) > 25


@pytest.mark.parametrize("strategy", SEARCHES)
def test_scenes_without_a_hint_are_solved_too(pattern):
    """No part has the colour's wallpaper (seldom, unless there are many other objects): the hint is
    plain reading order."""
    drawn = (build_data.make_scene(np.random.default_rng([9, index]), "easy", lookalikes=1,
                                   others=20) for index in range(60))
    rows = [row for row in drawn if not hinted(row)]
    assert len(rows) > 10
    for index, row in enumerate(rows):
        turns = list(Teacher(row, pattern, np.random.default_rng([1, index])).turns())
        plan, parts = plan_of(turns[0][0]), later(turns[0][0])
        assert turns[0][0].startswith(f"<think>I see no {row['colour']} walls.")
        assert plan != "hint" or parts == list(range(9))
        assert tools.parse_turn(turns[-1][0]) == ("answer", row["answer"])


def test_the_hint_saves_turns():
    """On average: the wallpaper is a hint, not the answer."""
    turns = {pattern: [len(turns) for _, turns in lessons(pattern)] for pattern in ("hint", "scan")}
    assert np.mean(turns["hint"]) < 0.85 * np.mean(turns["scan"])


@pytest.mark.parametrize("strategy", ["scan", "depth_first", "hint"])
def test_the_last_turn_holds_all_that_is_left_to_do(pattern):
    """Its thought lists the parts not yet looked at and, by the observation they were seen in, the
    candidates not yet looked at, so that nothing older has to be remembered."""
    for row, turns in lessons(pattern):
        parts, left = later(turns[0][0]), {}
        steps = follow(row, [text for text, _ in turns])
        for number, (text, kind, (part, place)) in enumerate(steps):
            if part is not None and place is None:
                assert parts.pop(0) == part
                left[f"observation_{number}"] = positions_with(row["objects"], part, row["colour"])
            if place is not None:
                left[source].remove(POSITIONS[place])
            if PHRASES["again"] in text:
                assert parts == [] and not any(left.values())
                parts = later(text)
            if kind == "zoom":
                assert later(text) == parts
                said = re.findall(PHRASES["here"].format(source=r"(\w+)", places="([a-z -]+)"),
                                  text)
                assert {s: p.split() for s, p in said} == {s: p for s, p in left.items() if p}
                source = tools.parse_turn(text)[1]["source"]


def test_recover_mends_its_call_in_the_next_turn():
    mended = 0
    for row, turns in lessons("recover"):
        steps = list(follow(row, [text for text, _ in turns]))
        for (bad, kind, _), (good, next_kind, _) in zip(steps, steps[1:]):
            if kind == "error":
                assert next_kind == "zoom" and good.startswith("<think>" + PHRASES["sorry"])
                assert re.findall(r" Go [a-z-]+\.", bad) == re.findall(r" Go [a-z-]+\.", good)
                mended += 1
    assert mended > 60  # the slip is left to chance, so a short search may end before it


def test_bad_calls_are_refused_in_several_ways():
    """Malformed JSON, a box out of range, swapped corners, three numbers, an observation that does
    not exist."""
    rng, said = np.random.default_rng(0), collections.Counter()
    call = {"bbox_2d": position_box("center"), "source": "observation_1"}
    image = Image.new("RGB", (90, 90))
    for _ in range(200):
        text = f"<grounding>{collect_coldstart.bad_call(rng, call, 1)}</grounding>"
        turn, finish, _ = tools.take_turn([image, image], text, 1, 9, 9)
        assert finish is None
        said[re.sub("[2-9]", "n", turn["error"])] += 1
    assert len(said) == 4 and min(said.values()) > 10


def test_search_again_overlooks_the_target_once():
    for row, turns in lessons("search_again"):
        texts = [text for text, _ in turns]
        assert sum(PHRASES["again"] in text for text in texts) == 1
        before = [part for part, place in visits(row, turns)[0] if place is None]
        # all nine parts, the overlooked target's too
        assert before == later(texts[0]) and len(before) == 9
        looks = [view for _, _, view in follow(row, texts)].count((row["objects"][0][0], None))
        assert looks == 2  # at the target's part: overlooked, then seen


def test_recheck_looks_at_the_target_twice():
    for row, turns in lessons("recheck"):
        texts = [text for text, _ in turns]
        views = [view for _, _, view in follow(row, texts)]
        assert views[-2:] == [tuple(row["objects"][0][:2])] * 2 and views.count(views[-1]) == 2
        assert [PHRASES["check"] in text for text in texts[-2:]] == [True, False]


def test_backtrack_says_so_and_returns_to_its_candidates():
    slips = 0
    for row, turns in lessons("backtrack"):
        for (_, learn), (text, after) in zip(turns, turns[1:]):
            if not learn:
                assert text.startswith("<think>" + PHRASES["empty"] + PHRASES["back"]) and after
                slips += 1
    assert slips > 60


def test_a_guess_comes_after_one_to_four_turns_and_says_so():
    """Unless the search has ended before; what is guessed is a digit or a shape, as the question
    asks, and evenly spread."""
    after, guessed = collections.Counter(), collections.Counter()
    for row, turns in lessons("guess", 100):
        text, learn = turns[-1]
        kind, answer = tools.parse_turn(text)
        assert kind == "answer" and learn
        if "Guess" not in text:     # found first
            assert answer == row["answer"] and len(turns) <= 4
            continue
        assert text.endswith(f" Guess {answer}.</think><answer>{answer}</answer>")
        shapes = row["answer"] in build_data.SHAPES
        assert answer in (build_data.SHAPES if shapes else set("0123456789"))
        after[len(turns)] += 1
        guessed[answer] += 1
    assert set(after) == {1, 2, 3, 4} and min(after.values()) > 40
    assert len(guessed) == 14 and min(guessed.values()) > 3


# -------------------------------------------------------------------------------------------------
# Trajectories


def test_trajectories_are_played_through_the_real_tool(world, prompts):
    """Every pattern, with images: rows are complete, correct, and replay to the views that the
    turns speak about."""
    rows, seen = tools.read_jsonl(world / "train.jsonl"), set()
    for index in range(160):
        row = rows[index % len(rows)]
        solved = collect_coldstart.solve((index, row), world, prompts, 32, 0)
        if solved["finish_reason"] == "over_turn" or solved["strategy"] == "guess" and not solved["reward"]:
            continue
        tools.check_trajectory(solved)
        seen.add(solved["strategy"])
        assert (solved["finish_reason"], solved["reward"]) == ("answer", 1.0)
        assert solved["prediction"] == row["answer"]
        assert solved["system"] == prompts["system"] and solved["teacher"] == "scripted"
        kept = {k: v for k, v in row.items() if k not in ("objects", "wallpaper")}
        assert {k: v for k, v in solved.items() if k in row} == kept
        for turn, (_, kind, _) in zip(solved["turns"],
                                      follow(row, [t["text"] for t in solved["turns"]])):
            assert kind == ("zoom" if "zoom" in turn else "error" if "error" in turn else "answer")
        image = tools.open_image(world / row["image"])
        views = tools.replay(solved, image)
        assert len(views) == 1 + sum("zoom" in turn for turn in solved["turns"])
        assert solved["strategy"] == "guess" or abs(views[-1].size[0] - image.size[0] / 9) <= 2
    assert seen == set(STRATEGIES)


def test_a_guess_is_asked_again_until_it_is_right(world, prompts, monkeypatch):
    """Rejection sampling: with ten attempts 1 - 0.9^10 = 65% of digits and 94% of shapes are
    guessed right in the end; wrong ones stay wrong rows, which the collection leaves out. Searches
    are never asked again."""
    monkeypatch.setattr(collect_coldstart, "STRATEGIES", {"guess": 1.0})
    rows = tools.read_jsonl(world / "train.jsonl")
    solved = [collect_coldstart.solve((i, rows[i % len(rows)]), world, prompts, 32, 0)
              for i in range(60)]
    guesses = [row for row in solved if row["strategy"] == "guess"]
    assert all(row["reward"] == 1.0 or row["attempts"] == collect_coldstart.ATTEMPTS
               for row in guesses)
    assert 0.5 < sum(row["reward"] for row in guesses) / len(guesses) < 1.0
    assert max(row["attempts"] for row in guesses if row["reward"] == 1.0) > 3
    monkeypatch.setattr(collect_coldstart, "STRATEGIES", {"scan": 1.0})
    solved = collect_coldstart.solve((0, {**rows[0], "answer": "none"}), world, prompts, 32, 0)
    assert solved["attempts"] == 1


def test_a_trajectory_depends_on_seed_and_index_only(world, prompts):
    row = tools.read_jsonl(world / "train.jsonl")[0]
    jobs = list(itertools.product(range(4), range(2)))
    once, again = ([collect_coldstart.solve((index, row), world, prompts, 32, seed)
                    for index, seed in jobs] for _ in range(2))
    assert once == again and len({str(solved["turns"]) for solved in once}) > 4


# -------------------------------------------------------------------------------------------------
# The command


def collect(folder, out, *flags, check=True):
    common = ["--data", folder / "train.jsonl", "--out", folder / out, "--workers", 2]
    return run_script("collect_coldstart.py", *common, *flags, check=check)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """160 questions about twelve images, and the result of an undisturbed collection in
    whole.jsonl."""
    out = tmp_path_factory.mktemp("collect")
    (out / "images").symlink_to(world / "images")
    rows = tools.read_jsonl(world / "train.jsonl")
    tools.write_jsonl(out / "train.jsonl", [{**rows[i % 12], "id": f"q{i}"} for i in range(160)])
    (out / "whole.txt").write_text(collect(out, "whole.jsonl").stdout)
    return out


def test_the_command_keeps_correct_trajectories_and_counts(folder):
    rows = tools.read_jsonl(folder / "whole.jsonl", tools.check_trajectory)
    said = (folder / "whole.txt").read_text()
    assert all(r["reward"] == 1.0 and r["finish_reason"] == "answer" and len(r["turns"]) <= 32
               for r in rows)
    assert not any({"objects", "wallpaper"} & set(r) for r in rows)  # what only the teacher reads
    assert f"160 trajectories, {len(rows)} correct and kept, {160 - len(rows)} left out" in said
    assert "finished in" in said
    for key, value in (("strategy", lambda r: r["strategy"]), ("turns", lambda r: len(r["turns"]))):
        counts = collections.Counter(map(value, rows))
        assert f"per {key}: " + ", ".join(f"{k}: {counts[k]}" for k in sorted(counts)) in said
    assert {r["strategy"] for r in rows} == set(STRATEGIES)
    assert [r["id"] for r in rows] == sorted((r["id"] for r in rows), key=lambda i: int(i[1:]))
    assert not list(folder.glob("*whole*partial*"))


def test_long_solutions_are_left_out_and_counted(folder, world):
    """With a cap of 5 turns some solutions are too long: they are wrong answers as far as the file
    is concerned."""
    tools.write_jsonl(folder / "odd.jsonl", tools.read_jsonl(folder / "train.jsonl")[:40])
    said = collect(folder, "short.jsonl", "--data", folder / "odd.jsonl", "--max_turns", 5).stdout
    kept = tools.read_jsonl(folder / "short.jsonl")
    assert 0 < len(kept) < 38 and all(len(r["turns"]) <= 5 and r["reward"] == 1.0 for r in kept)
    left = re.search(r"40 trajectories, (\d+) correct and kept, (\d+) left out \((.*)\)", said)
    assert int(left[1]) == len(kept) and int(left[2]) == 40 - len(kept)
    reasons = {name: int(times) for name, times in re.findall(r"'(\w+)': (\d+)", left[3])}
    assert sum(reasons.values()) == 40 - len(kept) and set(reasons) == {"over_turn"}


@pytest.fixture(scope="module")
def killed(folder):
    """The complete lines that a collection into killed.jsonl had finished when it was killed, and
    the path they were at."""
    def partial():
        return [path for path in folder.glob("killed.jsonl*partial")
                if path.read_bytes().count(b"\n") >= 3]

    command = [sys.executable, str(ROOT / "collect_coldstart.py"), "--data",
               str(folder / "train.jsonl"),
               "--out", str(folder / "killed.jsonl"), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while process.poll() is None and not partial():
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)  # its worker too
    assert process.wait() == -signal.SIGKILL and not (folder / "killed.jsonl").exists()
    path, = partial()
    lines = path.read_bytes().split(b"\n")[:-1]
    path.unlink()
    assert 3 <= len(lines) < 160
    return path, lines


def test_a_killed_collection_goes_on_where_it_was(folder, killed):
    """The kill came in the middle of a line. What was finished is not solved again: a mark in it is
    still there."""
    path, lines = killed
    path.write_bytes(b"\n".join(lines)[:-len(lines[-1]) // 2])
    collect(folder, "killed.jsonl")
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    marked = [{**json.loads(line), "mark": True} for line in lines]
    tools.write_jsonl(path, marked)
    collect(folder, "killed.jsonl")
    rows = tools.read_jsonl(folder / "killed.jsonl")
    assert [row for row in rows if "mark" in row] == [row for row in marked if row["reward"] == 1.0]
    assert not list(folder.glob("*killed*partial*")) and not list(folder.glob(".*"))


@pytest.mark.parametrize("change", ["questions", "ids", "max_turns", "prompts"])
def test_a_leftover_of_another_collection_never_leaks_in(folder, killed, change):
    """Either it is refused by name, or it is not used: every row kept belongs to this
    collection."""
    path, lines = killed
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = tools.read_jsonl(folder / "train.jsonl")[:80]
    if change == "questions":  # drawn with another seed: other images under the same ids
        rows = [{**other, "id": row["id"]} for row, other in zip(rows, rows[1:])]
    if change == "ids":
        rows = [{**row, "id": "x" + row["id"]} for row in rows]
    tools.write_jsonl(folder / "other.jsonl", rows)
    words = {"system": "Look."} if change == "prompts" else {}
    (folder / "prompts.json").write_text(json.dumps(words))
    cap = 5 if change == "max_turns" else 32
    done = collect(folder, "killed.jsonl", "--data", folder / "other.jsonl", "--max_turns", cap,
                   "--prompts", folder / "prompts.json", check=False)
    path.unlink(missing_ok=True)
    if done.returncode:
        assert done.returncode == 1 and "partial" in done.stderr and "Traceback" not in done.stderr
        return
    asked = {row["id"]: row for row in rows}
    for row in tools.read_jsonl(folder / "killed.jsonl"):
        assert all(row[key] == asked[row["id"]][key] for key in ("image", "question", "answer"))
        assert len(row["turns"]) <= cap
        assert row["system"] == tools.load_prompts(folder / "prompts.json")["system"]


@pytest.fixture
def small(folder, tmp_path):
    """Two questions in a folder of their own, for a user's mistakes."""
    (tmp_path / "images").symlink_to(folder / "images")
    tools.write_jsonl(tmp_path / "train.jsonl", tools.read_jsonl(folder / "train.jsonl")[:2])
    return tmp_path


@pytest.mark.parametrize("flags, words", [
    (["--workers", 0], "--workers"), (["--seed", -1], "--seed"), (["--limit", -1], "--limit"),
    (["--max_turns", 0], "--max_turns"), (["--out", "elsewhere.jsonl"], "folder"),
    (["--prompts", "no.json"], "no.json"),
    (["--data", "nowhere/train.jsonl", "--out", "nowhere/x.jsonl"],
     "python build_data.py")], ids=str)
def test_a_bad_flag_is_one_line_and_exit_code_1(small, flags, words):
    done = collect(small, "bad.jsonl", *flags, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"collect_coldstart\.py: error: .*\n", done.stderr) and words in done.stderr
    assert not list(small.glob("bad*"))


@pytest.mark.parametrize("wrong", ["none", "unsolvable"])
def test_a_collection_without_any_trajectory_leaves_the_old_file(small, wrong):
    """Nothing to solve, or nothing solved within two turns: one line, and what was collected before
    is still there."""
    (small / "old.jsonl").write_text("kept")
    if wrong == "none":
        tools.write_jsonl(small / "train.jsonl", [])
    done = collect(small, "old.jsonl", "--max_turns", 2, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (small / "old.jsonl").read_text() == "kept"


@pytest.mark.parametrize("objects", [
    [["x"]], [[0, 9, "red", "star", 1]], [[0, 1, "red", "star"]], [[0, 1, "red", "star", "1"]],
    "x"])
def test_a_damaged_layout_is_refused_by_line(small, objects):
    rows = tools.read_jsonl(small / "train.jsonl")
    tools.write_jsonl(small / "train.jsonl", [rows[0], {**rows[1], "objects": objects}])
    with pytest.raises(tools.InputError, match="train.jsonl:2: .*layout"):
        tools.read_jsonl(small / "train.jsonl", collect_coldstart.check_layout)


def test_a_killed_worker_is_reported_and_nothing_hangs(tmp_path):
    with pytest.raises(tools.InputError, match="killed"):
        list(build_data.parallel(os._exit, [1], 1, "jobs"))


def test_the_questions_are_not_overwritten(small):
    before = (small / "train.jsonl").read_bytes()
    done = collect(small, "train.jsonl", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (small / "train.jsonl").read_bytes() == before


@pytest.mark.parametrize("key", ["objects", "wallpaper", "colour", "target_attribute"])
def test_questions_without_a_layout_are_refused_by_line(small, key):
    first, second = tools.read_jsonl(small / "train.jsonl")
    tools.write_jsonl(small / "train.jsonl", [first, {k: v for k, v in second.items() if k != key}])
    done = collect(small, "bad.jsonl", check=False)
    assert done.returncode == 1 and "train.jsonl:2:" in done.stderr and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------
# A served teacher, on a real server on loopback


class Oracle:
    """behave() for ChatServer: knows the scripted teacher's turns for every question, and adds what
    models make up."""

    def __init__(self, world, prompts, wrong=(), failing=()):
        rows = tools.read_jsonl(world / "train.jsonl")
        self.solved = {row["question"]: collect_coldstart.solve((i, row), world, prompts, 32, 5)
                       for i, row in enumerate(rows)}
        self.wrong, self.failing = wrong, list(failing)

    def __call__(self, body):
        at, row = max((i, self.solved[q])
                      for i, m in enumerate(body["messages"]) if m["role"] == "user"
                      for q in [picture_of(m)[1][0].strip()]
                      if isinstance(m["content"], list) and q in self.solved)
        if row["id"] in self.failing:
            return 503, {}, b""
        text = row["turns"][sum(m["role"] == "assistant" for m in body["messages"][at:])]["text"]
        if row["id"] in self.wrong:
            text = text.replace(f"<answer>{row['answer']}<", "<answer>no idea<")
        return text + "\nobservation_1:"


@pytest.fixture
def questions(world, tmp_path):
    """Six questions that differ, with their images, in a folder of their own."""
    rows = list({row["question"]: row
                 for row in tools.read_jsonl(world / "train.jsonl")}.values())[:6]
    for row in rows:
        (tmp_path / row["image"]).parent.mkdir(exist_ok=True)
        (tmp_path / row["image"]).write_bytes((world / row["image"]).read_bytes())
    tools.write_jsonl(tmp_path / "train.jsonl", [tools.without_layout(row) for row in rows])
    return rows


def teach(folder, server, *flags, check=True):
    return run_script("collect_coldstart.py", "--data", folder / "train.jsonl",
                      "--out", folder / "out.jsonl", "--teacher", server.url,
                      "--teacher_model", "big", "--requests", 2, "--min_pixels", 6000,
                      "--max_pixels", 8000, *flags,
                      check=check, env={"TEACHER_API_KEY": "sk-very-secret"})


def test_a_served_teacher_is_shown_examples_and_only_right_answers_are_kept(world, prompts,
                                                                            questions, tmp_path):
    oracle = Oracle(world, prompts, wrong={questions[1]["id"]})
    with ChatServer(oracle) as server:
        done = teach(tmp_path, server)
        requests = server.requests
    rows = tools.read_jsonl(tmp_path / "out.jsonl", tools.check_trajectory)
    assert [r["id"] for r in rows] == [q["id"] for q in questions if q["id"] != questions[1]["id"]]
    for row in rows:
        expected = oracle.solved[row["question"]]       # what it made up after its calls is cut off
        assert [t["text"] for t in row["turns"]] == [t["text"] for t in expected["turns"]]
        assert row["finish_reason"] == "answer"
        assert row["system"] == tools.PROMPTS["system"] and row["teacher"] == "big"
        assert "objects" not in row
    count = sum(len(oracle.solved[q["question"]]["turns"]) for q in questions)
    tokens = f"{100 * count} prompt and {10 * count} completion tokens"
    assert f"teacher: {count} replies, 0 retries, {tokens}" in done.stdout
    assert "6 trajectories, 5 correct and kept, 1 left out ({'answer': 1})" in done.stdout
    first = next(body["messages"]
                 for _, _, body in requests if body["messages"][-2]["role"] == "assistant")
    asked = [m for m in first[:-1] if m["role"] == "user" and isinstance(m["content"], list)]
    shown = [m for m in asked if "observation" not in picture_of(m)[1][0]]
    assert len(shown) == 6 and first[0]["content"].startswith(tools.PROMPTS["system"])
    assert sum("<answer>" in m["content"] for m in first if m["role"] == "assistant") == 6
    assert {headers["authorization"] for _, headers, _ in requests} == {"Bearer sk-very-secret"}
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in done.stdout + done.stderr


def test_questions_without_a_usable_reply_stay_open_for_another_run(world, prompts, questions,
                                                                    tmp_path, monkeypatch):
    oracle = Oracle(world, prompts, failing=[questions[2]["id"]])
    with ChatServer(oracle) as server:
        rows = tools.read_jsonl(tmp_path / "train.jsonl")
        client = tools.ChatClient(server.url, "big", "teacher", attempts=2, pause=0.01)
        args = argparse.Namespace(max_turns=32, seed=0, teacher="x", teacher_model="big",
                                  out=tmp_path / "out.jsonl", requests=2,
                                  data=tmp_path / "train.jsonl", max_new_tokens=99, min_pixels=1,
                                  max_pixels=2, image_bytes=3)
        done, kept = collect_coldstart.collect(rows, args, tools.PROMPTS, client)
        assert len(done) == len(kept) == 5 and client.used["retries"] == 1
        assert client.failures() == "1 x HTTP 503:"
        oracle.failing.clear()
        before = len(server.requests)
        other = collect_coldstart.collect(rows, args, tools.PROMPTS, client,
                                          [{"role": "system", "content": "other examples"}])[0]
        count = sum(len(row["turns"]) for row in other)
        # another collection: nothing is taken over
        assert len(other) == 6 and len(server.requests) - before == count
        done, kept = collect_coldstart.collect(rows, args, tools.PROMPTS, client)
        left = oracle.solved[questions[2]["question"]]
        assert len(server.requests) - before - count == len(left["turns"])
    assert [r["id"] for r in kept] == [q["id"] for q in questions]
    assert tools.read_jsonl(tmp_path / "out.jsonl") == kept
    assert not list(tmp_path.glob("*.partial"))


def test_ctrl_c_ends_a_served_collection_at_once(world, prompts, questions, tmp_path):
    oracle, gate = Oracle(world, prompts), threading.Semaphore(5)

    def behave(body):
        gate.acquire()
        return oracle(body)

    with ChatServer(behave) as server:
        process = crash.launch(["collect_coldstart.py", "--data", tmp_path / "train.jsonl",
                                "--out", tmp_path / "out.jsonl", "--teacher", server.url,
                                "--requests", 2, "--min_pixels", 6000, "--max_pixels", 8000],
                               env={"HF_HUB_OFFLINE": "0"})
        crash.wait_until(process, lambda: len(server.requests) >= 6)
        process.send_signal(signal.SIGINT)
        code, _, err = crash.finish(process, 20)
        assert code == 130 and "interrupted; what was saved is kept" in err
        assert "Traceback" not in err
        gate.release(100)
        time.sleep(0.3)
        assert len(server.requests) <= 7    # the two that were waited for


def test_a_killed_collection_of_a_served_teacher_keeps_what_was_paid_for(world, prompts, questions,
                                                                         tmp_path):
    gate = threading.Semaphore(12)      # requests that are answered before the kill
    oracle = Oracle(world, prompts)

    def behave(body):
        gate.acquire()
        return oracle(body)

    with ChatServer(behave) as server:
        flags = ["collect_coldstart.py", "--data", tmp_path / "train.jsonl", "--out",
                 tmp_path / "out.jsonl", "--teacher", server.url, "--requests", 1,
                 "--min_pixels", 6000, "--max_pixels", 8000]
        process = Forked(flags)
        crash.wait_until(process, lambda: any(p.read_bytes().count(b"\n")
                                              for p in tmp_path.glob("*.partial")))
        crash.kill(process)
        finished = sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("*.partial"))
        gate.release(1000)
        time.sleep(0.2)
        before = len(server.requests)
        run_script(*flags)
        left = [oracle.solved[q["question"]] for q in questions[finished:]]
        assert finished >= 1
        assert len(server.requests) - before == sum(len(row["turns"]) for row in left)
    rows = tools.read_jsonl(tmp_path / "out.jsonl")
    assert [r["id"] for r in rows] == [q["id"] for q in questions]


@pytest.mark.parametrize("flags, words", [
    (["--teacher", "nonsense"], "must be a URL"),
    (["--teacher", "http://h", "--exemplars", "/dev/null"], "/dev/null"),
    (["--teacher", "http://127.0.0.1:9", "--requests", 0], "--requests 0"),
    (["--teacher", "http://127.0.0.1:9", "--exemplars", "/nowhere.jsonl"],
     "/nowhere.jsonl does not exist")])
def test_bad_flags_of_a_served_teacher_are_one_line(small, flags, words):
    done = collect(small, "bad.jsonl", *flags, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"collect_coldstart\.py: error: .*\n", done.stderr) and words in done.stderr
