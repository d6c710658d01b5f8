"""Collect cold-start trajectories: a teacher solves training questions turn by turn; only correct solutions are kept.

The default teacher is scripted: it reads the scene's layout, but acts through the same tool and the same views as the
policy, and says in each thought what it sees, what is still to be looked at, and where it goes next. That running list is
what lets a small policy search for 32 turns: all it must remember stands in its own last turn.

Any model behind an OpenAI-compatible endpoint can teach as well (--teacher URL), as in the paper: it is shown six solved
questions, images and turns, and then plays the question through the same tool.

Search patterns, one per trajectory, named in the row ("pattern"):
    scan            the nine parts in reading order from a random start, every candidate at once
    depth_first     the nine parts in random order, every candidate at once
    hint            the parts that have the colour's wallpaper first, then the others, every candidate at once
    backtrack       goes to a place with nothing on it, says so, and goes back to the candidates
    recover         makes a call that the tool refuses, and mends it
    search_again    overlooks the target, finds nothing, and scans all nine parts again
    recheck         looks twice before answering
    guess           gives up after a few turns and answers with a guess, which it calls one. As with a real teacher only
                    the lucky ones are kept: it is asked again until the answer is right, ATTEMPTS times at most. So the
                    student searches, and guesses now and then; to unlearn that is what RL is for

What differs from the Mini-o3 paper:
1. The paper prompts a VLM with six exemplars; the scripted teacher needs neither a network nor a GPU. The exemplars here are
   the scripted teacher's own, on drawn images; --exemplars puts others in their place.
2. What a served teacher writes after its call or answer is cut off, and its exemplars are not part of the trajectory: the
   student learns to act without them.
3. Deliberate mistakes (a wrong guess, a refused call, an overlooked target) are marked "learn": false in their turn: the
   student sees them as context and learns the recovery, not the mistake.

Commands (CPU work; a GPU or more nodes change nothing):
    default     python collect_coldstart.py
    smaller     python collect_coldstart.py --limit 200 --out data/small.jsonl
    a teacher   TEACHER_API_KEY=... python collect_coldstart.py --teacher http://localhost:8000/v1 \\
                    --teacher_model Qwen/Qwen2.5-VL-72B-Instruct --data data/visualprobe/train.jsonl \\
                    --out data/visualprobe/coldstart.jsonl --requests 16
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
from build_data import (SHAPES, describe_cell, describe_part, describe_walls, make_question, parallel,
                        place_box, places_with)
from tools import PHRASES, PLACES

PATTERNS = {"scan": 0.13, "depth_first": 0.13, "hint": 0.26, "backtrack": 0.09, "recover": 0.09,
            "search_again": 0.04, "recheck": 0.04, "guess": 0.22}
ATTEMPTS = 10   # a guessed shape is right once in 4 times, a digit once in 10


def bad_call(rng, call, shown):
    """A call that the tool refuses, in one of the ways in which small policies go wrong. Returns the JSON text."""
    x0, y0, x1, y1 = call["bbox_2d"]
    kinds = [{**call, "source": f"observation_{shown + int(rng.integers(1, 4))}"}, {**call, "bbox_2d": [x1, y1, x0, y0]},
             {**call, "bbox_2d": [x0, y0, x1 + 1.0, y1]}, {**call, "bbox_2d": [x0, y0, x1]}]
    kind = int(rng.integers(len(kinds) + 1))
    return json.dumps(kinds[kind]) if kind < len(kinds) else json.dumps(call)[:-1]


class Teacher:
    """The scripted search. It knows the layout and keeps the state that its thoughts spell out: `here`, a list of
    (source, places still to be looked at there), and `later`, parts of the original image still to be looked at."""

    def __init__(self, row, pattern, rng):
        self.row, self.pattern, self.rng = row, pattern, rng
        self.shown, self.here, self.later = 0, [], []                       # observations so far; what is left
        self.overlook = pattern == "search_again"
        self.guess_at = int(rng.integers(1, 5)) if pattern == "guess" else None     # gives up here

    def think(self, seen, place, source, raw=None):
        """One turn's text: what is seen, the state, where to go; raw replaces the call's JSON (a deliberate mistake)."""
        state = "".join(PHRASES["here"].format(source=s, places=" ".join(p)) for s, p in self.here)
        if self.later:
            state += PHRASES["later"].format(places=" ".join(self.later))
        call = raw or json.dumps({"bbox_2d": place_box(place), "source": source})
        return f"<think>{seen}{state}{PHRASES['go'].format(place=place)}</think><grounding>{call}</grounding>"

    def next(self):
        """Where to look next: (place, source, is a part). Candidates come before parts."""
        if not self.here:
            return self.later[0], "original_image", True
        source, places = self.here[0]
        return places[0], source, False

    def ring(self):
        start = int(self.rng.integers(9))
        return PLACES[start:] + PLACES[:start]

    def plan(self):
        """The order of parts; returns the word for it."""
        hinted = [place for place, wall in zip(PLACES, self.row["walls"]) if wall == self.row["colour"]]
        order = self.pattern if self.pattern in ("scan", "depth_first") else "hint"
        if self.pattern in ("backtrack", "recover", "recheck", "guess"):
            order = str(self.rng.choice(["hint", "scan", "depth_first"]))
        self.order = order
        if order == "scan":
            self.later = self.ring()
            return PHRASES["scan"]
        if order == "depth_first":
            self.later = [PLACES[i] for i in self.rng.permutation(9)]
            return PHRASES["shuffle"]
        self.later = hinted + [place for place in PLACES if place not in hinted]
        return PHRASES["hint"]

    def empty_places(self, source):
        """Names of the places without any object in the part that the observation `source` shows."""
        held = [o[1] for o in self.row["objects"] if o[0] == self.parts[source]]
        return [place for i, place in enumerate(PLACES) if i not in held]

    def look(self, seen, learn):
        """Say what is seen and choose the next view, perhaps with the pattern's deliberate mistake first; yields
        (text, learn) per turn and returns (part, place or None for the whole part) of the crop that will be seen."""
        place, source, is_part = self.next()
        slip = self.rng.random() < 0.5  # when during the search the mistake happens
        if self.pattern == "recover" and slip:
            call = {"bbox_2d": place_box(place), "source": source}
            yield self.think(seen, place, source, bad_call(self.rng, call, self.shown)), False
            seen, self.pattern = PHRASES["sorry"], "recovered"
        elif self.pattern == "backtrack" and slip and not is_part and self.empty_places(source):
            wrong = str(self.rng.choice(self.empty_places(source)))
            yield self.think(seen, wrong, source), False
            self.shown += 1
            seen, self.pattern = PHRASES["empty"] + PHRASES["back"], "backtracked"
        yield self.think(seen, place, source), learn
        self.shown += 1
        if is_part:
            self.later = self.later[1:]
            self.parts[f"observation_{self.shown}"] = PLACES.index(place)
            return PLACES.index(place), None
        self.here = [(s, p[1:] if s == source else p) for s, p in self.here if s != source or len(p) > 1]
        return self.parts[source], PLACES.index(place)

    def view_part(self, part):
        """Read a view of one part: what is said, and the candidates noted. Returns (text, target overlooked)."""
        objects, colour = self.row["objects"], self.row["colour"]
        seen = objects
        overlooked = self.overlook and part == objects[0][0]
        if overlooked:
            seen, self.overlook = objects[1:], False
        places = places_with(seen, part, colour)
        if places:
            self.here.append((f"observation_{self.shown}", places))
        return describe_part(seen, part, colour), overlooked

    def turns(self):
        """Yield (text, learn) turn by turn until the answer."""
        row, self.parts = self.row, {}
        seen = describe_walls(row["walls"], row["colour"]) + self.plan()
        learn = True
        for turn in itertools.count(1):
            if turn == self.guess_at:
                self.pattern, asked = "guessed", SHAPES if row["answer"] in SHAPES else None
                guess = str(self.rng.choice(asked) if asked else self.rng.integers(10))
                seen += PHRASES["guess"].format(answer=guess)
                yield f"<think>{seen}</think><answer>{guess}</answer>", True
                return
            part, place = yield from self.look(seen, learn)
            learn = True
            if place is None:
                seen, overlooked = self.view_part(part)
                learn = not overlooked
            else:
                seen = describe_cell(row["objects"], part, place)
                found = [part, place] == row["objects"][0][:2]
                seen += PHRASES["verdict"].format(wanted=row["wanted"], verdict="Yes" if found else "No")
                if found and self.pattern == "recheck":
                    self.pattern = "rechecked"
                    source = next(s for s in reversed(self.parts) if self.parts[s] == part)
                    self.here, self.later = [(source, [PLACES[place]])], []
                    seen += PHRASES["check"]
                    continue
                if found:
                    seen += PHRASES["answer"].format(answer=row["answer"])
                    yield f"<think>{seen}</think><answer>{row['answer']}</answer>", True
                    return
            if not self.here and not self.later:
                seen += PHRASES["again"]
                self.later = self.ring()


def solve(row, index, root, prompts, max_turns, seed):
    """One trajectory: the teacher's turns, played through the real tool on the real image; where it guesses, the last of
    several ("attempts"). Returns a trajectory row."""
    rng = np.random.default_rng([seed, index])
    pattern = str(rng.choice(list(PATTERNS), p=list(PATTERNS.values())))
    image = tools.open_image(root / row["image"])
    for attempt in range(1, ATTEMPTS + 1):
        solved = play(row, pattern, rng, image, prompts, max_turns)
        if solved["pattern"] != "guess" or solved["reward"] == 1.0:
            break
    return {**solved, "attempts": attempt}


def play(row, pattern, rng, image, prompts, max_turns):
    """The scripted teacher's conversation about a question, with one search pattern. Returns a trajectory row."""
    views, turns, finish, prediction = [image], [], None, None
    teacher = Teacher(row, pattern, rng)
    for text, learn in teacher.turns():
        turn, finish, prediction = tools.take_turn(views, text, len(turns) + 1, max_turns, max_turns)
        turns.append(turn if learn else {**turn, "learn": False})
        if finish:
            break
    if teacher.pattern in ("recover", "backtrack", "guess"):
        pattern = teacher.order     # it had the answer before its mistake
    return {**trajectory(row, prompts, turns, finish, prediction, "scripted"), "pattern": pattern}


