"""Collect cold-start trajectories: a teacher solves questions turn by turn; correct ones are kept.

The default teacher is scripted. It knows where every object lies, but it acts through the same zoom
tool and the same views as the policy. Each of its thoughts says what it sees, what is left to look
at, and where it goes next. This running list lets a small policy search for 32 turns: all that the
policy must remember is in its own last turn.

A model behind an OpenAI-compatible server can be the teacher instead (--teacher URL), as in the
paper. It is shown six solved questions, then plays each question through the tool. The code for it
is in extras/served.py.

Search strategies, one per trajectory, named in the row ("strategy"). All of them look at every cell
that may hold the target before they go to the next region:
    scan            the nine regions in reading order from a random start
    shuffle         the nine regions in random order
    hint            the regions with wallpaper of the colour first, then the others
    backtrack       zooms into a cell with nothing in it, says so, and returns to the candidates
    recover         makes a call that the tool refuses, and corrects it
    search_again    overlooks the target, finds nothing, and scans all nine regions again
    recheck         looks at the target twice before it answers
    guess           answers with a guess after 0 to 3 zooms, and calls it a guess.
                    Only correct guesses are kept, as with a real teacher: it tries again until the
                    guess is correct, MAX_ATTEMPTS times at most. The student learns to search, and
                    to guess now and then. RL has to unlearn the guessing

What differs from the Mini-o3 paper:
1. The paper prompts a VLM with six exemplars. The scripted teacher needs neither network nor GPU.
   A served teacher is shown trajectories of the scripted one, or those of --exemplars FILE.
2. What a served teacher writes after its call or answer is cut off. The exemplars are not part of
   the trajectory: the student learns to act without them.
3. Turns with a deliberate mistake (a cell with nothing in it, a refused call, an overlooked target)
   are marked "learn": false. The student sees them as context, and learns only the recovery.

Commands (CPU work; a GPU or more nodes change nothing):
    default     python collect_coldstart.py
    smaller     python collect_coldstart.py --limit 200 --out data/small.jsonl
    a teacher   TEACHER_API_KEY=... python collect_coldstart.py --teacher http://localhost:8000/v1
"""

import collections
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np

import tools
from build_data import (COLOURS, PHRASES, POSITIONS, SHAPES, colours_of, describe_cell,
                        describe_colour, describe_rest, map_in_processes, position_box,
                        positions_with)
from extras import terminal
from extras.images import check_images

# how often each strategy is drawn
STRATEGIES = {"scan": 0.13, "shuffle": 0.13, "hint": 0.26, "backtrack": 0.09, "recover": 0.09,
              "search_again": 0.04, "recheck": 0.04, "guess": 0.22}
MAX_ATTEMPTS = 10   # a guessed shape is correct once in 4 times, a guessed digit once in 10

# ---- The scripted teacher -----------------------------------------------------------------------
# An image has nine regions, a region has nine cells; POSITIONS names both. The thoughts of one
# trajectory, each with the state that it spells out after "In" and "Later". Its strategy is "hint",
# its question "What digit is on the green star?".
#
# 1. I see green walls in bottom-right. Hint. Later bottom-right top-left top ... Go bottom-right.
#        candidates: []
#        unseen_regions: [bottom-right, top-left, top, ...], all nine
# 2. I see green in top bottom-right. In observation_1 top bottom-right. Later top-left ... Go top.
#        candidates: [top, bottom-right]     candidate_source: observation_1
#        unseen_regions: [top-left, top, ...]
# 3. I see green square 3. Want star. No. In observation_1 bottom-right. Later top-left ...
#    Go bottom-right.
#        candidates: [bottom-right]          candidate_source: observation_1
# 4. I see green star 6. Want star. Yes. Answer 6.


