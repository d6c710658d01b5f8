"""Specification of the agent's world: what a turn means, which pixels a zoom returns, when a
conversation ends, how rows are read and written, and when an answer counts as right.

Whatever a model writes ends in a crop, an answer or one sentence that it can act on; nothing it
writes raises.
"""

import json
import math
import random
import sys
import time

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import tools
from conftest import ChatServer, picture_of

WHOLE = [0.0, 0.0, 1.0, 1.0]


def call_text(box, source="original_image"):
    return f"<grounding>{json.dumps({'bbox_2d': box, 'source': source})}</grounding>"


def picture(width, height):
    """Every pixel tells where it is: red its column, green its row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def corners(crop):
    """(left, top, right, bottom) in pixels of the `picture` that a crop was cut from, right and
    bottom exclusive."""
    pixels = np.asarray(crop)
    (left, top), (right, bottom) = pixels[0, 0, :2].tolist(), pixels[-1, -1, :2].tolist()
    assert crop.size == (right - left + 1, bottom - top + 1)
    return left, top, right + 1, bottom + 1


def is_sentence(error):
    short = isinstance(error, str) and len(error) < 200 and error.endswith(".")
    return short and ". " not in error and "\n" not in error


# -------------------------------------------------------------------------------------------------
# parse_turn


def test_the_four_kinds_of_turn():
    zoom = {"bbox_2d": [0.25, 0.0, 0.5, 1.0], "source": "observation_3"}
    assert tools.parse_turn("<think>there</think>"
                            + call_text([0.25, 0, 0.5, 1], "observation_3")) == ("zoom", zoom)
    assert tools.parse_turn("<think>seen</think><answer> red \n</answer>") == ("answer", "red")
    assert tools.parse_turn("I do not know.") == ("void", None)
    kind, sentence = tools.parse_turn("<grounding>zoom in!</grounding>")
    assert kind == "error" and is_sentence(sentence) and "JSON" in sentence


@pytest.mark.parametrize("text, expected", [
    ("<think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<think>a</think><think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<answer>2</answer><think>too late", ("answer", "2")),
    ("<think><answer>1</answer>", ("void", None)),  # an unclosed thought runs to the end
    ("<think>a</think> b <think><answer>1</answer>", ("void", None)),
    ("</think><answer>2</answer>", ("answer", "2")),                          # thinking is optional
    ("<think>two\nlines</think>\n<answer>2\n3</answer>", ("answer", "2\n3")),
    # what a thought tears apart is no tag, and a tag that closes in a thought is not closed
    ("<ans<think>x</think>wer>7</answer>", ("void", None)),
    ("<answer>7<think></answer>", ("void", None)),
])
def test_thoughts_are_ignored(text, expected):
    assert tools.parse_turn(text) == expected


def test_the_first_complete_tag_wins():
    zoom = ("zoom", {"bbox_2d": WHOLE, "source": "original_image"})
    assert tools.parse_turn(call_text(WHOLE) + "<answer>7</answer>") == zoom
    assert tools.parse_turn("<answer>7</answer>" + call_text(WHOLE)) == ("answer", "7")
    assert tools.parse_turn("<answer>7</answer><answer>8</answer>") == ("answer", "7")
    # the call is never closed
    assert tools.parse_turn("<grounding>{<answer>7</answer>") == ("answer", "7")
    assert tools.parse_turn("<answer>7</grounding>") == ("void", None)
    assert tools.parse_turn("</answer><answer>") == ("void", None)
    assert tools.parse_turn("<answer></answer>") == ("answer", "")
    nested = "<answer>x<grounding>{}</grounding></answer>"     # first is what opens first
    assert tools.parse_turn(nested) == ("answer", "x<grounding>{}</grounding>")
    # it ends where the closing tag does, in the text with its thoughts
    said = "<think>Is it <answer>1</answer>?</think><answer>7</answer>"
    assert tools.first_tag(said + " More.") == ("answer", "7", len(said))


@pytest.mark.parametrize("box", [
    "[NaN, 0, 1, 1]", "[0, 0, NaN, 1]", "[0, 0, Infinity, 1]", "[0, -Infinity, 1, 1]",
    "[0, 0, 1e999, 1]",
    "[false, 0, 1, 1]", "[0, 0, true, true]", '["0", "0", "1", "1"]', "[null, 0, 1, 1]",
    "[[0], 0, 1, 1]",
    "[0, 0, 1]", "[0, 0, 1, 1, 1]", "[]", "{}", '"0011"', "null", "1",
    "[0.5, 0, 0.5, 1]", "[0, 0.5, 1, 0.5]", "[0.6, 0, 0.4, 1]", "[0, 0, 1, 1.0001]",
    "[-0.1, 0, 1, 1]", "[1, 1, 1, 1]",
    "[0, 0, 1" + "0" * 400 + ", 1]", "[0, 0, " + "9" * 5000 + ", 1]",
    "[-" + "9" * 4000 + ", 0, 1, 1]",
    "[" * 100_000, "[" * 100_000 + "]" * 100_000,
], ids=lambda box: box[:24])
def test_boxes_that_are_refused(box):
    call = '{"bbox_2d": %s, "source": "original_image"}' % box
    kind, sentence = tools.parse_turn(f"<grounding>{call}</grounding>")
    assert kind == "error" and is_sentence(sentence)


@pytest.mark.parametrize("source", ["observation_0", "observation_01", "observation_",
                                    "observation_-1", "observation_1.0",
                                    "observation_1234567", "Original_image", "original_image ",
                                    "observation_٣", "", "🦊",
                                    "observation_1\n", 1, None, True, ["original_image"],
                                    {"original_image": 0}])
def test_sources_that_are_refused(source):
    kind, sentence = tools.parse_turn(call_text(WHOLE, source))
    assert kind == "error" and is_sentence(sentence)
    assert "source" in sentence and "JSON" not in sentence


@pytest.mark.parametrize("body",
                         ["", " ", "[]", "7", "null", "[0, 0, 1, 1]", '{"bbox_2d": [0, 0, 1, 1]}',
                                  '{"source": "original_image"}',
                                  "{'bbox_2d': [0, 0, 1, 1], 'source': 'original_image'}",
                                  '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"',
                                  '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"} {}',
                                  "\ud800", "\x00",
                                  # not guessed at: words around it, a trailing comma, a fence
                                  *(form % '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"}'
                                    for form in ("Zoom: %s", "%s,", "```json\n%s\n```", "[%s]")),
                                  '{"bbox_2d": [0, 0, 1, 1,], "source": "original_image"}',
                                  '{"": "\n", "bbox_2d": [0, 0, 1, 1], "source": "observation_1"}'])
def test_calls_that_are_refused(body):
    kind, sentence = tools.parse_turn(f"<grounding>{body}</grounding>")
    assert kind == "error" and is_sentence(sentence)


def test_calls_that_are_accepted():
    """JSON is JSON: white space, further keys and integers are no mistakes, and the result is four
    plain floats."""
    kind, call = tools.parse_turn('<grounding>\n{"label": "a fox", "bbox_2d": [0, 0.5, 1, 1], '
                                  '"source": "observation_12"}\n</grounding>')
    assert (kind, call) == ("zoom", {"bbox_2d": [0.0, 0.5, 1.0, 1.0], "source": "observation_12"})
    assert all(type(v) is float for v in call["bbox_2d"])


# -------------------------------------------------------------------------------------------------
# zoom


@pytest.mark.parametrize("size, box, expected", [
    ((100, 50), [0, 0, 1, 1], (0, 0, 100, 50)),
    # 0.75 x 50 = 37.5: the far corner is ceiled
    ((100, 50), [0.25, 0.5, 0.5, 0.75], (25, 25, 50, 38)),
    ((10, 10), [0.19, 0.11, 0.21, 0.99], (1, 1, 3, 10)),          # the near corner is floored
    ((10, 10), [0.55, 0.55, 0.56, 0.56], (5, 5, 6, 6)),  # less than a pixel: the pixel it lies in
    # a box never loses a pixel that it touches
    ((3, 3), [0.333, 0.333, 0.667, 0.667], (0, 0, 3, 3)),
    ((90, 90), [0.333, 0.0, 0.667, 0.333], (29, 0, 61, 30)),      # 29.97 and 60.03
    ((1, 1), [0.4, 0.4, 0.6, 0.6], (0, 0, 1, 1)),
    ((200, 1), [0, 0, 1, 1], (0, 0, 200, 1)),  # an aspect ratio of 200 is still allowed
    ((2, 250), [0, 0, 1, 0.004], (0, 0, 2, 1)),     # narrow in fractions, not in pixels
    ((250, 250), [5e-324, 0, 1 - 2**-53, 1], (0, 0, 250, 250)),
])
def test_zoom_returns_exactly_these_pixels(size, box, expected):
    assert corners(tools.zoom([picture(*size)],
                              {"bbox_2d": box, "source": "original_image"})) == expected


def test_zoom_into_an_observation_uses_its_native_pixels():
    """Crops of crops add up to places in the original: nothing is resized on the way."""
    views = [picture(200, 100)]
    views.append(tools.zoom(views, {"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "original_image"}))
    views.append(tools.zoom(views, {"bbox_2d": [0.1, 0.2, 0.3, 0.4], "source": "observation_1"}))
    views.append(tools.zoom(views, {"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "observation_2"}))
    views.append(tools.zoom(views, {"bbox_2d": [0.0, 0.0, 0.1, 0.1], "source": "original_image"}))
    assert [corners(v) for v in views] == [(0, 0, 200, 100), (100, 50, 200, 100),
                                           (110, 60, 130, 70), (120, 65, 130, 70),
                                           (0, 0, 20, 10)]


def test_a_box_between_two_neighbouring_floats_still_holds_a_pixel():
    """1/3 and the next float both round to pixel 1 of 3: the crop must not be empty in either
    direction."""
    thin = [0.3333333333333333, 0.33333333333333337]
    crop = tools.zoom([picture(3, 3)],
                      {"bbox_2d": [thin[0], thin[0], thin[1], thin[1]], "source": "original_image"})
    assert min(crop.size) >= 1


@pytest.mark.parametrize("box, source, word", [
    (WHOLE, "observation_2", "observation_2"), (WHOLE, "observation_999999", "observation_999999"),
    ([0, 0, 1, 0.001], "original_image", "narrow"), ([0, 0, 0.001, 1], "original_image", "narrow"),
    ([0, 0, 2, 1], "original_image", "x1 <= 1")])
def test_zoom_refuses_with_one_sentence(box, source, word):
    with pytest.raises(tools.ToolError) as error:
        tools.zoom([picture(250, 250), picture(2, 2)], {"bbox_2d": box, "source": source})
    assert is_sentence(str(error.value)) and word in str(error.value)


def test_how_narrow_a_box_may_be():
    """Its longer side has 200 times the pixels of its shorter one at most, whatever its source."""
    for size in ((1, 200), (200, 1), (2, 400)):
        call = {"bbox_2d": WHOLE, "source": "original_image"}
        assert tools.zoom([picture(*size)], call).size == size
    for size in ((1, 201), (201, 1), (2, 500)):
        with pytest.raises(tools.ToolError, match="narrow"):
            tools.zoom([picture(*size)], {"bbox_2d": WHOLE, "source": "original_image"})


# -------------------------------------------------------------------------------------------------
# One hundred thousand turns that a confused model might write


def strange_number(rng):
    edge = rng.randrange(1, 39) / 39
    return rng.choice([0, 1, 0.5, rng.random(), rng.random(), rng.random(), -rng.random(),
                       1 + rng.random(), -0.0, 5e-324,
                       edge, math.nextafter(edge, 1), 1 - 2**-53, math.nan, math.inf, -math.inf,
                       10**400, -10**20,
                       True, None, "0.5", "１", [0.5], [[0.1]], {"x": 0.1}, "🦊"])


def strange_box(rng):
    kind = rng.randrange(8)
    if kind < 4:  # in order, most of them legal
        x0, x1 = sorted([rng.random(), rng.random()])
        y0, y1 = sorted([rng.random(), rng.random()])
        return [[x0, y0, x1, y1], [x1, y0, x0, y1], [x0, y1, x1, y0], [x0, y0, x1, y1]][kind]
    if kind == 4:  # next to nothing, at the edge of a pixel
        x, y = (rng.randrange(1, 39) / 39 for _ in range(2))
        return [x, y, math.nextafter(x, 1), math.nextafter(y, 1)]
    if kind == 5:
        return strange_number(rng)
    return [strange_number(rng) for _ in range(rng.choice([4, 4, 4, 4, 3, 5, 0]))]


def strange_turn(rng):
    source = rng.choice(["original_image"] * 4 + ["observation_1", "observation_2"] * 2
                        + ["observation_0", "observation_3", "observation_99", "image",
                           "ｏbservation_1", 1, None])
    call = json.dumps({"bbox_2d": strange_box(rng), "source": source},
                      ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15:  # spoil a character, or cut the call
        at = rng.randrange(len(call))
        spoilt = rng.choice(["", "}", "]", "\\", "\x00", "é", "<", "</think>"])
        call = call[:at] + spoilt + call[at + rng.choice([0, 1, 200]):]
    parts = ["<answer>7</answer>", "<answer>", "</answer>", "<grounding>", "<think>", "</think>",
             "<think>x</think>",
             "🦊\u2028\ud800", ""] + [f"<grounding>{call}</grounding>"] * 6
    return "".join(rng.choice(parts) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def test_whatever_a_model_writes_ends_in_a_crop_an_answer_or_a_sentence():
    rng, views = random.Random(0), [picture(39, 39), picture(20, 5), picture(1, 1)]
    counts = dict.fromkeys(["crop", "error", "answer", "void"], 0)
    for _ in range(100_000):
        text, now = strange_turn(rng), list(views)
        kind, _ = tools.parse_turn(text)
        turn, finish, prediction = tools.take_turn(now, text, 1, 9, 9)
        assert turn["text"] == text
        if finish is not None:
            assert kind == finish and now == views and turn == {"text": text}
            assert (finish == "void") == (prediction is None)
            counts[finish] += 1
        elif "zoom" in turn:
            assert kind == "zoom" and len(now) == 4 and "error" not in turn
            assert min(now[3].size) >= 1 and all(a <= b
                                                 for a, b in zip(now[3].size, views[0].size)), text
            counts["crop"] += 1
        else:
            assert now == views and is_sentence(turn["error"]), (text, turn)
            counts["error"] += 1
    assert min(counts.values()) > 4000  # every way out was taken


# -------------------------------------------------------------------------------------------------
# take_turn and replay


def test_a_conversation_until_its_answer():
    views = [picture(90, 90)]
    first, finish, _ = tools.take_turn(views, call_text([0, 0, 0.5, 0.5]), 1, 3, 3)
    assert finish is None and first == {"text": call_text([0, 0, 0.5, 0.5]),
                                        "zoom": {"bbox_2d": [0.0, 0.0, 0.5, 0.5],
                                                 "source": "original_image"}}
    assert corners(views[1]) == (0, 0, 45, 45)
    second, finish, _ = tools.take_turn(views, call_text(WHOLE, "observation_2"), 2, 3, 3)
    assert finish is None and second["error"] == "There is no observation_2 yet."
    assert "zoom" not in second
    assert len(views) == 2  # a refused call shows nothing
    # answering on the last turn is in time
    third = tools.take_turn(views, "<answer>7</answer>", 3, 3, 3)
    assert third == ({"text": "<answer>7</answer>"}, "answer", "7")


def test_void_ends_the_conversation():
    assert tools.take_turn([picture(9, 9)], "hm", 1, 3, 3) == ({"text": "hm"}, "void", None)
    # void, not over_turn: it asked for nothing
    assert tools.take_turn([picture(9, 9)], "hm", 3, 3, 3)[1] == "void"


def test_a_turn_at_the_turn_cap_keeps_its_refused_zoom():
    views = [picture(9, 9)]
    turn, finish, prediction = tools.take_turn(views, call_text(WHOLE), 3, 3, 99)
    assert turn["zoom"]["bbox_2d"] == WHOLE and (finish, prediction) == ("over_turn", None)
    assert len(views) == 1
    turn, finish, _ = tools.take_turn(views, call_text([0, 0, 0, 0]), 3, 3, 99)
    assert finish == "over_turn" and is_sentence(turn["error"])


def test_a_turn_at_the_image_cap_keeps_its_refused_zoom():
    """The cap counts the original: with 2 images there is one zoom. A refused call needs no image
    and goes on."""
    views = [picture(9, 9)]
    assert tools.take_turn(views, call_text(WHOLE), 1, 99, 2)[1] is None and len(views) == 2
    turn, finish, _ = tools.take_turn(views, call_text(WHOLE, "observation_1"), 2, 99, 2)
    assert finish == "over_turn" and turn["zoom"]["source"] == "observation_1" and len(views) == 2
    assert tools.take_turn(views, call_text([0, 0, 0, 0]), 2, 99, 2)[1] is None


def test_what_a_turn_leads_to_by_what_it_asks_for(monkeypatch):
    """However it is read, and however a crop is made: both are replaced here."""
    call = {"bbox_2d": WHOLE, "source": "original_image"}
    asked = {"a": ("answer", "7"), "v": ("void", None), "e": ("error", "No."), "z": ("zoom", call),
             "n": ("answer", "")}

    def crop(views, call):
        if len(views) > 2:
            raise tools.ToolError("Too far.")
        return "crop"

    monkeypatch.setattr(tools, "parse_turn", asked.__getitem__)
    monkeypatch.setattr(tools, "zoom", crop)
    views = ["image"]
    zoomed, refused = {"text": "z", "zoom": call}, {"text": "e", "error": "No."}
    assert tools.take_turn(views, "z", 1, 3, 3) == (zoomed, None, None)
    assert views == ["image", "crop"]
    assert tools.take_turn(views, "e", 2, 3, 3) == (refused, None, None)
    assert tools.take_turn(views, "a", 3, 3, 3) == ({"text": "a"}, "answer", "7")   # in time
    assert tools.take_turn(views, "v", 3, 3, 3) == ({"text": "v"}, "void", None)
    assert tools.take_turn(views, "n", 1, 3, 3) == ({"text": "n"}, "answer", "")
    assert tools.take_turn(views, "e", 4, 3, 9) == (refused, "over_turn", None)
    assert tools.take_turn(views, "z", 1, 9, 1) == (zoomed, "over_turn", None)
    assert tools.take_turn(views, "z", 3, 3, 9) == (zoomed, "over_turn", None)
    assert tools.take_turn(views, "e", 3, 3, 9) == (refused, "over_turn", None)
    assert tools.take_turn(views, "z", 1, 9, 2) == (zoomed, "over_turn", None)  # no image is left
    assert tools.take_turn(views, "e", 1, 9, 2) == (refused, None, None)        # needs none
    assert views == ["image", "crop"]
    views.append("another")
    assert tools.take_turn(views, "z", 1, 9, 9) == ({"text": "z", "error": "Too far."}, None, None)


def test_replay_shows_what_the_model_was_shown():
    views, turns = [picture(90, 60)], []
    texts = [call_text([0, 0, 0.5, 0.5]), call_text(WHOLE, "observation_7"),
             call_text([0.5, 0.5, 1, 1], "observation_1"),
             call_text(WHOLE)]
    for number, text in enumerate(texts, 1):
        turn, finish, _ = tools.take_turn(views, text, number, 4, 99)
        turns.append(turn)
    assert finish == "over_turn"
    again = tools.replay({"id": "x", "turns": turns}, picture(90, 60))
    assert [corners(v) for v in again] == [corners(v) for v in views] == [(0, 0, 90, 60),
                                                                          (0, 0, 45, 30), (22, 15,
                                                                                           45, 30)]


def test_replay_of_an_impossible_zoom_names_the_trajectory():
    turns = [{"text": "", "zoom": {"bbox_2d": WHOLE, "source": "observation_1"}}, {"text": ""}]
    with pytest.raises(tools.InputError, match="fox, turn 1: There is no observation_1 yet"):
        tools.replay({"id": "fox", "turns": turns}, picture(9, 9))


# -------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("size, limits, expected", [
    ((84, 84), (6000, 8000), (84, 84)),
    ((756, 756), (6000, 8000), (84, 84)),         # 89.4 fits three times 28
    ((56, 56), (6000, 8000), (84, 84)),           # 77.5 is rounded up, so that the area is reached
    ((85, 83), (6000, 8000), (84, 84)),
    ((1000, 500), (3136, 1_000_000), (1008, 504)),
    ((2000, 1000), (3136, 1_000_000), (1400, 700)),
    ((100, 20), (6272, 1_000_000), (196, 56)),    # 177.1 x 35.4
    ((10, 1000), (100, 1_000_000), (28, 1008)),   # no side is below one factor
    ((100, 100), (100, 500), (28, 28)),
    ((90, 80), (100, 7056), (84, 84)), ((84, 84), (7056, 7056), (84, 84)),   # exactly a limit
    ((5000, 30), (784, 10_000), (336, 28)),  # 1290.99 x 7.7: 28 high, so 10000 / 28 = 357.1 wide
])
def test_sizes_that_the_model_sees_by_hand(size, limits, expected):
    assert tools.resize_for_model(Image.new("RGB", size), *limits).size == expected


def test_sizes_agree_with_qwens_own_processor():
    """For sides of 17 pixels and more, where Qwen's rounding does not give a side of 0. A strip
    that would exceed the limit there, since its short side cannot shrink, keeps it here."""
    rng = random.Random(0)
    for _ in range(400):
        width = int(17 * 100 ** rng.random())
        height = min(1700, max(17, int(width * 30 ** rng.uniform(-1, 1))))
        limits = rng.choice([(3136, 50_000), (6000, 8000), (40_000, 200_000), (784, 300_000)])
        factor = rng.choice([28, 32])
        theirs = smart_resize(height, width, factor, *limits)
        ours = tools.resize_for_model(Image.new("L", (width, height)), *limits, factor)
        if min(theirs) > factor or theirs[0] * theirs[1] <= limits[1]:
            assert ours.size == theirs[::-1], (width, height, limits, factor)
        else:
            assert min(ours.size) == factor
            assert limits[1] - factor**2 < ours.width * ours.height <= limits[1]


def test_resizing_keeps_a_fitting_image_and_repeats_nothing():
    image = picture(84, 84)
    assert tools.resize_for_model(image, 6000, 8000) is image
    once = tools.resize_for_model(picture(250, 100), 6000, 8000)
    assert tools.resize_for_model(once, 6000, 8000) is once


@pytest.mark.parametrize("content", [None, b"", b"not an image", "truncated"])
def test_an_unreadable_image_is_one_line(tmp_path, content):
    path = tmp_path / "fox.png"
    if content == "truncated":
        picture(200, 200).save(path)
        content = path.read_bytes()[:300]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tools.InputError, match="fox.png") as error:
        tools.open_image(path)
    assert "\n" not in str(error.value)
    assert ("missing" if content is None else "not a readable image") in str(error.value)


def test_every_image_becomes_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        Image.new(mode, (5, 4)).save(tmp_path / "x.tiff")
        image = tools.open_image(tmp_path / "x.tiff")
        assert (image.mode, image.size) == ("RGB", (5, 4))


def test_an_image_is_opened_as_a_viewer_shows_it(tmp_path):
    photo = Image.new("RGB", (4, 2), "red")
    photo.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6        # the camera was held upright: turn the stored pixels clockwise
    photo.save(tmp_path / "x.png", exif=exif)
    shown = tools.open_image(tmp_path / "x.png")
    assert shown.size == (2, 4)
    assert (shown.getpixel((1, 0)), shown.getpixel((0, 0))) == ((0, 0, 255), (255, 0, 0))

    for name, kind in (("x.png", "<u2"), ("x.tiff", "<u2"), ("x.tiff", ">u2")):
        Image.fromarray(np.full((3, 3), 127 * 256 + 9).astype(kind)).save(tmp_path / name)
        assert tools.open_image(tmp_path / name).getpixel((1, 1)) == (127, 127, 127)

    for mode, hidden in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        Image.new(mode, (3, 3), hidden).save(tmp_path / "x.png")
        assert tools.open_image(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255)


def test_a_photo_whose_orientation_cannot_be_read_is_one_line(tmp_path):
    """The pixels are fine, but the type of the first EXIF entry is 0."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.jpg", exif=exif)
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    data[data.index(b"Exif\0\0") + 6 + 11] = 0
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(tools.InputError, match="x.jpg: not a readable image"):
        tools.open_image(tmp_path / "x.jpg")