def trajectory(row, prompts, turns, finish, prediction, teacher):
    """The trajectory row of a conversation."""
    reward = float(tools.match_answer(prediction, row["answer"], row.get("options")))
    return {**tools.without_layout(row), "system": prompts["system"], "turns": turns, "finish": finish, "prediction": prediction,
            "reward": reward, "teacher": teacher}


def check_layout(row):
    """A question of the default world with its layout, as the scripted teacher needs it."""
    tools.check_question(row)
    objects, walls = row.get("objects"), row.get("walls")
    drawn = isinstance(objects, list) and objects and all(
        isinstance(o, list) and [type(v) for v in o] == [int, int, str, str, int] and 0 <= min(o[:2]) and max(o[:2]) < 9
        for o in objects)
    papered = isinstance(walls, list) and len(walls) == 9 and all(isinstance(wall, (str, type(None))) for wall in walls)
    if not drawn or not papered or not all(isinstance(row.get(key), str) for key in ("colour", "wanted")):
        raise tools.InputError("the scripted teacher needs questions with a layout ('objects', 'walls'), as build_data.py draws "
                               "them")


# ---------------------------------------------------------------------------------------------------------------------
# A served teacher

EXAMPLES_FOLLOW = ("\n\nFirst you see how others have answered questions like yours, each about an image of its own; "
                   "observations are numbered anew for every question. Then comes your question. Work in the same way: "
                   "look closer until you have seen the answer, and do not guess.")