class Teacher:
    """Searches for the target of one question, and writes the turns of that search.

    candidates: positions of the cells of the current region that may hold the target and have not
        been looked at.
    candidate_source: the observation that shows this region.
    candidate_region: its index.
    unseen_regions: positions of the regions that have not been looked at.
    pending_event: the strategy, until its mistake, second look or guess has happened; then None.
        "scan", "shuffle" and "hint" have no event, and it stays.
    order: how the regions are ordered, one of "scan", "shuffle" and "hint"."""

    def __init__(self, row, strategy, rng):
        self.row = row
        self.rng = rng
        self.pending_event = strategy
        self.num_observations = 0
        self.candidates = []
        self.candidate_source = None
        self.candidate_region = None
        self.observations_before_guess = int(rng.integers(4)) if strategy == "guess" else None
        # A strategy that is not an order of the regions needs one.
        if strategy in ("scan", "shuffle", "hint"):
            self.order = strategy
        elif strategy == "search_again":  # it visits all regions, in whatever order
            self.order = "hint"
        else:
            self.order = str(rng.choice(["hint", "scan", "shuffle"]))
        self.unseen_regions = self.regions_in_order()

    def regions_in_order(self):
        """Return the positions of all nine regions in the order of this search."""
        if self.order == "scan":
            return self.reading_order()
        if self.order == "shuffle":
            return [POSITIONS[index] for index in self.rng.permutation(9)]
        wallpaper_at = dict(zip(POSITIONS, self.row["wallpaper"]))
        # False sorts before True, and sorting keeps the reading order of equal ones.
        return sorted(POSITIONS, key=lambda position: wallpaper_at[position] != self.row["colour"])

    def reading_order(self):
        """Return the positions of all nine regions in reading order, from a random start."""
        first_region = int(self.rng.integers(9))
        return POSITIONS[first_region:] + POSITIONS[:first_region]

    def turns(self):
        """Yield (text, learn) turn by turn, up to the answer."""
        source = None  # what the newest view was cut from; the image was cut from nothing
        while True:
            # 1. Look at the newest view.
            is_true = True
            is_solved = False
            if source is None:
                observed_text = self.look_at_image()
            elif source == "original_image":  # a crop of the image is a region
                observed_text, is_true = self.look_at_region()
            else:  # a crop of a region is a cell
                observed_text, is_solved = self.look_at_cell()
            if is_solved:
                yield answer_turn(observed_text, self.row["answer"]), True
                return
            # 2. If nothing is left to look at, the target was overlooked. Scan all regions again.
            if not self.candidates and not self.unseen_regions:
                observed_text += PHRASES["again"]
                self.unseen_regions = self.reading_order()
            # 3. Strategy "guess" gives up after 0 to 3 observations.
            if self.num_observations == self.observations_before_guess:
                self.pending_event = None
                yield self.guess_turn(observed_text), True
                return
            # 4. Perhaps make a deliberate mistake on the way. It is never learned.
            source, position = self.next_view()
            mistaken_text = self.mistaken_turn(observed_text, source, position)
            if mistaken_text is not None:
                yield mistaken_text, False
                observed_text = self.notice_mistake()
            # 5. Zoom into the next view. The turn is learned unless it overlooks the target.
            yield self.zoom_turn(observed_text, source, position), is_true
            self.num_observations += 1

    def next_view(self):
        """Return (source, position) of the next zoom: candidates come before unseen regions."""
        if self.candidates:
            return self.candidate_source, self.candidates[0]
        return "original_image", self.unseen_regions[0]

    def zoom_turn(self, observed_text, source, position, call_json=None):
        """Return a turn's text: what it sees, what is left to look at, where it goes, and the call.
        call_json: a wrong call, instead of the zoom into that position."""
        thought = observed_text
        thought += describe_rest(self.candidate_source, self.candidates, self.unseen_regions)
        thought += PHRASES["go"].format(place=position)
        if call_json is None:
            call_json = json.dumps({"bbox_2d": position_box(position), "source": source})
        return f"<think>{thought}</think><grounding>{call_json}</grounding>"

    def mistaken_turn(self, observed_text, source, position):
        """Return a turn with the strategy's mistake, on the way to a position, or None. The mistake
        happens once; before every zoom it has a chance of 1/2."""
        if self.rng.random() >= 0.5:
            return None
        if self.pending_event == "recover":
            call_json = refused_call(self.rng, source, position, self.num_observations)
            return self.zoom_turn(observed_text, source, position, call_json)
        if self.pending_event == "backtrack" and self.candidates:
            # Cells without a colour are empty.
            cell_colours = colours_of(self.row["objects"], self.candidate_region)
            empty_positions = positions_with(None, cell_colours)
            if empty_positions:
                return self.zoom_turn(observed_text, source, str(self.rng.choice(empty_positions)))
        return None

    def notice_mistake(self):
        """Return what the teacher says after its mistake."""
        was_refused = self.pending_event == "recover"
        self.pending_event = None
        if was_refused:
            return PHRASES["sorry"]
        self.num_observations += 1  # the empty cell
        return PHRASES["empty"] + PHRASES["back"]

    def look_at_image(self):
        """Describe the wallpaper of the whole image and announce the order of the search."""
        description = describe_colour("wallpaper", self.row["colour"], self.row["wallpaper"])
        return description + PHRASES[self.order]

    def look_at_region(self):
        """Describe the first unseen region, note its candidates. Return (description, is_true)."""
        self.candidate_region = POSITIONS.index(self.unseen_regions.pop(0))
        self.candidate_source = f"observation_{self.num_observations}"
        # The first object is the target. Strategy "search_again" overlooks it once.
        noticed_objects = self.row["objects"]
        is_overlooked = (self.pending_event == "search_again"
                         and self.candidate_region == noticed_objects[0][0])
        if is_overlooked:
            self.pending_event = None
            noticed_objects = noticed_objects[1:]
        cell_colours = colours_of(noticed_objects, self.candidate_region)
        self.candidates = positions_with(self.row["colour"], cell_colours)
        description = describe_colour("region", self.row["colour"], cell_colours)
        return description, not is_overlooked

    def look_at_cell(self):
        """Describe the cell of the first candidate. Return (description, is_solved)."""
        # 1. Say what it holds, and whether this is what the question asks for.
        position = self.candidates.pop(0)
        cell_index = POSITIONS.index(position)
        is_target = [self.candidate_region, cell_index] == self.row["objects"][0][:2]
        description = describe_cell(self.row["objects"], self.candidate_region, cell_index)
        description += PHRASES["verdict"].format(wanted=self.row["target_attribute"],
                                                 verdict="Yes" if is_target else "No")
        if not is_target:
            return description, False
        # 2. Strategy "recheck" looks at the target a second time.
        if self.pending_event == "recheck":
            self.pending_event = None
            self.candidates = [position]
            self.unseen_regions = []
            return description + PHRASES["check"], False
        return description + PHRASES["answer"].format(answer=self.row["answer"]), True

    def guess_turn(self, observed_text):
        """Return a last turn that guesses a shape or a digit, whichever the question asks for."""
        if self.row["answer"] in SHAPES:
            guessed_answer = str(self.rng.choice(SHAPES))
        else:
            guessed_answer = str(self.rng.integers(10))
        return answer_turn(observed_text + PHRASES["guess"].format(answer=guessed_answer),
                           guessed_answer)