def test_a_journal_keeps_every_whole_line(tmp_path):
    """A line that was cut goes; two processes that write the same file lose nothing; damage is
    named."""
    path = tmp_path / "new" / "a.jsonl"
    first = tools.Journal(path)
    first.add({"n": 1}, {"n": 2})
    with path.open("a") as file:
        file.write('{"n": 3')
    second = tools.Journal(path)
    assert first.rows == [] and second.rows == [{"n": 1}, {"n": 2}]
    first.add({"n": 4})
    second.add({"n": 5})
    other = tools.Journal(tmp_path / "b.jsonl", [path])
    assert other.rows == [{"n": n} for n in (1, 2, 4, 5)]
    for damaged in (b"{\n", b"[" * 100_000 + b"\n", b"\xff\n"):
        path.write_bytes(damaged)
        with pytest.raises(tools.InputError, match="a.jsonl: damaged"):
            tools.Journal(path)
    half = Image.new("P", (3, 3), 1)
    half.putpalette([0, 0, 0, 200, 0, 0])
    half.save(tmp_path / "x.gif", transparency=1)
    assert tools.open_image(tmp_path / "x.gif").getpixel((1, 1)) == (255, 255, 255)


# -------------------------------------------------------------------------------------------------
# JSONL


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"id": "1", "text": "🦊 é\n\u2028 \"quoted\"", "box": [0.1, 1 / 3], "none": None},
            {"id": "2"}]
    tools.write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert tools.read_jsonl(tmp_path / "deep" / "rows.jsonl") == rows
    assert (tmp_path / "deep" / "rows.jsonl").read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '{"a": NaN}', '{"a": -Infinity}',
                                  '{"a": 1} {"b": 2}', "\ufeff{}",
                                  "[" * 100_000], ids=lambda line: line[:12])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ok": 1}\n\n' + line + '\n{"ok": 2}\n', encoding="utf-8")
    with pytest.raises(tools.InputError) as error:
        tools.read_jsonl(path)
    assert f"{path}:3:" in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_fails_its_check_is_named(tmp_path):
    tools.write_jsonl(tmp_path / "q.jsonl", [question(), question(answer="")])
    with pytest.raises(tools.InputError, match=r"q.jsonl:2: field 'answer' must"):
        tools.read_jsonl(tmp_path / "q.jsonl", tools.check_question)


