"""Collect cold-start trajectories: a teacher solves questions turn by turn; only correct ones stay.

The default teacher is scripted: it reads the scene's layout, but acts through the same tool and the
same views as the policy, and says in each thought what it sees, what is still to be looked at, and
where it goes next. That running list is what lets a small policy search for 32 turns: all it must
remember stands in its own last turn.

Any model behind an OpenAI-compatible endpoint can teach as well (--teacher URL), as in the paper:
it is shown six solved questions, images and turns, and then plays the question through the tool.

Search patterns, one per trajectory, named in the row ("strategy"):
    scan            the nine parts in reading order from a random start, every candidate at once
    depth_first     the nine parts in random order, every candidate at once
    hint            the parts that have the colour's wallpaper first, then the others
    backtrack       goes to a place with nothing on it, says so, and goes back to the candidates
    recover         makes a call that the tool refuses, and mends it
    search_again    overlooks the target, finds nothing, and scans all nine parts again
    recheck         looks twice before answering
    guess           gives up after a few turns and answers with a guess, which it calls one. As with
                    a real teacher only the lucky ones are kept: it is asked again until the answer
                    is right, ATTEMPTS times at most. So the student searches, and guesses now and
                    then; to unlearn that is what RL is for

What differs from the Mini-o3 paper:
1. The paper prompts a VLM with six exemplars; the scripted teacher needs neither network nor GPU.
   The exemplars here are its own, on drawn images; --exemplars puts others in their place.
2. What a served teacher writes after its call or answer is cut off, and its exemplars are not part
   of the trajectory: the student learns to act without them.
3. Deliberate mistakes (a wrong guess, a refused call, an overlooked target) are marked "learn":
   false in their turn: the student sees them as context and learns the recovery only.

Commands (CPU work; a GPU or more nodes change nothing):
    default     python collect_coldstart.py
    smaller     python collect_coldstart.py --limit 200 --out data/small.jsonl
    a teacher   TEACHER_API_KEY=... python collect_coldstart.py --teacher http://localhost:8000/v1
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import tempfile
import types
from functools import partial
from pathlib import Path

import numpy as np

import tools
from build_data import (PHRASES, POSITIONS, SHAPES, describe_cell, describe_part, describe_walls,                         parallel, position_box, positions_with)

STRATEGIES = {"scan": 0.13, "depth_first": 0.13, "hint": 0.26, "backtrack": 0.09, "recover": 0.09,
            "search_again": 0.04, "recheck": 0.04, "guess": 0.22}
ATTEMPTS = 10   # a guessed shape is right once in 4 times, a digit once in 10


def bad_call(rng, call, shown):
    """JSON of a call that the tool refuses, in one of the ways in which small policies go wrong."""
    x0, y0, x1, y1 = call["bbox_2d"]
    missing = f"observation_{shown + int(rng.integers(1, 4))}"
    changes = [{"source": missing}, {"bbox_2d": [x1, y1, x0, y0]},
               {"bbox_2d": [x0, y0, x1 + 1.0, y1]}, {"bbox_2d": [x0, y0, x1]}]
    kind = int(rng.integers(len(changes) + 1))
    if kind == len(changes):
        return json.dumps(call)[:-1]
    return json.dumps({**call, **changes[kind]})


class Teacher:
    """The scripted search. It knows the layout and keeps the state that its thoughts spell out:
    `here`, a list of (source, places still to be looked at there), and `later`, parts of the
    original image still to be looked at."""

    def __init__(self, row, pattern, rng):
        self.row, self.pattern, self.rng = row, pattern, rng
        self.shown, self.here, self.later, self.parts = 0, [], [], {}   # parts: by observation
        self.due = pattern      # until what the pattern is named after has happened
        self.guess_at = int(rng.integers(1, 5)) if pattern == "guess" else None

    def think(self, seen, place, source, call=None):
        """A turn's text: what is seen, the state, where to go. call: JSON, a deliberate mistake."""
        state = "".join(PHRASES["here"].format(source=s, places=" ".join(p)) for s, p in self.here)
        if self.later:
            state += PHRASES["later"].format(places=" ".join(self.later))
        state += PHRASES["go"].format(place=place)
        call = call or json.dumps({"bbox_2d": position_box(place), "source": source})
        return f"<think>{seen}{state}</think><grounding>{call}</grounding>"

    def ring(self):
        """All parts in reading order from a random start."""
        start = int(self.rng.integers(9))
        return POSITIONS[start:] + POSITIONS[:start]

    def plan(self):
        """Choose the order of the parts; returns the word for it."""
        row, self.order = self.row, "hint"
        if self.pattern in ("scan", "depth_first"):
            self.order = self.pattern
        elif self.pattern not in ("hint", "search_again"):
            self.order = str(self.rng.choice(["hint", "scan", "depth_first"]))
        if self.order == "scan":
            self.later = self.ring()
            return PHRASES["scan"]
        if self.order == "depth_first":
            self.later = [POSITIONS[i] for i in self.rng.permutation(9)]
            return PHRASES["shuffle"]
        hinted = [place for place, wall in zip(POSITIONS, row["wallpaper"]) if wall == row["colour"]]
        self.later = hinted + [place for place in POSITIONS if place not in hinted]
        return PHRASES["hint"]

    def mistake(self, seen, source, place):
        """The pattern's deliberate mistake on the way to a place, at even odds, once: a call that
        is refused, or a look at a place where nothing is. Yields that turn, as look() does; returns
        what is seen then."""
        if self.rng.random() >= 0.5:
            return seen
        if self.due == "recover":
            call = {"bbox_2d": position_box(place), "source": source}
            yield self.think(seen, place, source, bad_call(self.rng, call, self.shown)), False
            self.due = None
            return PHRASES["sorry"]
        held = [o[1] for o in self.row["objects"] if o[0] == self.parts.get(source)]
        empty = [POSITIONS[i] for i in range(9) if i not in held]
        if self.due == "backtrack" and self.here and empty:
            yield self.think(seen, str(self.rng.choice(empty)), source), False
            self.shown, self.due = self.shown + 1, None
            return PHRASES["empty"] + PHRASES["back"]
        return seen

    def look(self, seen, learn):
        """Say what is seen and choose the next view, candidates before parts. Yields (text, learn)
        per turn; returns (part, place) of the view, place None for a whole part."""
        source, places = self.here[0] if self.here else ("original_image", self.later)
        place, rest = places[0], places[1:]
        seen = yield from self.mistake(seen, source, place)
        yield self.think(seen, place, source), learn
        self.shown += 1
        if self.here:
            self.here = ([(source, rest)] if rest else []) + self.here[1:]
            return self.parts[source], POSITIONS.index(place)
        self.later, part = rest, POSITIONS.index(place)
        self.parts[f"observation_{self.shown}"] = part
        return part, None

    def view_part(self, part):
        """Read a view of one part and note the candidates. Returns (text, learn)."""
        objects, colour = self.row["objects"], self.row["colour"]
        overlooked = self.due == "search_again" and part == objects[0][0]
        if overlooked:
            objects, self.due = objects[1:], None
        places = positions_with(objects, part, colour)
        if places:
            self.here.append((f"observation_{self.shown}", places))
        return describe_part(objects, part, colour), not overlooked

    def view_place(self, part, place):
        """Read a view of one place. Returns (text, whether it ends in the answer)."""
        row, found = self.row, [part, place] == self.row["objects"][0][:2]
        seen = describe_cell(row["objects"], part, place)
        seen += PHRASES["verdict"].format(wanted=row["target_attribute"], verdict="Yes" if found else "No")
        if found and self.due == "recheck":
            source = next(s for s in reversed(self.parts) if self.parts[s] == part)
            self.here, self.later, self.due = [(source, [POSITIONS[place]])], [], None
            return seen + PHRASES["check"], False
        return seen + (PHRASES["answer"].format(answer=row["answer"]) if found else ""), found

    def turns(self):
        """Yield (text, learn) turn by turn until the answer."""
        row, answer, learn, found = self.row, self.row["answer"], True, False
        seen = describe_walls(row["wallpaper"], row["colour"]) + self.plan()
        for turn in itertools.count(1):
            if turn == self.guess_at:
                shape = answer in SHAPES
                answer = str(self.rng.choice(SHAPES) if shape else self.rng.integers(10))
                seen, self.due = seen + PHRASES["guess"].format(answer=answer), None
                break
            part, place = yield from self.look(seen, learn)
            if place is None:
                seen, learn = self.view_part(part)
            else:
                (seen, found), learn = self.view_place(part, place), True
            if found:
                break
            if not self.here and not self.later:
                seen += PHRASES["again"]
                self.later = self.ring()
        yield f"<think>{seen}</think><answer>{answer}</answer>", True