def answer_turn(thought, answer):
    """Return the text of a last turn."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def refused_call(rng, source, position, num_observations):
    """Return JSON of a call that the tool refuses. Small policies make such mistakes."""
    x0, y0, x1, y1 = position_box(position)
    missing_source = f"observation_{num_observations + int(rng.integers(1, 4))}"
    wrong_calls = [json.dumps({"bbox_2d": [x0, y0, x1, y1], "source": missing_source}),
                   json.dumps({"bbox_2d": [x1, y1, x0, y0], "source": source}),
                   json.dumps({"bbox_2d": [x0, y0, x1 + 1.0, y1], "source": source}),
                   json.dumps({"bbox_2d": [x0, y0, x1], "source": source}),
                   json.dumps({"bbox_2d": [x0, y0, x1, y1], "source": source})[:-1]]  # no brace
    return wrong_calls[rng.integers(len(wrong_calls))]


# ---- From a question to a trajectory ------------------------------------------------------------


def play(teacher, image, max_turns):
    """Play the teacher's turns through the real tool. Return (turns, finish_reason, prediction)."""
    views = [image]
    turns = []
    for text, learn in teacher.turns():
        # A turn adds one image at most, so that with this max_images its cap never binds.
        turn, finish_reason, prediction = tools.take_turn(
            views, text, turn_number=len(turns) + 1, max_turns=max_turns, max_images=max_turns)
        if not learn:
            turn["learn"] = False
        turns.append(turn)
        if finish_reason is not None:
            break
    return turns, finish_reason, prediction


def solve(job, root, prompts, max_turns, seed):
    """Return the scripted teacher's trajectory row for a question, correct or not. job: (index,
    question row). Its random choices depend on the seed and the index only."""
    question_index, row = job
    rng = np.random.default_rng([seed, question_index])
    drawn_strategy = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    image = tools.open_image(root / row["image"])
    for num_attempts in range(1, MAX_ATTEMPTS + 1):
        teacher = Teacher(row, drawn_strategy, rng)
        turns, finish_reason, prediction = play(teacher, image, max_turns)
        # A search that found the target before its mistake or its guess is named after its order.
        # (search_again and recheck happen at the target, so no correct search misses them.)
        is_plain_search = teacher.pending_event in ("recover", "backtrack", "guess")
        trajectory = trajectory_row(row, prompts, turns, finish_reason, prediction, "scripted")
        trajectory["strategy"] = teacher.order if is_plain_search else drawn_strategy
        trajectory["attempts"] = num_attempts
        # Only a wrong guess is tried again.
        if trajectory["strategy"] != "guess" or trajectory["reward"] == 1.0:
            break
    return trajectory