def test_a_missing_file_says_which_command_makes_it(tmp_path):
    with pytest.raises(tools.InputError,
                       match="rows.jsonl does not exist; make it with: python fox.py"):
        tools.read_jsonl(tmp_path / "rows.jsonl", hint="python fox.py")


def test_writing_is_all_or_nothing(tmp_path):
    """A writer that fails half-way, at a row that cannot be stored or by itself, leaves the old
    file and nothing else."""
    def interrupted():
        yield {"id": "1"}
        raise KeyboardInterrupt
    path = tmp_path / "rows.jsonl"
    tools.write_jsonl(path, [{"id": "old"}])
    for rows, error in [([{"id": "1"}, {"x": math.nan}], ValueError),
                        ([{"x": math.inf}], ValueError),
                        ([{"id": "1"}, {"x": object()}], TypeError),
                        (interrupted(), KeyboardInterrupt)]:
        with pytest.raises(error):
            tools.write_jsonl(path, rows)
        assert tools.read_jsonl(path) == [{"id": "old"}]
        assert list(tmp_path.iterdir()) == [path]
    tools.write_jsonl(path, [{"id": "new"}])
    assert tools.read_jsonl(path) == [{"id": "new"}] and list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------
# Rows


def question(**changes):
    row = {"id": "1", "image": "images/1.jpg", "question": "What?", "answer": "7", **changes}
    return {k: v for k, v in row.items() if v is not KeyError}