def solved_examples(path, prompts, folder, count=6):
    """Trajectory rows to be shown to a teacher and the folder of their images: those of a file or, by default, the scripted
    teacher's, one for each of six search patterns, on images that are drawn into `folder`."""
    if path is not None:
        rows = tools.read_jsonl(path, tools.check_trajectory)
        if not rows:
            raise tools.InputError(f"{path} has no rows to be shown to the teacher")
        return rows, path.parent
    found, index = {}, 0
    while len(found) < count:
        level = ("easy", "medium", "hard")[index % 3]
        row = solve(make_question(("instruct", index, level), folder, 0), index, folder, prompts, 8, 0)
        if row["reward"] == 1.0 and row["pattern"] != "guess":
            found.setdefault(row["pattern"], row)
        index += 1
    return list(found.values()), folder


def show_examples(rows, root, client, prompts):
    """The messages that a teacher sees before its question: system prompt, then the solved examples turn by turn."""
    messages = [{"role": "system", "content": prompts["system"] + EXAMPLES_FOLLOW}]
    for row in rows:
        views, shown = tools.replay(row, tools.open_image(Path(root) / row["image"])), 0
        messages.append(client.show(tools.question_text(row, prompts), views[0]))
        for number, turn in enumerate(row["turns"], 1):
            messages.append({"role": "assistant", "content": turn["text"]})
            if number < len(row["turns"]):
                shown += "zoom" in turn
                messages.append(client.show(tools.reply_text(turn, number, shown, prompts), views[shown]))
    return messages