def solve(job, root, prompts, max_turns, seed):
    """The trajectory row of a question: the scripted teacher's turns, played through the real tool
    on the real image; where it guesses, the last of several attempts. job: (number, question row).
    """
    index, row = job
    rng = np.random.default_rng([seed, index])
    drawn = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    image = tools.open_image(root / row["image"])
    for attempt in range(1, ATTEMPTS + 1):
        views, turns, teacher = [image], [], Teacher(row, drawn, rng)
        for text, learn in teacher.turns():
            turn, finish, prediction = tools.take_turn(
                views, text, len(turns) + 1, max_turns, max_turns)
            turns.append(turn if learn else {**turn, "learn": False})
            if finish:
                break
        early = teacher.due in ("recover", "backtrack", "guess")  # it had the answer before
        pattern = teacher.order if early else drawn
        solved = trajectory(row, prompts, turns, finish, prediction, "scripted")
        if pattern != "guess" or solved["reward"] == 1.0:
            break
    return {**solved, "strategy": pattern, "attempts": attempt}


def trajectory(row, prompts, turns, finish, prediction, teacher):
    """The trajectory row of a conversation."""
    reward = float(tools.match_answer(prediction, row["answer"], row.get("options")))
    return {**tools.without_layout(row), "system": prompts["system"], "turns": turns,
            "finish_reason": finish, "prediction": prediction, "reward": reward, "teacher": teacher}