def trajectory(*turns):
    return question(turns=list(turns))


@pytest.mark.parametrize("changes",
                         [{}, {"options": ["7", "8"]}, {"options": ["red", "blue"], "answer": "B"},
                                     {"system": None}, {"system": ""}, {"level": "hard"},
                                     {"level": None},
                                     {"image": "..jpg"}, {"image": "a..b/c.jpg"}, {"unknown": 1}])
def test_good_questions(changes):
    tools.check_question(question(**changes))


@pytest.mark.parametrize("changes", [
    *({key: bad} for key in ("id", "image", "question", "answer")
      for bad in (KeyError, "", " ", 7, None)),
    *({"image": path} for path in ("/etc/passwd", "../secret.jpg", "images/../../secret.jpg",
                                   "..")),
    {"options": []}, {"options": "red"}, {"options": [1, 2]},
    {"options": ["red", "blue"]}, {"system": 5}, {"system": ["a"]}, {"level": "extreme"},
    {"level": 1}])
def test_bad_questions(changes):
    with pytest.raises(tools.InputError) as error:
        tools.check_question(question(**changes))
    assert next(iter(changes)) in str(error.value) and "\n" not in str(error.value)


ZOOM = {"text": "a", "zoom": {"bbox_2d": WHOLE, "source": "original_image"}}
ERROR = {"text": "b", "error": "Too narrow."}
LAST = {"text": "c"}