def trajectory_row(row, prompts, turns, finish_reason, prediction, teacher_name):
    """Return the trajectory row of a finished conversation about a question."""
    is_correct = tools.match_answer(prediction, row["answer"], row.get("options"))
    return {**tools.without_layout(row), "system": tools.system_text(row, prompts),
            "turns": turns, "finish_reason": finish_reason, "prediction": prediction,
            "reward": float(is_correct), "teacher": teacher_name}


def check_layout(row):
    """Raise InputError unless row is a question with the layout that the scripted teacher reads."""
    tools.check_question(row)
    objects = row.get("objects")
    wallpaper = row.get("wallpaper")
    has_objects = isinstance(objects, list) and len(objects) > 0 and all(map(is_object, objects))
    has_wallpaper = (isinstance(wallpaper, list) and len(wallpaper) == 9
                     and all(isinstance(colour, (str, type(None))) for colour in wallpaper))
    has_target = (isinstance(row.get("colour"), str) and row["colour"] in COLOURS
                  and isinstance(row.get("target_attribute"), str))
    tools.check(has_objects and has_wallpaper and has_target,
                "the scripted teacher needs questions with a layout ('objects', 'wallpaper'), as "
                "build_data.py draws them")


def is_object(value):
    """Return whether a value of a row is [region, cell, colour, shape, digit]."""
    if not isinstance(value, list) or [type(part) for part in value] != [int, int, str, str, int]:
        return False
    region, cell, colour, shape, _ = value
    return 0 <= region < 9 and 0 <= cell < 9 and colour in COLOURS and shape in SHAPES


# ---- The collection -----------------------------------------------------------------------------


def collect(rows, args, prompts, served_teacher=None):
    """Solve all questions and write the correct trajectories to --out.

    Return (all trajectories in the order of rows, the correct ones). A question without a usable
    reply of a served teacher has no trajectory. Another run of the same command tries it again."""
    # 1. Take over what an interrupted run of the same collection has finished. Other questions or
    #    settings have a journal of another name.
    settings = [rows, prompts, args.max_turns, args.seed]
    if served_teacher is not None:
        settings += served_teacher.settings
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    journal = tools.Journal(args.out.with_name(f"{args.out.name}.{digest}.partial"))
    trajectory_of = {trajectory["id"]: trajectory for trajectory in journal.rows}
    jobs = [(index, row) for index, row in enumerate(rows) if row["id"] not in trajectory_of]
    # 2. Solve the other questions. Each trajectory goes to disk as soon as it is finished.
    num_finished = len(trajectory_of)
    if served_teacher is None:
        solve_job = partial(solve, root=args.data.parent, prompts=prompts,
                            max_turns=args.max_turns, seed=args.seed)
        new_trajectories = map_in_processes(solve_job, jobs, args.workers, "collect", num_finished)
    else:
        new_trajectories = served_teacher.solve_all(jobs, num_finished)
    try:
        for trajectory in new_trajectories:
            trajectory_of[trajectory["id"]] = trajectory
            journal.add(trajectory)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(trajectory_of)} of {len(rows)} trajectories are saved; run "
                                "the same command again to continue") from None
    finally:
        if not trajectory_of:   # an error came before the first of them
            journal.path.unlink(missing_ok=True)
    # 3. Write the correct ones. If there are none, the old file stays.
    trajectories = [trajectory_of[row["id"]] for row in rows if row["id"] in trajectory_of]
    correct_ones = [trajectory for trajectory in trajectories if trajectory["reward"] == 1.0]
    if correct_ones:
        tools.write_jsonl(args.out, correct_ones)
    if len(trajectories) == len(rows):
        journal.path.unlink(missing_ok=True)    # a second run of the same command may be faster
    return trajectories, correct_ones


def print_summary(trajectories, correct_ones, args, served_teacher):
    """Print how many trajectories are kept, how the others ended, and what the file contains."""
    left_out = collections.Counter(trajectory["finish_reason"] for trajectory in trajectories
                                   if trajectory["reward"] != 1.0)
    print(f"teacher {args.teacher}: {len(trajectories)} trajectories, {len(correct_ones)} correct "
          f"and kept, {left_out.total()} left out ({dict(left_out)})")
    if served_teacher is None:
        num_retries = sum(trajectory["attempts"] - 1 for trajectory in trajectories)
        if num_retries:
            print(f"asked again after a wrong guess: {num_retries} times")
        print_counts("strategy", [trajectory["strategy"] for trajectory in correct_ones])
    else:
        served_teacher.print_cost()
    print_counts("turns", [len(trajectory["turns"]) for trajectory in correct_ones])