def check_layout(row):
    """A question of the default world with its layout, as the scripted teacher needs it."""
    tools.check_question(row)
    objects, walls = row.get("objects"), row.get("wallpaper")
    drawn = isinstance(objects, list) and objects and all(
        isinstance(o, list) and [type(v) for v in o] == [int, int, str, str, int]
        and 0 <= min(o[:2]) and max(o[:2]) < 9 for o in objects)
    papered = isinstance(walls, list) and len(walls) == 9 and all(
        isinstance(wall, (str, type(None))) for wall in walls)
    named = isinstance(row.get("colour"), str) and isinstance(row.get("target_attribute"), str)
    tools.check(drawn and papered and named, "the scripted teacher needs questions with a layout "
               "('objects', 'walls'), as build_data.py draws them")


def collect(rows, args, prompts, client=None, examples=()):
    """Solve all questions in parallel, each kept in a partial file at once so that a kill loses
    nothing. Returns (all trajectories in order, those that are correct). Questions that got no
    usable reply stay open for another run."""
    settings = [rows, prompts, args.max_turns, args.seed, args.teacher, client and [
        args.teacher_model, args.max_new_tokens, args.min_pixels, args.max_pixels,
        args.max_image_bytes, list(examples)]]  # another collection has another partial file
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    journal = tools.Journal(args.out.with_name(f"{args.out.name}.{digest}.partial"))
    done = {row["id"]: row for row in journal.rows}
    jobs = [(i, row) for i, row in enumerate(rows) if row["id"] not in done]
    common = {"root": args.data.parent, "prompts": prompts, "seed": args.seed}
    if client is None:
        work = partial(solve, max_turns=args.max_turns, **common)
        results = parallel(work, jobs, args.workers, "collect", len(done))
    else:
        from extras import served
        limits = types.SimpleNamespace(max_turns=args.max_turns, max_images=args.max_turns,
                                       max_new_tokens=args.max_new_tokens)
        work = partial(served.solve_served, client=client, before=examples, limits=limits, **common)
        played = served.in_threads(client, work, jobs, args.requests)
        bar = tools.progress_bar(played, desc="collect", initial=len(done), total=len(rows))
        results = (row for _, row in bar if row is not None)
    for row in results:
        done[row["id"]] = row
        journal.add(row)
    done = [done[row["id"]] for row in rows if row["id"] in done]
    kept = [row for row in done if row["reward"] == 1.0]
    if kept:
        tools.write_jsonl(args.out, kept)
    if len(done) == len(rows):
        journal.path.unlink()
    return done, kept