@pytest.mark.parametrize("turns", [[LAST], [ZOOM], [ERROR], [ZOOM, ERROR, LAST],
                                   [ZOOM, {**ZOOM, "learn": False}]])
def test_good_trajectories(turns):
    tools.check_trajectory(trajectory(*turns))


@pytest.mark.parametrize("turns, words", [
    ([], "'turns'"), ([LAST, ZOOM], "turn 1"), ([ZOOM, LAST, ZOOM], "turn 2"),
    (["text"], "turn 1"), ([{}], "turn 1"),
    ([{"text": 7}], "turn 1"), ([ZOOM, {"text": "", "error": 7}], "turn 2"),
    ([{"text": "", "zoom": None}], "turn 1"),
    ([{"text": "", "zoom": {"bbox_2d": [1, 0, 0, 1], "source": "original_image"}}, LAST],
     "turn 1: The box"),
    ([{"text": "", "zoom": {"bbox_2d": WHOLE, "source": "observation_0"}}, LAST],
     "turn 1: The source"),
    ([ZOOM, {"text": "", "zoom": {"bbox_2d": WHOLE, "source": "observation_2"}}, LAST],
     "turn 2: there is no observation_2 yet"),
    *(([{**LAST, "learn": bad}], "turn 1: 'learn'") for bad in (0, 1, None, "false", 0.5))])