def solve_served(job, client, before, root, prompts, limits, seed):
    """One trajectory of a served teacher. Raises ServerError if the server gives no usable reply."""
    index, row = job
    rng = np.random.default_rng([seed, index])
    played = tools.play(client, row, tools.open_image(root / row["image"]), prompts, limits, int(rng.integers(2**31)), before,
                        cut=True)
    return trajectory(row, prompts, *played, client.name)


# ---------------------------------------------------------------------------------------------------------------------


def collect(rows, args, prompts, client=None, examples=()):
    """Solve all questions in parallel, each appended to a partial file at once so that a kill loses nothing. Returns (all
    trajectories in order, those that are correct). Questions that got no usable reply stay open for another run."""
    served = [args.teacher_model, args.max_turn_tokens, args.min_pixels, args.max_pixels, args.image_bytes, list(examples)]
    settings = json.dumps([rows, prompts, args.max_turns, args.seed, args.teacher, served if client else None])
    partial_path = args.out.with_name(f"{args.out.name}.{hashlib.sha256(settings.encode()).hexdigest()[:8]}.partial")
    done = {row["id"]: row for row in tools.complete_rows(partial_path)}     # another collection has another partial file
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tools.write_jsonl(partial_path, done.values())
    jobs = [(i, row) for i, row in enumerate(rows) if row["id"] not in done]
    common = {"root": args.data.parent, "prompts": prompts, "seed": args.seed}
    if client is None:
        results = parallel(partial(_solve, max_turns=args.max_turns, **common), jobs, args.workers, "collect", len(done))
    else:
        limits = types.SimpleNamespace(max_turns=args.max_turns, max_images=args.max_turns, max_turn_tokens=args.max_turn_tokens)
        work = partial(solve_served, client=client, before=examples, limits=limits, **common)
        played = tools.in_threads(client, work, jobs, args.requests)
        results = (row for _, row in tools.Progress(played, desc="collect", initial=len(done),
                                                    total=len(rows)))
    with partial_path.open("a", encoding="utf-8") as file:
        for row in results:
            if row is not None:
                done[row["id"]] = row
                file.write(tools.json_line(row))
                file.flush()
    done = [done[row["id"]] for row in rows if row["id"] in done]
    kept = [row for row in done if row["reward"] == 1.0]
    if kept:
        tools.write_jsonl(args.out, kept)
    if len(done) == len(rows):
        partial_path.unlink()
    return done, kept


def _solve(job, **settings):
    return solve(job[1], job[0], **settings)