def parse_args():
    parser = argparse.ArgumentParser(description="Collect correct trajectories of a teacher.")
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/train.jsonl"),
        help="questions (scripted: with their layout)")
    add("--out", type=Path, default=Path("data/coldstart.jsonl"),
        help="trajectories; in the folder of --data, since image paths are relative to it")
    add("--teacher", default="scripted", help="who solves the questions: 'scripted', or the URL "
        "of an OpenAI-compatible server (its key in the environment variable TEACHER_API_KEY)")
    add("--prompts", type=Path, help="JSON file with other system, question, observation and "
        "error texts; the system text is stored in the rows")
    add("--max_turns", type=int, default=32, help="longer solutions are counted and left out")
    add("--limit", type=int, help="use only the first questions")
    add("--workers", type=int, default=os.cpu_count(), help="processes of the scripted teacher")
    add("--seed", type=int, default=0, help="patterns and the teacher's choices")
    add = parser.add_argument_group("a served teacher (--teacher URL)").add_argument
    add("--teacher_model", help="name of the model on that server")
    add("--exemplars", type=Path, help="trajectory rows that are shown first (default: six drawn)")
    add("--requests", type=int, default=8, help="questions that are played at once")
    add("--max_new_tokens", type=int, default=1024, help="a longer turn ends as void")
    add("--min_pixels", type=int, default=40_000, help="smallest picture sent")
    add("--max_pixels", type=int, default=2_000_000, help="largest picture sent")
    add("--max_image_bytes", type=int, default=1_500_000, help="largest picture that is sent to a "
        "server, in bytes; larger ones become JPEG, and smaller")
    args = parser.parse_args()
    tools.check_number_flags(args, ["seed"])
    tools.check(args.out.parent.resolve() == args.data.parent.resolve(), f"--out {args.out} must be "
               f"in the folder of --data ({args.data.parent}), where the images are")
    tools.check(args.out.resolve() != args.data.resolve(), f"--out {args.out} would overwrite the "
               "questions in --data; choose another name")
    return args


def print_summary(done, kept, args, client):
    left_out = collections.Counter(row["finish_reason"] for row in done if row["reward"] != 1.0)
    print(f"teacher {args.teacher}: {len(done)} trajectories, {len(kept)} correct and kept, "
          f"{len(done) - len(kept)} left out ({dict(left_out)})")
    again = sum(row.get("attempts", 1) - 1 for row in done)
    if again:
        print(f"asked again after a wrong guess: {again} times")
    if client is not None:
        from extras import served
        served.print_cost("teacher", [client.used[k] for k in served.COSTS])
    counts = {"turns": collections.Counter(len(row["turns"]) for row in kept)}
    if client is None:  # a served teacher follows no pattern of ours
        counts["strategy"] = collections.Counter(row["strategy"] for row in kept)
    for name in sorted(counts):
        found = sorted(counts[name].items())
        print(f"per {name}: " + ", ".join(f"{key}: {times}" for key, times in found))


def main():
    args = parse_args()
    check_row = check_layout if args.teacher == "scripted" else tools.check_question
    rows = tools.read_questions(args.data, "python build_data.py", check_row)[:args.limit]
    tools.check(rows, f"{args.data} has no rows; make it with: python build_data.py")
    prompts, client, examples = tools.load_prompts(args.prompts), None, []
    if args.teacher != "scripted":
        from extras import served
        client = served.ChatClient(args.teacher, args.teacher_model, "teacher", args.min_pixels,
                                  args.max_pixels, args.max_image_bytes)
        with tempfile.TemporaryDirectory() as folder:
            shown = served.solved_examples(args.exemplars, prompts, Path(folder))
            examples = served.show_examples(*shown, client, prompts)
    done, kept = collect(rows, args, prompts, client, examples)
    print_summary(done, kept, args, client)
    tools.check(len(done) == len(rows), f"{len(rows) - len(done)} of {len(rows)} questions got no "
               f"usable reply ({client and client.failures()}); run the same command again to try "
               "just these")
    tools.check(kept, f"none of {len(done)} trajectories is correct; {args.out} is left as it is")


if __name__ == "__main__":
    tools.run(main)