def test_bad_trajectories(turns, words):
    with pytest.raises(tools.InputError, match=words):
        tools.check_trajectory(trajectory(*turns))


@pytest.mark.parametrize("line, words", [
    (b'{"id": "\xe9"}', "utf-8"), (b'{"x": 1e999}', "Out of range"),
    (b'{"x": -Infinity}', "not JSON"),
    (b'{"x": "\\ud800"}', "surrogates"), (b"\xef\xbb\xbf{}", "BOM")])
def test_rows_that_could_not_be_written_again_are_refused_by_line(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(tools.InputError, match=f"rows.jsonl:3: .*{words}"):
        tools.read_jsonl(tmp_path / "rows.jsonl")


def test_an_id_stands_in_one_line_only(tmp_path):
    tools.write_jsonl(tmp_path / "q.jsonl", [question(), question(id="2"), question()])
    with pytest.raises(tools.InputError, match="q.jsonl:3: id '1'"):
        tools.read_questions(tmp_path / "q.jsonl")


def test_a_trajectory_is_a_question():
    with pytest.raises(tools.InputError, match="'answer'"):
        tools.check_trajectory({**trajectory(LAST), "answer": None})
    with pytest.raises(tools.InputError, match="'turns'"):
        tools.check_trajectory(question(turns="none"))


# -------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("prediction, answer, expected", [
    ("7", "7", True), ("7", "8", False), (" Red. ", "red", True), ("the red", "Red", True),
    ("**red**", "red", True),
    ("a red fox", "red fox", True), ("The 'red' fox!", "red fox", True),
    ('"The red fox"', "a red fox", True),
    ("red  fox", "red fox", True), ("redfox", "red fox", False), ("red", "dark red", False),
    ("it is red", "red", False),
    ("White.", "white", True), ("ＲＥＤ", "red", True), ("é", "e\u0301", True), ("", "7", False),
    (None, "7", False),
    ("-5", "5", False), ("+5", "-5", False), ("3.5", "35", False), (".5", "5", False),
    ("$5", "5", True), ("5%", "5", True),
    ("B+", "B-", False), ("C++", "C", False), ("-", "-", True), ("-", "?", False),
    ("?", "?", True), ("", "?", False),
    ("A", "a", True), ("A.", "A", True), ("(A)", "A", True), ("(B)", "B", True),
    ("A", "the", False), ("B", "A", False),
    ("vitamin A", "vitamin", False),
    ("cat or red", "red", False), ("cat\nred", "red", False), ("fox red", "red fox", False),
    ("07", "7", False)])
def test_open_answers(prediction, answer, expected):
    assert tools.match_answer(prediction, answer) is expected


RIGHT = ["B", "b", "(B)", "B.", "B)", "(b) Red.", "B. red", "B: the red", "Red", "the red", " b \n"]
WRONG = ["A", "cat", "C", "blue", "", "?", "AB", "B cat", "B. cat", "A. red", "(A) red",
         "cat or red"]


@pytest.mark.parametrize("prediction, answer, options, expected", [
    *((text, "B", ["cat", "red"], True) for text in RIGHT),
    *((text, "B", ["cat", "red"], False) for text in WRONG),
    ("B", "red", ["cat", "red"], True), ("A", "red", ["cat", "red"], False),
    ("red", "(B) red", ["cat", "red"], True),
    # an option's own words come before its letter
    ("A", "A", ["B", "A"], True), ("B", "A", ["B", "A"], False),
    # an option that is punctuation only
    ("B", "B", ["cat", "?"], True), ("A", "B", ["cat", "?"], False),
    ("?", "B", ["cat", "?"], True), ("-", "B", ["+", "-"], True), ("+", "B", ["+", "-"], False),
    ("a", "B", ["+", "-"], False), ("7", "7", ["8", "9"], False),
    (None, "B", ["cat", "red"], False),
    ("D", "D", ["cat", "red", "fox", "dog"], True), ("E", "D", ["cat", "red", "fox", "dog"], False),
    # a letter in front of other words than its option's, or a sign beside it, names nothing
    *((text, "B", ["cat", "red"], False) for text in
      ("B. crimson", "B because it is not a cat", "B red cat", "B+", "-B", "B or A"))])
def test_multiple_choice(prediction, answer, options, expected):
    assert tools.match_answer(prediction, answer, options) is expected


# -------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_from_a_file_replace_some_of_the_defaults(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"question": "<image>\n{question} {braces}"}))
    prompts = tools.load_prompts(path)
    assert prompts == {**tools.PROMPTS, "question": "<image>\n{question} {braces}"}
    assert tools.load_prompts(None) == tools.PROMPTS
    assert tools.load_prompts(None) is not tools.PROMPTS


def test_all_prompts_can_be_replaced(tmp_path):
    """The default ones fit their own rules; a name is optional, and the system prompt may say
    anything, even nothing."""
    path = tmp_path / "prompts.json"
    others = {"system": "", "question": "<image>{question}", "observation": "<image>",
              "error": "{error}"}
    assert set(others) == set(tools.PROMPTS)
    for prompts in (others, tools.PROMPTS, {**others, "system": "<image> {question} {error}"}):
        path.write_text(json.dumps(prompts))
        assert tools.load_prompts(path) == prompts


@pytest.mark.parametrize("key, text", [
    ("question", "<image>"), ("question", "{question}"), ("question", ""),
    ("question", "{question}<image><image>"),
    ("question", "{question}{question}<image>"), ("question", "{ question }<image>"),
    ("observation", "{name}:"),
    ("observation", ""), ("observation", "{name}<image><image>"), ("error", "No."),
    ("error", "{Error}"),
    ("error", "{error}{error}"), ("error", "")])