def print_counts(name, values):
    """Print how often each value occurs."""
    counts = sorted(collections.Counter(values).items())
    print(f"per {name}: " + ", ".join(f"{value}: {count}" for value, count in counts))


def parse_args():
    """Return the flags. Raise InputError for values that cannot be right."""
    parser = terminal.make_parser("Collect correct trajectories of a teacher.")
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/train.jsonl"),
        help="questions; the scripted teacher needs their layout")
    add("--out", type=Path, default=Path("data/coldstart.jsonl"),
        help="trajectories; in the folder of --data, since image paths are relative to it")
    add("--teacher", default="scripted", help="'scripted', or the URL of an OpenAI-compatible "
        "server, whose key is in the environment variable TEACHER_API_KEY")
    add("--prompts", type=Path, help="JSON file with other system, question, observation and "
        "error texts; the system text is stored in the rows (default: tools.PROMPTS)")
    add("--max_turns", type=int, default=32, help="longer solutions are counted and left out")
    add("--limit", type=int, help="use only the first questions (default: all)")
    add("--workers", type=int, default=os.cpu_count(), help="processes of the scripted teacher")
    add("--seed", type=int, default=0, help="of the strategies and the teacher's choices")
    add = parser.add_argument_group("a served teacher (--teacher URL)").add_argument
    add("--teacher_model", help="name of the model on that server (default: its only one)")
    add("--exemplars", type=Path, help="trajectory rows that are shown to the teacher (default: "
        "six of the scripted teacher)")
    add("--requests", type=int, default=8, help="questions that are played at the same time")
    add("--max_new_tokens", type=int, default=1024, help="per turn; a longer turn ends as void")
    add("--min_pixels", type=int, default=40_000, help="size of the smallest picture sent")
    add("--max_pixels", type=int, default=2_000_000, help="size of the largest picture sent")
    add("--max_image_bytes", type=int, default=1_500_000, help="pictures of more bytes are sent "
        "as JPEG, and made smaller if that is not enough")
    args = parser.parse_args()
    terminal.check_number_flags(args, may_be_zero=("seed",))
    if args.teacher == "scripted":
        served_flags = ["teacher_model", "exemplars", "requests", "max_new_tokens", "min_pixels",
                        "max_pixels", "max_image_bytes"]
        terminal.check_unused(args, parser, served_flags, "without --teacher URL")
    else:
        terminal.check_unused(args, parser, ["workers"], "with --teacher URL: it has --requests")
    tools.check(args.min_pixels <= args.max_pixels, "--max_pixels must be at least --min_pixels")
    tools.check(args.out.parent.resolve() == args.data.parent.resolve(), f"--out {args.out} must "
                f"be in the folder of --data ({args.data.parent}), where the images are")
    tools.check(args.out.resolve() != args.data.resolve(), f"--out {args.out} would overwrite the "
                "questions in --data; choose another name")
    return args


def main():
    """Collect trajectories and print what came of the questions."""
    # 1. Read the questions. Only the scripted teacher needs to know where the objects lie.
    args = parse_args()
    is_scripted = args.teacher == "scripted"
    check_row = check_layout if is_scripted else tools.check_question
    rows = tools.read_questions(args.data, check_row, hint="python build_data.py")
    rows = rows[:args.limit]
    tools.check(rows, f"{args.data} has no rows; make it with: python build_data.py")
    check_images(args.data, rows)
    prompts = tools.load_prompts(args.prompts)
    # 2. Let the teacher solve them.
    served_teacher = None
    if not is_scripted:
        from extras.served import make_teacher
        # Functions are handed over, since extras must not import this file, which is running.
        served_teacher = make_teacher(args, prompts, solve, trajectory_row)
    trajectories, correct_ones = collect(rows, args, prompts, served_teacher)
    print_summary(trajectories, correct_ones, args, served_teacher)
    # 3. Say what is missing.
    num_open = len(rows) - len(trajectories)
    if num_open:
        raise tools.InputError(f"{num_open} of {len(rows)} questions got no usable reply "
                               f"({served_teacher.client.failures()}); run the same command again "
                               "to try just these")
    tools.check(correct_ones, f"none of {len(trajectories)} trajectories is correct; {args.out} is "
                "not written")


if __name__ == "__main__":
    terminal.run(main)