def parse_args():
    parser = argparse.ArgumentParser(description="Collect correct trajectories of a teacher.")
    parser.add_argument("--data", type=Path, default=Path("data/train.jsonl"), help="questions (scripted: with their layout)")
    parser.add_argument("--out", type=Path, default=Path("data/coldstart.jsonl"), help="trajectories; in the folder of --data, "
                        "since image paths are relative to it")
    parser.add_argument("--teacher", default="scripted", help="who solves the questions: 'scripted', or the URL of an "
                        "OpenAI-compatible server (its key in the environment variable TEACHER_API_KEY)")
    parser.add_argument("--prompts", type=Path, help="JSON file with other system, question, observation and error texts; the "
                        "system text is stored in the rows")
    parser.add_argument("--max_turns", type=int, default=32, help="longer solutions are counted and left out")
    parser.add_argument("--limit", type=int, help="use only the first questions")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the scripted teacher")
    parser.add_argument("--seed", type=int, default=0, help="patterns and the teacher's choices")
    group = parser.add_argument_group("a served teacher (--teacher URL)")
    group.add_argument("--teacher_model", help="name of the model on that server")
    group.add_argument("--exemplars", type=Path, help="trajectory rows that are shown first (default: six of the default world)")
    group.add_argument("--requests", type=int, default=8, help="questions that are played at once")
    group.add_argument("--max_turn_tokens", type=int, default=1024, help="tokens per turn; a longer turn ends as void")
    tools.add_picture_flags(group)
    args = parser.parse_args()
    tools.check_flags(args, ("requests", "max_turn_tokens", "min_pixels", "max_pixels", "image_bytes"))
    if args.out.parent.resolve() != args.data.parent.resolve():
        raise tools.InputError(f"--out {args.out} must be in the folder of --data ({args.data.parent}), where the images are")
    if args.out.resolve() == args.data.resolve():
        raise tools.InputError(f"--out {args.out} would overwrite the questions in --data; choose another name")
    if min(args.workers, args.max_turns, 1 if args.limit is None else args.limit) < 1 or args.seed < 0:
        raise tools.InputError("--workers, --max_turns and --limit must be at least 1, --seed at least 0")
    return args


def main():
    args = parse_args()
    rows = tools.read_questions(args.data, "python build_data.py", check_layout if args.teacher == "scripted" else None)
    rows = rows[:args.limit]
    if not rows:
        raise tools.InputError(f"{args.data} has no rows; make it with: python build_data.py")
    prompts, client, examples = tools.load_prompts(args.prompts), None, []
    if args.teacher != "scripted":
        client = tools.ChatClient(args.teacher, args.teacher_model, "teacher", args.min_pixels, args.max_pixels, args.image_bytes)
        with tempfile.TemporaryDirectory() as folder:
            examples = show_examples(*solved_examples(args.exemplars, prompts, Path(folder)), client, prompts)
    done, kept = collect(rows, args, prompts, client, examples)
    print(f"teacher {args.teacher}: {len(done)} trajectories, {len(kept)} correct and kept, {len(done) - len(kept)} left out "
          f"({dict(collections.Counter(r['finish'] for r in done if r['reward'] != 1.0))})")
    again = sum(row.get("attempts", 1) - 1 for row in done)
    if again:
        print(f"asked again after a wrong guess: {again} times")
    if client is not None:
        tools.print_cost("teacher", [client.used[k] for k in tools.COSTS])
    for name, key in (("pattern", lambda r: r.get("pattern")), ("turns", lambda r: len(r["turns"]))):
        counts = collections.Counter(map(key, kept))
        if None not in counts:  # a served teacher follows no pattern of ours
            print(f"per {name}: " + ", ".join(f"{k}: {counts[k]}" for k in sorted(counts)))
    if len(done) < len(rows):
        raise tools.InputError(f"{len(rows) - len(done)} of {len(rows)} questions got no usable reply "
                               f"({client.failures()}); run the same command again to try just these")
    if not kept:
        raise tools.InputError(f"none of {len(done)} trajectories is correct; {args.out} is left as it is")


if __name__ == "__main__":
    tools.run(main)