def test_a_prompt_must_have_its_placeholders(tmp_path, key, text):
    """Exactly once each: otherwise the model would not be told the question, the picture or its
    mistake."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({key: text}))
    with pytest.raises(tools.InputError,
                       match=f"prompts.json: '{key}' must contain .* exactly once") as error:
        tools.load_prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"question"', '{"sistem": "x"}',
                                  '{"system": 7}', '{"question": null}',
                                  '{"question": ["{question}", "<image>"]}', "\udcff"])
def test_bad_prompts_are_one_line(tmp_path, text):
    path = tmp_path / "prompts.json"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(tools.InputError, match="prompts.json") as error:
        tools.load_prompts(path)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# Served models, against a real server on loopback that misbehaves

HELLO = [{"role": "user", "content": "Hello"}]
OK = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()


def ask(answers, attempts=4, timeout=5.0, **more):
    """Let a client ask a server that answers so, one after the other. Returns (reply or the error,
    requests, client)."""
    answers = iter(answers)
    with ChatServer(lambda body: next(answers)) as server:
        client = tools.ChatClient(server.url, "m", "teacher", attempts=attempts, pause=0.01,
                                  timeout=timeout, **more)
        try:
            return client.reply(HELLO, 16), server.requests, client
        except (tools.ServerError, tools.InputError) as error:
            return error, server.requests, client


@pytest.mark.parametrize("bad", [
    (429, {}, b"slow down"), (429, {"retry-after": "0.01"}, b""), (408, {}, b""),
    (500, {}, b"oops"), (502, {}, b"<html>"),
    (503, {}, b""), "drop", (200, {}, b"not json"), (200, {}, b"[]"), (200, {}, b"null"),
    (200, {}, b"{}"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": 5}'), (200, {}, b'{"choices": [{"message": null}]}'),
    (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (200, {"content-length": "500"}, b'{"choices"'),
    (200, {}, b"\xff\xfe"), (200, {"content-encoding": "gzip"}, b"no gzip"),
    (200, {}, b"[" * 200_000)])
def test_a_request_is_sent_again_until_it_is_answered(bad):
    answer, requests, client = ask([bad, bad, "hi"])
    assert answer == ("hi", False) and len(requests) == 3 and client.used["retries"] == 2
    answer, requests, _ = ask([bad] * 4)
    assert isinstance(answer, tools.ServerError) and len(requests) == 4 and "\n" not in str(answer)


def test_a_server_that_does_not_answer_in_time_is_asked_again():
    def behave(body):
        if len(server.requests) == 1:
            time.sleep(1.0)
        return "hi"

    with ChatServer(behave) as server:
        client = tools.ChatClient(server.url, attempts=2, pause=0.01, timeout=0.3)
        assert client.reply(HELLO, 16) == ("hi", False) and client.used["retries"] == 1
    # nobody listens there any more
    with pytest.raises(tools.ServerError, match="refused|connect|closed"):
        tools.ChatClient(server.url, attempts=2, pause=0.01, timeout=0.3).reply(HELLO, 16)


@pytest.mark.parametrize("status, body, kind, words", [
    (401, b"Incorrect API key provided: sk-secret-key", tools.InputError, "TEACHER_API_KEY"),
    (404, b"The model `m` does not exist", tools.InputError, "does not exist"),
    (400, b"bad picture", tools.ServerError, "bad picture"), (413, b"", tools.ServerError, "413"),
    (400, b"This model's maximum context length is 4096 tokens", tools.ContextFull, "context")])
def test_a_refusal_is_not_repeated(monkeypatch, status, body, kind, words):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-secret-key")
    error, requests, _ = ask([(status, {}, body)])
    assert type(error) is kind and len(requests) == 1 and words in str(error)
    assert "secret" not in str(error)
    assert requests[0][1]["authorization"] == "Bearer sk-secret-key"


def test_without_a_key_no_other_token_is_sent(monkeypatch):
    """The library would send the token that the user has saved for the Hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.delenv("TEACHER_API_KEY", raising=False)
    _, requests, _ = ask(["hi"])
    assert requests[0][0] == "/v1/chat/completions" and "hf_private" not in json.dumps(requests)
    assert requests[0][1]["authorization"] == "Bearer none"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://",
                                 "http://user:key@host/v1", "http://host/v1?key=1", "",
                                 "http://[::1/v1", "http://localhost:abc/v1",
                                 "http://lo\x01cal/v1", "HTTP://localhost/v1"])
def test_a_url_that_is_none_is_one_line(url):
    with pytest.raises(tools.InputError, match="must be a URL .* TEACHER_API_KEY"):
        tools.ChatClient(url, role="teacher")


def test_a_broken_key_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-secret\nkey")
    with pytest.raises(tools.InputError) as error:
        tools.ChatClient("http://localhost:1/v1", role="teacher")
    assert "secret" not in str(error.value)


def test_a_thought_that_the_server_keeps_apart_is_put_back():
    for field in ("reasoning", "reasoning_content"):
        message = {"content": "<answer>7</answer>", field: "I see 7."}
        completion = {"choices": [{"message": message, "finish_reason": "length"}],
                      "usage": {"prompt_tokens": 5, "completion_tokens": None}}
        answer, _, client = ask([(200, {}, json.dumps(completion).encode())])
        assert answer == ("<think>I see 7.</think><answer>7</answer>", True)
        assert (client.used["prompt_tokens"], client.used["completion_tokens"],
                client.used["requests"]) == (5, 0, 1)


def test_pictures_are_sent_whole_or_smaller_but_never_too_large():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 600, 3),
                                                              dtype=np.uint8))
    for most, kind, size in ((10**6, "png", (600, 400)), (300_000, "jpeg", (600, 400)),
                             (30_000, "jpeg", None)):
        url = tools.data_url(noise, most)
        assert len(url) <= most and url.startswith(f"data:image/{kind};base64,")
        view, _ = picture_of({"content": [{"type": "image_url", "image_url": {"url": url}}]})
        assert view.size == size or (size is None and view.width < 600
                                     and abs(view.width / view.height - 1.5) < 0.05)
        assert kind == "jpeg" or (np.asarray(view) == np.asarray(noise)).all()


def test_what_the_server_asks_for_is_a_pause_at_least_and_half_a_character_does_no_harm():
    start = time.time()
    answer, _, client = ask([(429, {"retry-after": "0"}, b""), (429, {"retry-after": "0.2"}, b""),
                             (200, {}, b'{"choices": [{"message": {"content": "\\ud800 7"}}]}')])
    assert answer == ("? 7", False) and client.used["retries"] == 2
    # pauses of 0.01 s doubled, then of 0.2 s, less a fifth
    assert time.time() - start > 0.02 * 0.8 + 0.2 * 0.8


def test_threads_that_wait_for_a_server(monkeypatch):
    """Failures are counted by reason; after GIVE_UP in a row the rest is left and nothing more is
    sent."""
    monkeypatch.setattr(tools, "GIVE_UP", 3)

    def play(wrong):
        def work(job):
            if wrong(job):
                raise tools.ServerError(f"HTTP {500 + job % 2}")
            return job

        client = tools.ChatClient("http://localhost:9", pause=0.01)
        return sorted((job, out)
                      for job, out in tools.in_threads(client, work, range(60), 1)), client

    played, client = play(lambda job: job % 3 == 0)
    assert played == [(job, job if job % 3 else None) for job in range(60)]
    assert not client.stopped.is_set()
    assert sorted(client.failures().split("; ")) == ["10 x HTTP 500", "10 x HTTP 501"]
    played, client = play(lambda job: job >= 2)
    assert played[:2] == [(0, 0), (1, 1)] and len(played) == 5 and client.stopped.is_set()
    with pytest.raises(tools.ServerError, match="stopped"):
        client.reply(HELLO, 1)
    client = tools.ChatClient("http://localhost:9")
    with pytest.raises(KeyError):
        list(tools.in_threads(client, lambda job: {}[job], range(60), 2))


class Limits:
    max_turns, max_images, max_new_tokens = 4, 4, 50


def test_a_conversation_is_played_through_the_tool():
    """Zoom, a refused call, a zoom into the observation, the answer: every message as it goes over
    the wire."""
    texts = [f"<think>a</think>{call_text([0.5, 0.5, 1, 1])} and then?", call_text([1, 0, 0, 1]),
             call_text([0, 0, 0.5, 0.5], "observation_1"), "<answer>7</answer>"]
    for cut in (False, True):
        answers = iter(texts)
        with ChatServer(lambda body: next(answers)) as server:
            client = tools.ChatClient(server.url, "m", min_pixels=1, max_pixels=10**6, pause=0.01)
            row = {"question": "What <image> is it?", "answer": "7"}
            turns, finish, prediction = tools.play(client, row, picture(224, 224), tools.PROMPTS,
                                                   Limits, seed=3, cut=cut)
        said = texts[0][:-10] if cut else texts[0]
        assert (finish, prediction) == ("answer", "7")
        assert [t["text"] for t in turns] == [said, *texts[1:]]
        assert [("zoom" in t, "error" in t) for t in turns] == [(True, False), (False, True),
                                                                (True, False), (False, False)]
        sent = server.requests[-1][2]
        assert (sent["model"], sent["max_tokens"], sent["seed"], sent["temperature"]) == ("m", 50,
                                                                                          3, 1.0)
        assert [m["role"] for m in sent["messages"]] == ["system"] + ["user",
                                                                      "assistant"] * 3 + ["user"]
        views = [picture_of(m) for m in sent["messages"] if m["role"] == "user"]
        assert [text for _, text in views] == [("What <image> is it?\n", ""),
                                               ("observation_1:\n", ""),
                                               "Error: " + turns[1]["error"],
                                               ("observation_2:\n", "")]
        assert [v and v.size for v, _ in views] == [(224, 224), (112, 112), None, (56, 56)]
        assert views[1][0].getpixel((0, 0))[:2] == (112, 112)
        assert views[3][0].getpixel((55, 55))[:2] == (167, 167)


@pytest.mark.parametrize("answers, finish, count", [
    (["<think>no call"], "void", 1),
    ([(200, {}, b'{"choices": [{"message": {"content": "too lo"}, "finish_reason": "length"}]}')],
     "void", 1),
    ([call_text(WHOLE)] * 4, "over_turn", 4),
    ([call_text(WHOLE), (400, {}, b"maximum context length")], "over_context", 1)])
def test_how_a_served_conversation_ends(answers, finish, count):
    answers = iter(answers)
    with ChatServer(lambda body: next(answers)) as server:
        client = tools.ChatClient(server.url, "m", pause=0.01)
        turns, ended, _ = tools.play(client, {"question": "?"}, picture(100, 100), tools.PROMPTS,
                                     Limits)
    assert ended == finish and len(turns) == count


def test_progress_in_a_log_is_a_plain_line_now_and_then(capsys):
    """Standard error is no terminal here: a line at the start, one at the end, none in between."""
    bar = tools.progress_bar(range(1000), desc="sft")
    for i in bar:
        bar.set_postfix_str(f"loss {i}", refresh=False)
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" [")[0] for line in lines[:-1]] == ["sft: 0/1000", "sft: 1000/1000"]
    assert lines[1].endswith(", loss 999]") and lines[-1].strip() == ""


NCCL = """NCCL error in: ProcessGroupNCCL.cpp:3690, {kind}
{kind}: {meaning}
Last error:
{last}
"""


def test_only_the_end_of_another_process_is_told_as_such(monkeypatch):
    """With its cause, which NCCL writes on the last line; any other error keeps its traceback."""
    def fail(kind, meaning, last):
        def main():
            raise RuntimeError(NCCL.format(kind=kind, meaning=meaning, last=last))
        monkeypatch.setattr(sys, "argv", ["rl.py"])
        tools.run(main)

    with pytest.raises(SystemExit) as told:
        fail("remote error", "a remote process exited",
             "socketProgress: Connection closed by 10.0.0.7<41>")
    assert "rank 0 stops because another process has ended (NCCL error in" in str(told.value)
    assert str(told.value).endswith("socketProgress: Connection closed by 10.0.0.7<41>)")
    with pytest.raises(RuntimeError, match="Duplicate GPU"):
        fail("invalid usage", "a wrong call", "Duplicate GPU detected: rank 0 and rank 1")
