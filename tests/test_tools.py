"""Specification of the agent's world: what a turn means, which pixels a zoom returns, when a
conversation ends, how rows are read and written, and when an answer counts as right.

Whatever a model writes ends in a crop, an answer or one sentence that it can act on. Nothing it
writes raises.
"""

import errno
import json
import math
import os
import random

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import tools

WHOLE = [0.0, 0.0, 1.0, 1.0]


def call_text(box, source="original_image"):
    return f"<grounding>{json.dumps({'bbox_2d': box, 'source': source})}</grounding>"


def zoom_into(views, box, source="original_image"):
    return tools.zoom(views, {"bbox_2d": box, "source": source})


def picture(width, height):
    """An image whose pixels tell where they are: red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def corners(crop):
    """Return (left, top, right, bottom) of a crop in the `picture` that it was cut from; right and
    bottom are exclusive."""
    pixels = np.asarray(crop)
    left, top = pixels[0, 0, :2].tolist()
    last_column, last_row = pixels[-1, -1, :2].tolist()
    assert crop.size == (last_column - left + 1, last_row - top + 1)
    return left, top, last_column + 1, last_row + 1


def is_sentence(error):
    is_short = isinstance(error, str) and len(error) < 200 and "\n" not in error
    return is_short and error.endswith(".") and error.count(".") == 1


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, text", [
    (ValueError("one line"), "one line"), (ValueError("\nfirst\nsecond\n"), "first"),
    (ValueError(), "ValueError"), (MemoryError(" \n"), "MemoryError")], ids=repr)
def test_the_first_line_of_an_error(error, text):
    assert tools.first_line(error) == text


# ---- Prompts ------------------------------------------------------------------------------------


def test_prompts_from_a_file_replace_some_of_the_defaults(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"question": "<image>\n{question} {braces}"}))
    assert tools.load_prompts(path) == {**tools.PROMPTS,
                                        "question": "<image>\n{question} {braces}"}


def test_without_a_file_prompts_are_a_copy_of_the_defaults():
    assert tools.load_prompts(None) == tools.PROMPTS
    assert tools.load_prompts(None) is not tools.PROMPTS


def test_all_prompts_can_be_replaced(tmp_path):
    """The default ones fit their own rules; a name is optional, and the system prompt may say
    anything, even nothing."""
    path = tmp_path / "prompts.json"
    shortest = {"system": "", "question": "<image>{question}", "observation": "<image>",
                "error": "{error}"}
    assert set(shortest) == set(tools.PROMPTS)
    for prompts in (shortest, tools.PROMPTS,
                    {**shortest, "system": "<image> {question} {error}"}):
        path.write_text(json.dumps(prompts))
        assert tools.load_prompts(path) == prompts


@pytest.mark.parametrize("key, text", [
    ("question", ""),
    ("question", "<image>"),
    ("question", "{question}"),
    ("question", "{question}<image><image>"),
    ("question", "{question}{question}<image>"),
    ("question", "{ question }<image>"),
    ("observation", ""),
    ("observation", "{name}:"),
    ("observation", "{name}<image><image>"),
    ("error", ""),
    ("error", "No."),
    ("error", "{Error}"),
    ("error", "{error}{error}"),
])
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


def test_a_row_may_have_its_own_system_text():
    assert tools.system_text({}, tools.PROMPTS) == tools.PROMPTS["system"]
    assert tools.system_text({"system": None}, tools.PROMPTS) == tools.PROMPTS["system"]
    assert tools.system_text({"system": ""}, tools.PROMPTS) == ""
    assert tools.system_text({"system": "Look."}, tools.PROMPTS) == "Look."


def test_the_question_stands_before_or_after_its_image():
    row = {"question": "What <image> is {question}?"}
    before = {**tools.PROMPTS, "question": "Q: {question}\n<image>!"}
    assert tools.question_text(row, before) == ("Q: What <image> is {question}?\n", "!")
    after = {**tools.PROMPTS, "question": "<image>\n{question}"}
    assert tools.question_text(row, after) == ("", "\nWhat <image> is {question}?")
    row["user"] = "Own <image> words."
    assert tools.question_text(row, before) == ("Own ", " words.")


def test_the_tools_message_is_text_around_a_crop_or_an_error_alone():
    prompts = {**tools.PROMPTS, "error": "Error: {error}",
               "observation": "{name} is number {number} after action {action}:<image>!"}
    assert tools.tool_message({"zoom": {}}, 5, 3, prompts) == (
        "observation_3 is number 3 after action 4:", "!")
    assert tools.tool_message({"error": "Too {error}."}, 5, 3, prompts) == (
        "Error: Too {error}.", None)


def test_an_imported_conversation_has_the_tools_own_words():
    zoomed = {"zoom": {}, "tool_message": "A <image> crop"}
    assert tools.tool_message(zoomed, 1, 1, tools.PROMPTS) == ("A ", " crop")
    refused = {"error": "No.", "tool_message": "Not so."}
    assert tools.tool_message(refused, 1, 0, tools.PROMPTS) == ("Not so.", None)
    refused = {"error": "No.", "tool_message": ""}
    assert tools.tool_message(refused, 1, 0, tools.PROMPTS) == ("", None)


# ---- Images -------------------------------------------------------------------------------------


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


def test_a_photo_whose_orientation_cannot_be_read_is_one_line(tmp_path):
    """The pixels are fine, but the type of the first EXIF entry is 0."""
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(path, exif=exif)
    content = bytearray(path.read_bytes())
    content[content.index(b"Exif\0\0") + 6 + 11] = 0
    path.write_bytes(content)
    with pytest.raises(tools.InputError, match="x.jpg: not a readable image"):
        tools.open_image(path)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_image_becomes_rgb(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "x.tiff")
    image = tools.open_image(tmp_path / "x.tiff")
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_a_photo_is_turned_upright(tmp_path):
    photo = Image.new("RGB", (4, 2), "red")
    photo.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn the stored pixels clockwise
    photo.save(tmp_path / "x.png", exif=exif)
    image = tools.open_image(tmp_path / "x.png")
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == (0, 0, 255)
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name, number_type", [("x.png", "<u2"), ("x.tiff", "<u2"),
                                               ("x.tiff", ">u2")])
def test_16_bits_are_scaled_to_8(tmp_path, name, number_type):
    Image.fromarray(np.full((3, 3), 127 * 256 + 9).astype(number_type)).save(tmp_path / name)
    assert tools.open_image(tmp_path / name).getpixel((1, 1)) == (127, 127, 127)


@pytest.mark.parametrize("number_type, white", [("int32", 255), ("int32", 65535),
                                                ("float32", 1), ("float32", 255)])
def test_numbers_of_32_bits_are_refused_and_not_shown_black(tmp_path, number_type, white):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.full((3, 3), white).astype(number_type)).save(path)
    with pytest.raises(tools.InputError, match="x.tiff: image has numbers of 32 bits.*save it"):
        tools.open_image(path)


def test_the_limit_of_pixels_is_told_with_a_way_out(tmp_path):
    """No decoding: the file is small and claims its size."""
    Image.new("1", (10_000, 9_000)).save(tmp_path / "x.png")
    with pytest.raises(tools.InputError, match="x.png: image has too many pixels "
                       r"\(90,000,000, the limit is 89,478,485\); make it smaller, or raise"):
        tools.open_image(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.ppm", "x.ico"])
def test_other_formats_are_refused_with_a_way_out(tmp_path, name):
    Image.new("RGB", (16, 16)).save(tmp_path / name)
    with pytest.raises(tools.InputError, match="not a readable image.*JPEG, PNG, .*AVIF"):
        tools.open_image(tmp_path / name)


def test_an_avif_is_opened(tmp_path):
    if not features.check("avif"):
        pytest.skip("this build of Pillow cannot read AVIF")
    Image.new("RGB", (16, 8), "white").save(tmp_path / "x.avif")
    image = tools.open_image(tmp_path / "x.avif")
    assert image.size == (16, 8) and image.getpixel((8, 4)) == (255, 255, 255)


def test_a_png_with_long_texts_is_opened(tmp_path):
    """Image generators store prompts and workflows in it; packed, ten million bytes are short."""
    texts = PngInfo()
    texts.add_text("prompt", "x" * 10_000_000, zip=True)
    Image.new("RGB", (3, 3), "red").save(tmp_path / "x.png", pnginfo=texts)
    assert tools.open_image(tmp_path / "x.png").getpixel((1, 1)) == (255, 0, 0)


def test_transparent_pixels_become_white(tmp_path):
    for mode, hidden_colour in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        Image.new(mode, (3, 3), hidden_colour).save(tmp_path / "x.png")
        assert tools.open_image(tmp_path / "x.png").getpixel((1, 1)) == (255, 255, 255)

    palette_image = Image.new("P", (3, 3), 1)
    palette_image.putpalette([0, 0, 0, 200, 0, 0])
    palette_image.save(tmp_path / "x.gif", transparency=1)
    assert tools.open_image(tmp_path / "x.gif").getpixel((1, 1)) == (255, 255, 255)


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
    ((90, 80), (100, 7056), (84, 84)),            # exactly the largest area
    ((84, 84), (7056, 7056), (84, 84)),           # exactly both
    ((5000, 30), (784, 10_000), (336, 28)),  # 1290.99 x 7.7: 28 high, so 10000 / 28 = 357.1 wide
])
def test_sizes_that_the_model_sees_by_hand(size, limits, expected):
    assert tools.size_for_model(*size, *limits) == expected
    assert tools.resize_for_model(Image.new("RGB", size), *limits).size == expected


def test_sizes_agree_with_qwens_own_processor():
    """For sides of 17 pixels and more, where Qwen's rounding does not give a side of 0. A strip
    that would exceed the limit there, since its short side cannot shrink, keeps it here."""
    rng = random.Random(0)
    for _ in range(400):
        width = int(17 * 100 ** rng.random())
        height = min(1700, max(17, int(width * 30 ** rng.uniform(-1, 1))))
        limits = rng.choice([(3136, 50_000), (6000, 8000), (40_000, 200_000), (784, 300_000)])
        max_pixels = limits[1]
        factor = rng.choice([28, 32])
        qwen_height, qwen_width = smart_resize(height, width, factor, *limits)
        image = tools.resize_for_model(Image.new("L", (width, height)), *limits, factor)
        if min(qwen_width, qwen_height) > factor or qwen_width * qwen_height <= max_pixels:
            assert image.size == (qwen_width, qwen_height), (width, height, limits, factor)
        else:
            assert min(image.size) == factor
            assert max_pixels - factor**2 < image.width * image.height <= max_pixels


def test_resizing_keeps_a_fitting_image_and_repeats_nothing():
    image = picture(84, 84)
    assert tools.resize_for_model(image, 6000, 8000) is image
    resized = tools.resize_for_model(picture(250, 100), 6000, 8000)
    assert tools.resize_for_model(resized, 6000, 8000) is resized


# ---- The zoom tool ------------------------------------------------------------------------------


@pytest.mark.parametrize("size, box, expected", [
    ((100, 50), [0, 0, 1, 1], (0, 0, 100, 50)),
    # 0.75 x 50 = 37.5: the far corner is ceiled
    ((100, 50), [0.25, 0.5, 0.5, 0.75], (25, 25, 50, 38)),
    ((10, 10), [0.19, 0.11, 0.21, 0.99], (1, 1, 3, 10)),          # the near corner is floored
    ((10, 10), [0.55, 0.55, 0.56, 0.56], (5, 5, 6, 6)),  # less than a pixel: the pixel it lies in
    # a box never loses a pixel that it touches
    ((3, 3), [0.333, 0.333, 0.667, 0.667], (0, 0, 3, 3)),
    ((100, 50), [0.25 - 1e-9, 0.5 - 1e-9, 0.5 + 1e-9, 0.74 + 1e-9], (24, 24, 51, 38)),
    ((90, 90), [0.333, 0.0, 0.667, 0.333], (29, 0, 61, 30)),      # 29.97 and 60.03
    ((1, 1), [0.4, 0.4, 0.6, 0.6], (0, 0, 1, 1)),
    ((200, 1), [0, 0, 1, 1], (0, 0, 200, 1)),  # an aspect ratio of 200 is still allowed
    ((2, 250), [0, 0, 1, 0.004], (0, 0, 2, 1)),     # narrow in fractions, not in pixels
    ((250, 250), [5e-324, 0, 1 - 2**-53, 1], (0, 0, 250, 250)),
])
def test_zoom_returns_exactly_these_pixels(size, box, expected):
    assert corners(zoom_into([picture(*size)], box)) == expected


def test_zoom_into_an_observation_uses_its_native_pixels():
    """Crops of crops add up to positions in the original: nothing is resized on the way."""
    views = [picture(200, 100)]
    views.append(zoom_into(views, [0.5, 0.5, 1.0, 1.0], "original_image"))
    views.append(zoom_into(views, [0.1, 0.2, 0.3, 0.4], "observation_1"))
    views.append(zoom_into(views, [0.5, 0.5, 1.0, 1.0], "observation_2"))
    views.append(zoom_into(views, [0.0, 0.0, 0.1, 0.1], "original_image"))
    assert [corners(view) for view in views] == [
        (0, 0, 200, 100), (100, 50, 200, 100), (110, 60, 130, 70), (120, 65, 130, 70),
        (0, 0, 20, 10)]
    # observations have numbers of any length, and neither views nor call are changed
    views = [picture(index + 1, 5) for index in range(13)]
    call = {"bbox_2d": [0, 0, 0.5, 1], "source": "observation_11"}
    assert tools.zoom(views, call).size == (6, 5)
    assert call == {"bbox_2d": [0, 0, 0.5, 1], "source": "observation_11"}
    assert [view.size for view in views] == [(index + 1, 5) for index in range(13)]


def test_a_crop_has_the_pixels_that_its_box_touches_and_no_others():
    """Column c lies between c and c + 1. Corners are multiples of 1/64, so that no product with a
    side is rounded."""
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(1, 90), rng.randint(1, 90)
        x0, x1 = sorted(rng.sample(range(65), 2))
        y0, y1 = sorted(rng.sample(range(65), 2))
        columns = [c for c in range(width) if 64 * (c + 1) > x0 * width and 64 * c < x1 * width]
        rows = [r for r in range(height) if 64 * (r + 1) > y0 * height and 64 * r < y1 * height]
        crop = zoom_into([picture(width, height)], [x0 / 64, y0 / 64, x1 / 64, y1 / 64])
        assert corners(crop) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_a_box_between_two_neighbouring_floats_still_holds_a_pixel():
    """1/3 and the next float both round to the left edge of pixel 1 of 3: it is the pixel in the
    crop, in either direction."""
    near = 0.3333333333333333
    far = 0.33333333333333337
    assert near < far == math.nextafter(near, 1)
    for box, expected in (([near, near, far, far], (1, 1, 2, 2)), ([near, 0, far, 1], (1, 0, 2, 3)),
                          ([0, near, 1, far], (0, 1, 3, 2))):
        assert corners(zoom_into([picture(3, 3)], box)) == expected


@pytest.mark.parametrize("box, source, word", [
    (WHOLE, "observation_2", "observation_2"),
    (WHOLE, "observation_999999", "observation_999999"),
    ([0, 0, 1, 0.001], "original_image", "narrow"),
    ([0, 0, 0.001, 1], "original_image", "narrow"),
    ([0, 0, 2, 1], "original_image", "x1 <= 1"),
])
def test_zoom_refuses_with_one_sentence(box, source, word):
    with pytest.raises(tools.ToolError) as error:
        zoom_into([picture(250, 250), picture(2, 2)], box, source)
    assert is_sentence(str(error.value)) and word in str(error.value)


def test_how_narrow_a_box_may_be():
    """Its longer side has at most 200 times the pixels of its shorter one, whatever its source."""
    for size in ((1, 200), (200, 1), (2, 400)):
        assert zoom_into([picture(*size)], WHOLE).size == size
    for size in ((1, 201), (201, 1), (2, 401), (402, 2), (2, 500)):
        with pytest.raises(tools.ToolError, match="narrow"):
            zoom_into([picture(*size)], WHOLE)


# ---- One turn of the model: reading it ----------------------------------------------------------


def test_the_four_kinds_of_turn():
    zoom = {"bbox_2d": [0.25, 0.0, 0.5, 1.0], "source": "observation_3"}
    text = "<think>there</think>" + call_text([0.25, 0, 0.5, 1], "observation_3")
    assert tools.parse_turn(text) == ("zoom", zoom)
    assert tools.parse_turn("<think>seen</think><answer> Red \n</answer>") == ("answer", "Red")
    assert tools.parse_turn("I do not know.") == ("void", None)
    kind, sentence = tools.parse_turn("<grounding>zoom in!</grounding>")
    assert kind == "error" and is_sentence(sentence) and "JSON" in sentence


GOOD_CALL = '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"}'
ZOOM_WHOLE = ("zoom", {"bbox_2d": WHOLE, "source": "original_image"})


@pytest.mark.parametrize("text, expected", [
    ("<think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<think>a</think><think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<answer>2</answer><think>too late", ("answer", "2")),
    ("<answer>2</answer><think>too late</think>", ("answer", "2")),
    ("<think><answer>1</answer>", ("void", None)),  # an unclosed thought runs to the end
    ("<think>a</think> b <think><answer>1</answer>", ("void", None)),
    ("</think><answer>2</answer>", ("answer", "2")),                          # thinking is optional
    # text before a </think> that nothing opened is a thought
    ("I end with <answer>your answer</answer>. It is 7.</think><answer>7</answer>",
     ("answer", "7")),
    ("First <grounding>{}</grounding>?\nNo.</think>\n\n<answer>7</answer>", ("answer", "7")),
    ("<answer>1</answer></think>", ("void", None)),
    ("a</think><answer>1</answer></think><answer>2</answer></think><answer>3</answer>",
     ("answer", "3")),
    ("<think>a</think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<answer>1</answer><think>a</think><answer>2</answer></think><answer>3</answer>",
     ("answer", "3")),
    ("I write <answer> between <think> and </think>, <answer>1</answer>.</think><answer>2</answer>",
     ("answer", "2")),
    ("<think>a<think>b</think><answer>1</answer></think><answer>2</answer>", ("answer", "2")),
    ("<think>Use <think> first.</think><answer>2</answer>", ("answer", "2")),
    ("a</think><answer>2</answer><think>too late</think>", ("answer", "2")),
    ("a</think><think><answer>1</answer>", ("void", None)),
    ("<answer>1</think><answer>2</answer>", ("answer", "2")),
    ("<think>two\nlines</think>\n<answer>2\n3</answer>", ("answer", "2\n3")),
    # what a thought tears apart is no tag, and a tag that closes in a thought is not closed
    ("<ans<think>x</think>wer>7</answer>", ("void", None)),
    ("<answer>7<think></answer>", ("void", None)),
    # a thought within an answer or a call is no part of it
    ("<answer>7<think>or 8</think></answer>", ("answer", "7")),
    ("<grounding>" + GOOD_CALL.replace(", ", ",<think>or {</think> ", 1) + "</grounding>",
     ZOOM_WHOLE),
])
def test_thoughts_are_ignored(text, expected):
    assert tools.parse_turn(text) == expected


@pytest.mark.parametrize("text, rest, expected", [
    (call_text(WHOLE), "<answer>7</answer>", ZOOM_WHOLE),
    ("<answer>7</answer>", call_text(WHOLE), ("answer", "7")),
    ("<answer>7</answer>", "<answer>8</answer>", ("answer", "7")),
    ("<grounding>{<answer>7</answer>", "", ("answer", "7")),  # the call is never closed
    ("<answer></answer>", "", ("answer", "")),
    ("<answer> 7 \n</answer>", "", ("answer", "7")),     # first_tag keeps the spaces
    ("<answer>1<answer>2</answer>", "</answer>", ("answer", "1<answer>2")),
    # first is what opens first
    ("<answer>x<grounding>{}</grounding></answer>", "", ("answer", "x<grounding>{}</grounding>")),
    ("<think>Is it <answer>1</answer>?</think><answer>7</answer>", " More.", ("answer", "7")),
    ("Is it <answer>1</answer>?</think><answer>7</answer>", " More.", ("answer", "7")),
], ids=["call, answer", "answer, call", "two answers", "call not closed", "empty answer", "spaces",
        "opened twice", "nested", "after a thought", "after a thought that the prompt opened"])
def test_the_first_complete_tag_wins(text, rest, expected):
    """It ends where its closing tag does, in the text with its thoughts."""
    assert tools.parse_turn(text + rest) == expected
    tag_name, content, end = tools.first_tag(text + rest)
    assert end == len(text)
    assert text.endswith(f"{content}</{tag_name}>")


@pytest.mark.parametrize("text", ["", "no tag", "<answer>7</grounding>", "</answer><answer>"])
def test_an_incomplete_tag_is_none(text):
    assert tools.first_tag(text) is None
    assert tools.parse_turn(text) == ("void", None)


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


@pytest.mark.parametrize("source", [
    "observation_0", "observation_01", "observation_", "observation_-1", "observation_1.0",
    "observation_1234567", "Original_image", "original_image ", "observation_٣", "", "🦊",
    "observation_1\n", 1, None, True, ["original_image"], {"original_image": 0},
])
def test_sources_that_are_refused(source):
    kind, sentence = tools.parse_turn(call_text(WHOLE, source))
    assert kind == "error" and is_sentence(sentence)
    assert "source" in sentence and "JSON" not in sentence


@pytest.mark.parametrize("body", [
    "", " ", "[]", "7", "null", "[0, 0, 1, 1]", "\ud800", "\x00",
    '{"bbox_2d": [0, 0, 1, 1]}',
    '{"source": "original_image"}',
    "{'bbox_2d': [0, 0, 1, 1], 'source': 'original_image'}",
    '{"bbox_2d": [0, 0, 1, 1], "source": "original_image"',
    GOOD_CALL + " {}",
    # not guessed at: words around it, a trailing comma, a fence, a list, a line break in a string
    f"Zoom: {GOOD_CALL}",
    f"{GOOD_CALL},",
    f"```json\n{GOOD_CALL}\n```",
    f"[{GOOD_CALL}]",
    '{"bbox_2d": [0, 0, 1, 1,], "source": "original_image"}',
    '{"": "\n", "bbox_2d": [0, 0, 1, 1], "source": "observation_1"}',
])
def test_calls_that_are_refused(body):
    kind, sentence = tools.parse_turn(f"<grounding>{body}</grounding>")
    assert kind == "error" and is_sentence(sentence)


def test_calls_that_are_accepted():
    """JSON is JSON: white space, further keys and integers are no mistakes, and the result is four
    plain floats."""
    kind, call = tools.parse_turn('<grounding>\n{"label": "a fox", "bbox_2d": [0, 0.5, 1, 1], '
                                  '"source": "observation_12"}\n</grounding>')
    assert (kind, call) == ("zoom", {"bbox_2d": [0.0, 0.5, 1.0, 1.0], "source": "observation_12"})
    assert all(type(number) is float for number in call["bbox_2d"])
    box = [0.12345678901234567, 1 / 3, 5 / 7, 1 - 2**-53]     # not rounded
    assert tools.parse_turn(call_text(box))[1]["bbox_2d"] == box


# ---- One turn of the model: where it leads ------------------------------------------------------


def test_a_conversation_until_its_answer():
    views = [picture(90, 90)]
    first = tools.take_turn(views, call_text([0, 0, 0.5, 0.5]), 1, 3, 3)
    assert first.finish_reason is None
    assert first.turn == {"text": call_text([0, 0, 0.5, 0.5]),
                          "zoom": {"bbox_2d": [0.0, 0.0, 0.5, 0.5], "source": "original_image"}}
    assert corners(views[1]) == (0, 0, 45, 45)

    second = tools.take_turn(views, call_text(WHOLE, "observation_2"), 2, 3, 3)
    assert second.finish_reason is None
    assert second.turn["error"] == "There is no observation_2 yet."
    assert "zoom" not in second.turn
    assert len(views) == 2  # a refused call shows nothing

    # an answer in the last turn is in time
    third = tools.take_turn(views, "<answer>7</answer>", 3, 3, 3)
    assert third == ({"text": "<answer>7</answer>"}, "answer", "7")


def test_void_ends_the_conversation():
    assert tools.take_turn([picture(9, 9)], "hm", 1, 3, 3) == ({"text": "hm"}, "void", None)
    # in the last turn, too, it is void and not over_turn: it asked for nothing
    assert tools.take_turn([picture(9, 9)], "hm", 3, 3, 3).finish_reason == "void"


def test_a_turn_at_the_turn_cap_keeps_its_zoom_or_its_error():
    views = [picture(9, 9)]
    turn, finish_reason, prediction = tools.take_turn(views, call_text(WHOLE), 3, 3, 99)
    assert turn["zoom"]["bbox_2d"] == WHOLE
    assert (finish_reason, prediction) == ("over_turn", None)
    assert len(views) == 1
    turn, finish_reason, _ = tools.take_turn(views, call_text([0, 0, 0, 0]), 3, 3, 99)
    assert finish_reason == "over_turn" and is_sentence(turn["error"])


def test_a_turn_at_the_image_cap_keeps_its_zoom():
    """The cap counts the original: with 2 images there is one zoom. A refused call needs no image,
    and the conversation continues."""
    views = [picture(9, 9)]
    assert tools.take_turn(views, call_text(WHOLE), 1, 99, 2).finish_reason is None
    assert len(views) == 2
    turn, finish_reason, _ = tools.take_turn(views, call_text(WHOLE, "observation_1"), 2, 99, 2)
    assert finish_reason == "over_turn" and turn["zoom"]["source"] == "observation_1"
    assert len(views) == 2
    assert tools.take_turn(views, call_text([0, 0, 0, 0]), 2, 99, 2).finish_reason is None


CALL = {"bbox_2d": WHOLE, "source": "original_image"}
CALL_TOO_EARLY = {"bbox_2d": WHOLE, "source": "observation_9"}
PARSED = {"zoom": ("zoom", CALL), "zoom too early": ("zoom", CALL_TOO_EARLY),
          "bad call": ("error", "No."), " bad\n": ("error", "No."),
          "answer": ("answer", "7"), "empty answer": ("answer", ""), "void": ("void", None)}
ZOOMED = {"text": "zoom", "zoom": CALL}
TOO_EARLY = {"text": "zoom too early", "zoom": CALL_TOO_EARLY}
REFUSED = {"text": "bad call", "error": "No."}


@pytest.mark.parametrize("text, num_views, turn_number, max_turns, max_images, expected", [
    ("zoom", 1, 1, 3, 3, (ZOOMED, None, None)),
    ("zoom", 1, 1, 3, 2, (ZOOMED, None, None)),                   # the last image
    ("zoom", 2, 2, 3, 9, (ZOOMED, None, None)),
    ("bad call", 2, 2, 3, 3, (REFUSED, None, None)),
    (" bad\n", 1, 1, 3, 3, ({"text": " bad\n", "error": "No."}, None, None)),    # with its spaces
    ("answer", 2, 3, 3, 3, ({"text": "answer"}, "answer", "7")),  # in time
    ("void", 2, 3, 3, 3, ({"text": "void"}, "void", None)),
    ("empty answer", 2, 1, 3, 3, ({"text": "empty answer"}, "answer", "")),
    ("zoom", 2, 3, 3, 9, (ZOOMED, "over_turn", None)),
    ("bad call", 2, 3, 3, 9, (REFUSED, "over_turn", None)),
    ("bad call", 2, 4, 3, 9, (REFUSED, "over_turn", None)),       # beyond the last turn
    ("zoom", 2, 1, 9, 2, (ZOOMED, "over_turn", None)),            # no image is left
    ("zoom", 2, 1, 9, 1, (ZOOMED, "over_turn", None)),            # fewer than none
    ("bad call", 2, 1, 9, 2, (REFUSED, None, None)),              # needs no image
    ("zoom", 3, 1, 9, 9, ({"text": "zoom", "error": "Too far."}, None, None)),
    # a zoom that is not carried out is stored, even if its source does not exist or it is refused
    ("zoom too early", 1, 3, 3, 9, (TOO_EARLY, "over_turn", None)),
    ("zoom too early", 2, 1, 9, 2, (TOO_EARLY, "over_turn", None)),
    ("zoom", 3, 3, 3, 9, (ZOOMED, "over_turn", None)),
    ("zoom", 3, 1, 9, 3, (ZOOMED, "over_turn", None)),
])
def test_what_a_turn_leads_to_by_what_it_asks_for(monkeypatch, text, num_views, turn_number,
                                                  max_turns, max_images, expected):
    """However the turn is parsed, and however a crop is made: both are replaced here."""
    def crop(views, call):
        if len(views) > 2:
            raise tools.ToolError("Too far.")
        return "crop"

    monkeypatch.setattr(tools, "parse_turn", PARSED.__getitem__)
    monkeypatch.setattr(tools, "zoom", crop)
    views = ["image"] * num_views
    result = tools.take_turn(views, text, turn_number, max_turns, max_images)
    assert isinstance(result, tools.TurnResult) and result == expected
    was_carried_out = expected == (ZOOMED, None, None)
    assert views == ["image"] * num_views + ["crop"] * was_carried_out


def test_replay_shows_what_the_model_was_shown():
    views = [picture(90, 60)]
    turns = []
    texts = [call_text([0, 0, 0.5, 0.5]), call_text(WHOLE, "observation_7"),
             call_text([0.5, 0.5, 1, 1], "observation_1"),
             call_text(WHOLE)]
    for turn_number, text in enumerate(texts, start=1):
        turn, finish_reason, _ = tools.take_turn(views, text, turn_number, 4, 99)
        turns.append(turn)
    assert finish_reason == "over_turn"
    replayed_views = tools.replay({"id": "x", "turns": turns}, picture(90, 60))
    assert [corners(view) for view in views] == [(0, 0, 90, 60), (0, 0, 45, 30), (22, 15, 45, 30)]
    assert [corners(view) for view in replayed_views] == [corners(view) for view in views]


def test_replay_of_an_impossible_zoom_names_the_trajectory():
    turns = [{"text": "", "zoom": {"bbox_2d": WHOLE, "source": "observation_1"}}, {"text": ""}]
    with pytest.raises(tools.InputError, match="fox, turn 1: There is no observation_1 yet"):
        tools.replay({"id": "fox", "turns": turns}, picture(9, 9))


def test_boxes_of_the_views_are_where_the_crops_were_cut():
    """Of a picture whose pixels tell where they are. An error and the last zoom have no view."""
    image = picture(100, 100)
    turns = [{"text": "", "zoom": {"bbox_2d": [0.5, 0.0, 1.0, 0.5], "source": "original_image"}},
             {"text": "", "error": "There is no observation_7 yet."},
             {"text": "", "zoom": {"bbox_2d": [0.0, 0.5, 0.5, 1.0], "source": "observation_1"}},
             {"text": "", "zoom": {"bbox_2d": WHOLE, "source": "original_image"}}]
    boxes = tools.view_boxes({"turns": turns})
    assert boxes == [(0.0, 0.0, 1.0, 1.0), (0.5, 0.0, 1.0, 0.5), (0.5, 0.25, 0.75, 0.5)]
    for box, view in zip(boxes, tools.replay({"id": "x", "turns": turns}, image), strict=True):
        assert box == tuple(edge / 100 for edge in corners(view))


# ---- One hundred thousand turns that a confused model might write -------------------------------


def strange_number(rng):
    pixel_edge = rng.randrange(1, 39) / 39
    return rng.choice([0, 1, 0.5, rng.random(), rng.random(), rng.random(), -rng.random(),
                       1 + rng.random(), -0.0, 5e-324, pixel_edge, math.nextafter(pixel_edge, 1),
                       1 - 2**-53, math.nan, math.inf, -math.inf, 10**400, -10**20,
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
        position = rng.randrange(len(call))
        spoilt = rng.choice(["", "}", "]", "\\", "\x00", "é", "<", "</think>"])
        call = call[:position] + spoilt + call[position + rng.choice([0, 1, 200]):]
    choices = ["<answer>7</answer>", "<answer>", "</answer>", "<grounding>", "<think>", "</think>",
               "<think>x</think>", "🦊\u2028\ud800", ""]
    choices += [f"<grounding>{call}</grounding>"] * 6
    return "".join(rng.choice(choices) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def test_whatever_a_model_writes_ends_in_a_crop_an_answer_or_a_sentence():
    rng = random.Random(0)
    start_views = [picture(39, 39), picture(20, 5), picture(1, 1)]
    counts = dict.fromkeys(["crop", "error", "answer", "void"], 0)
    for _ in range(100_000):
        text = strange_turn(rng)
        views = list(start_views)
        kind, _ = tools.parse_turn(text)
        turn, finish_reason, prediction = tools.take_turn(views, text, 1, 9, 9)
        assert turn["text"] == text
        if finish_reason is not None:
            assert kind == finish_reason and views == start_views and turn == {"text": text}
            assert (finish_reason == "void") == (prediction is None)
            counts[finish_reason] += 1
        elif "zoom" in turn:
            assert kind == "zoom" and len(views) == 4 and "error" not in turn
            crop = views[3]
            assert 1 <= crop.width <= 39 and 1 <= crop.height <= 39, text
            counts["crop"] += 1
        else:
            assert views == start_views and is_sentence(turn["error"]), (text, turn)
            counts["error"] += 1
    assert min(counts.values()) > 4000  # every way out was taken


# ---- JSONL: one row a line ----------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"id": "1", "text": "🦊 é\n\u2028 \"quoted\"", "box": [0.1, 1 / 3], "none": None},
            {"id": "2"}]
    tools.write_jsonl(path, rows)
    assert tools.read_jsonl(path) == rows
    assert path.read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '{"a": NaN}', '{"a": -Infinity}',
                                  '{"a": 1} {"b": 2}', "\ufeff{}",
                                  "[" * 100_000], ids=lambda line: line[:12])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ok": 1}\n\n' + line + '\n{"ok": 2}\n', encoding="utf-8")
    with pytest.raises(tools.InputError) as error:
        tools.read_jsonl(path)
    assert f"{path}:3:" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line, words", [
    (b'{"id": "\xe9"}', "utf-8"), (b'{"x": 1e999}', "Out of range"),
    (b'{"x": -Infinity}', "not JSON"),
    (b'{"x": "\\ud800"}', "surrogates"), (b"\xef\xbb\xbf{}", "BOM")])
def test_rows_that_could_not_be_written_again_are_refused_by_line(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n\n" + line + b"\n")
    with pytest.raises(tools.InputError, match=f"rows.jsonl:3: .*{words}"):
        tools.read_jsonl(tmp_path / "rows.jsonl")


def test_a_mark_of_windows_and_its_line_ends_are_no_part_of_a_row(tmp_path):
    """Also in a file of prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "1"}\r\n\r\n{"id": "2"}\r\n')
    assert tools.read_jsonl(path) == [{"id": "1"}, {"id": "2"}]
    path.write_bytes(b'\xef\xbb\xbf\n{"id": "1"}')
    assert tools.read_jsonl(path) == [{"id": "1"}]
    path.write_bytes(b'\xef\xbb\xbf{"system": "Look."}')
    assert tools.load_prompts(path) == {**tools.PROMPTS, "system": "Look."}


@pytest.mark.parametrize("line, words", [
    ('{"id": "1", "que', "cut off"), ('{"id": "1", "question": ', "cut off"),
    ('{"id": "1"', "cut off"), ('{"id": "1",', "cut off"), ("{", "cut off"), ("[", "cut off"),
    ("{'id': '1'}", "not JSON"), ('{"id": None}', "not JSON"), ("id,image", "not JSON"),
    ('{"id": "1"},', "not JSON")])
def test_a_cut_line_is_called_cut_off(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_text('{"id": "0"}\n' + line + "\n")
    with pytest.raises(tools.InputError, match=f"rows.jsonl:2: {words}") as error:
        tools.read_jsonl(tmp_path / "rows.jsonl")
    assert "control character" not in str(error.value)


def test_only_the_first_row_asks_whether_this_is_the_right_file(tmp_path):
    """Where all rows are of another kind, the first one is, too."""
    path = tmp_path / "q.jsonl"
    tools.write_jsonl(path, [question(), question(answer="")])
    with pytest.raises(tools.InputError, match="q.jsonl:1: it has no 'turns': it is a question, "
                       "not a trajectory; fix or remove this line, or make another file with: fox"):
        tools.read_jsonl(path, tools.check_trajectory, hint="fox")
    with pytest.raises(tools.InputError, match="q.jsonl:2: .*; fix or remove this line$"):
        tools.read_jsonl(path, tools.check_question, hint="fox")


def test_a_message_has_one_full_stop_at_most(tmp_path):
    path = tmp_path / "t.jsonl"
    tools.write_jsonl(path, [trajectory(zoom_turn([1, 0, 0, 1], "original_image"), LAST)])
    with pytest.raises(tools.InputError, match="y0 < y1 <= 1; fix or remove this line$"):
        tools.read_jsonl(path, tools.check_trajectory)


def test_a_row_that_fails_its_check_is_named(tmp_path):
    tools.write_jsonl(tmp_path / "q.jsonl", [question(), question(answer="")])
    with pytest.raises(tools.InputError, match=r"q.jsonl:2: field 'answer' must"):
        tools.read_jsonl(tmp_path / "q.jsonl", tools.check_question)


def test_a_missing_file_says_which_command_makes_it(tmp_path):
    with pytest.raises(tools.InputError,
                       match="rows.jsonl does not exist; make it with: python fox.py"):
        tools.read_jsonl(tmp_path / "rows.jsonl", hint="python fox.py")
    with pytest.raises(tools.InputError, match="is not a file$"):
        tools.read_jsonl(tmp_path)


def interrupted_rows():
    yield {"id": "1"}
    raise KeyboardInterrupt


@pytest.mark.parametrize("make_rows, error", [
    (lambda: [{"id": "1"}, {"x": math.nan}], ValueError),
    (lambda: [{"x": math.inf}], ValueError),
    (lambda: [{"id": "1"}, {"x": object()}], TypeError),
    (interrupted_rows, KeyboardInterrupt),
], ids=["NaN", "infinity", "not JSON", "Ctrl-C"])
def test_writing_is_all_or_nothing(tmp_path, make_rows, error):
    """A writer that fails half-way, at a row that cannot be stored or by itself, leaves the old
    file and nothing else."""
    path = tmp_path / "rows.jsonl"
    tools.write_jsonl(path, [{"id": "old"}])
    with pytest.raises(error):
        tools.write_jsonl(path, make_rows())
    assert tools.read_jsonl(path) == [{"id": "old"}]
    assert list(tmp_path.iterdir()) == [path]

    tools.write_jsonl(path, [{"id": "new"}])
    assert tools.read_jsonl(path) == [{"id": "new"}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")

    tools.write_atomic(path, write)
    assert path.read_bytes() == b"half and half"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_written_file_has_the_mode_of_any_other(tmp_path):
    """It is not readable by others where a user has asked for that."""
    old_umask = os.umask(0o077)
    try:
        tools.write_atomic(tmp_path / "private", lambda file: file.write(b"x"))
    finally:
        os.umask(old_umask)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    with pytest.raises(IsADirectoryError) as error:
        tools.write_atomic(tmp_path, lambda file: file.write(b"x"))
    assert error.value.filename == str(tmp_path)    # not the temporary file next to it


def test_a_full_disk_is_told_with_the_file(tmp_path):
    """The error of a write does not know its file."""
    def write(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as error:
        tools.write_atomic(tmp_path / "x", write)
    assert error.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_journal_keeps_every_whole_line(tmp_path):
    """A line that was cut goes; two processes that write the same file lose nothing."""
    path = tmp_path / "new" / "a.jsonl"
    first = tools.Journal(path)
    first.add({"n": 1}, {"n": 2})
    with path.open("a") as file:
        file.write('{"n": 3')
    second = tools.Journal(path)
    assert first.rows == []
    assert second.rows == [{"n": 1}, {"n": 2}]
    first.add({"n": 4})
    second.add({"n": 5})
    other = tools.Journal(tmp_path / "b.jsonl", [path])
    assert other.rows == [{"n": n} for n in (1, 2, 4, 5)]


@pytest.mark.parametrize("content", [b"{\n", b"[" * 100_000 + b"\n", b"\xff\n"],
                         ids=["not JSON", "nested too deep", "not UTF-8"])
def test_a_damaged_journal_is_named(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(tools.InputError, match="a.jsonl: damaged"):
        tools.Journal(path)


# ---- Rows: questions and trajectories -----------------------------------------------------------

MISSING = object()


def question(**changes):
    row = {"id": "1", "image": "images/1.jpg", "question": "What?", "answer": "7", **changes}
    return {key: value for key, value in row.items() if value is not MISSING}


def trajectory(*turns):
    return question(turns=list(turns))


@pytest.mark.parametrize("changes", [
    {}, {"options": ["7", "8"]}, {"options": ["red", "blue"], "answer": "B"}, {"options": None},
    {"options": ["red", "blue"], "answer": r"<answer>\boxed{B}</answer>"},
    {"system": None}, {"system": ""}, {"user": None}, {"user": "Own <image> words."},
    {"level": "hard"}, {"level": None}, {"image": "..jpg"}, {"image": "a..b/c.jpg"},
    {"unknown": 1}])
def test_good_questions(changes):
    tools.check_question(question(**changes))


@pytest.mark.parametrize("changes", [
    *({key: bad} for key in ("id", "image", "question", "answer")
      for bad in (MISSING, "", " ", 7, None)),
    {"answer": "<answer> </answer>"}, {"answer": r"$\boxed{}$"},
    {"image": "/etc/passwd"}, {"image": "../secret.jpg"}, {"image": "images/../../secret.jpg"},
    {"image": ".."},
    {"options": []}, {"options": "red"}, {"options": [1, 2]}, {"options": ["red", "blue"]},
    {"system": 5}, {"system": ["a"]}, {"source": ["a"]}, {"category": 5}, {"cycle": 1},
    {"level": "extreme"}, {"level": 1},
    {"user": 5}, {"user": ""}, {"user": "no picture"}, {"user": "<image><image>"}])
def test_bad_questions(changes):
    with pytest.raises(tools.InputError) as error:
        tools.check_question(question(**changes))
    assert next(iter(changes)) in str(error.value) and "\n" not in str(error.value)


ZOOM = {"text": "a", "zoom": {"bbox_2d": WHOLE, "source": "original_image"}}
ERROR = {"text": "b", "error": "Too narrow."}
LAST = {"text": "c"}


def zoom_turn(box, source):
    return {"text": "", "zoom": {"bbox_2d": box, "source": source}}


@pytest.mark.parametrize("turns", [
    [LAST], [ZOOM], [ERROR], [ZOOM, ERROR, LAST], [ZOOM, {**ZOOM, "learn": False}],
    [ZOOM, zoom_turn(WHOLE, "observation_1"), LAST],
    [ERROR, zoom_turn(WHOLE, "observation_1")],  # not carried out: nobody looked for its source
    [{**ZOOM, "tool_message": "Here: <image>"}, {**ERROR, "tool_message": "No."}, LAST]])
def test_good_trajectories(turns):
    tools.check_trajectory(trajectory(*turns))


@pytest.mark.parametrize("turns, words", [
    ([], "'turns'"),
    ([LAST, ZOOM], "turn 1: it has neither"),
    ([ZOOM, LAST, ZOOM], "turn 2: it has neither"),
    (["text"], "turn 1: it must be an object with a 'text'"),
    ([{}], "turn 1: it must be an object with a 'text'"),
    ([{"text": 7}], "turn 1: it must be an object with a 'text'"),
    ([ZOOM, {"text": "", "error": 7}], "turn 2: 'error' must be a string"),
    ([{"text": "", "zoom": None}], "turn 1: The call"),
    ([zoom_turn([1, 0, 0, 1], "original_image"), LAST], "turn 1: The box"),
    ([zoom_turn(WHOLE, "observation_0"), LAST], "turn 1: The source"),
    ([ZOOM, zoom_turn(WHOLE, "observation_2"), LAST], "turn 2: there is no observation_2 yet"),
    ([ERROR, zoom_turn(WHOLE, "observation_1"), LAST], "turn 2: there is no observation_1 yet"),
    *(([{**LAST, "learn": bad}], "turn 1: 'learn'") for bad in (0, 1, None, "false", 0.5)),
    *(([{**ZOOM, "tool_message": bad}, LAST], "turn 1: 'tool_message' .* <image> 1 times")
      for bad in ("no picture", "", "<image><image>", 3)),
    ([{**ERROR, "tool_message": "<image>"}, LAST], "turn 1: 'tool_message' .* <image> 0 times"),
    *(([ZOOM, {**LAST, "tool_message": bad}], "turn 2: 'tool_message' .* absent on the last turn")
      for bad in ("", "more")),
])
def test_bad_trajectories(turns, words):
    with pytest.raises(tools.InputError, match=words):
        tools.check_trajectory(trajectory(*turns))


def test_a_trajectory_is_a_question():
    with pytest.raises(tools.InputError, match="'answer'"):
        tools.check_trajectory({**trajectory(LAST), "answer": None})
    with pytest.raises(tools.InputError, match="'turns'"):
        tools.check_trajectory(question(turns="none"))


def test_only_the_teacher_sees_the_layout():
    row = question(target_bbox=WHOLE)
    assert tools.without_layout({**row, "objects": [], "wallpaper": []}) == row


def test_an_id_stands_in_one_line_only(tmp_path):
    tools.write_jsonl(tmp_path / "q.jsonl", [question(), question(id="2"), question()])
    with pytest.raises(tools.InputError, match="q.jsonl:3: id '1'"):
        tools.read_questions(tmp_path / "q.jsonl")


# ---- Answers ------------------------------------------------------------------------------------


WRAPPED = ["<answer>7</answer>", " <answer> 7 </answer>\n", "<ANSWER>7</ANSWER>", r"\boxed{7}",
           r"$\boxed{7}$", r"<answer>\boxed{7}</answer>", r"\[ \boxed{\text{7}} \]", "$7$",
           r"\mathbf{7}", r"The answer is $\boxed{7}$.", "It is <answer>7</answer>.",
           "<think>...</think><answer>7</answer>", "The answer is 7", "**Final answer:** 7",
           "Answer：7"]


@pytest.mark.parametrize("prediction, answer, expected", [
    ("7", "7", True), ("7", "8", False), ("07", "7", False),
    (" Red. ", "red", True), ("the red", "Red", True), ("**red**", "red", True),
    ("a red fox", "red fox", True), ("The 'red' fox!", "red fox", True),
    ('"The red fox"', "a red fox", True), ("red  fox", "red fox", True),
    ("redfox", "red fox", False), ("red", "dark red", False), ("it is red", "red", False),
    ("White.", "white", True), ("ＲＥＤ", "red", True), ("é", "e\u0301", True),
    ("", "7", False), (None, "7", False), (None, "None", False),
    ("-5", "5", False), ("+5", "-5", False), ("3.5", "35", False), (".5", "5", False),
    ("$5", "5", True), ("5%", "5", True),
    ("B+", "B-", False), ("C++", "C", False), ("-", "-", True), ("-", "?", False),
    ("?", "?", True), ("", "?", False),
    ("A", "a", True), ("A.", "A", True), ("(A)", "A", True), ("(B)", "B", True),
    ("A", "the", False), ("B", "A", False), ("vitamin A", "vitamin", False),
    ("cat or red", "red", False), ("cat\nred", "red", False), ("fox red", "red fox", False),
    # "A" is an article at the beginning of a text, or where nothing else can be meant
    ("a man and a woman", "man and woman", True), ("a dog, a cat", "dog, cat", True),
    ("on a table", "on the table", True), ("near a car", "near the car", True),
    ("LOOKING FOR A JOB", "looking for a job", True),
    ("Gate A 5", "Gate 5", False), ("bus a 12", "bus 12", False), ("A 12", "12", False),
    ("a 12", "12", False), ("vitamin A deficiency", "vitamin deficiency", False),
    ("Vitamin A deficiency", "VITAMIN A DEFICIENCY", True), ("Plan A", "Plan", False),
    ("Terminal A, Gate 3", "Terminal, Gate 3", False), ("the A train", "the train", False),
    ("A 区", "区", False), ("Hoi An market", "Hoi market", False),
    # vowel signs and other marks belong to their letter, also those that NFKC takes apart
    ("की", "का", False), ("ที่", "ที", False), ("का", "क", False), ("\u0958", "क", False),
    ("\u0958", "\u0915\u093c", True), ("বাংলা", "বাংল", False), ("ស្រី", "ស្រ", False),
    ("“हिन्दी”।", "हिन्दी", True), ("น้ำ", "น้\u0e4d\u0e32", True),
    ("cafe\u0323\u0308", "cafe", False),
    ("´red´", "red", True), ("¨red", "red", True),
    # what nobody sees: joiners, spaces without width, the selectors of emoji
    ("क्\u200d", "क्", True), ("می\u200cخواهم", "میخواهم", True), ("\ufeffred\u200b", "red", True),
    ("5\ufe0f\u20e3", "5", True), ("red ❤\ufe0f", "red", True), ("don’t", "don't", True),
    # numbers
    ("−5", "-5", True), ("–5", "-5", True), ("−5", "5", False), ("−.5", "-.5", True),
    ("10–15", "10-15", True), ("1,000,000", "1000000", True), ("1，０００", "1000", True),
    ("12,34", "1234", False), ("1.000", "1000", False), ("1.5", "15", False), ("5.0", "5", False),
    ("10:30", "1030", False), ("1/2", "12", False),
    # signs and raised numbers are no punctuation
    ("√2", "2", False), ("<5", "5", False), ("≥ 5", "5", False), ("±5", "5", False),
    ("3 × 4", "3 4", False), ("3 × 4", "3 ÷ 4", False), ("5 < 7", "5 > 7", False),
    ("C#", "C", False), ("C#.", "c#", True), ("#1", "1", True), ("**√2**", "√2", True),
    ("10²", "102", False), ("10²³", "10^23", True), ("H₂O", "H2O", True), ("5 m²", "5 m2", True),
    # what is written around an answer
    *((text, "7", True) for text in WRAPPED), ("7", "<answer>7</answer>", True),
    ("<answer>7</answer>", r"\boxed{7}", True), ("<answer>8</answer>", "7", False),
    (r"\boxed{\frac{1}{2}}", r"$\frac{1}{2}$", True), (r"\boxed{\text{Red}}", "red", True),
    (r"\boxed{7", "7", False), ("The answer is not 7", "7", False),
    ("Choice Hotels", "hotels", False), ("Answer the phone", "phone", False),
    ("正确答案是：红色。", "红色", True)])
def test_open_answers(prediction, answer, expected):
    assert tools.match_answer(prediction, answer) is expected
    assert tools.match_answer(prediction, answer, []) is expected
    if prediction is not None:
        assert tools.match_answer(answer, prediction) is expected


CORRECT = ["B", "b", "(B)", "B.", "B)", "(b) Red.", "B. red", "B: the red", "Red", "the red",
           " b \n",
           # the dress that models give it
           "（B）", "B。", "Ｂ", "ｂ", "B、red", "Ｂ．red", "【B】", "「B」", "**B**", "**B. red**",
           "**B.** red", "_B_", "`B`", "[B]", "<B>", '"B"', "B!", "- B", "B\nred", "B red",
           "B (red)", "B - red", "B – red", "B: red", "Option B", "OPTION (B).", "option B: red",
           "Choice B",
           "Answer: B", "Answer - B", "The answer is B", "The correct answer is **B**.",
           "Final Answer: **B. red**", "The best option is (B) red", "The answer is option B",
           "The answer is red", r"\boxed{B}", r"$\boxed{\text{B. red}}$", "<answer>B</answer>",
           "答案：B", "答案是B。", "正确答案为（B）", "选B", "选项 B", "B red。"]
INCORRECT = ["A", "cat", "C", "blue", "", "?", "AB", "B cat", "B. cat", "A. red", "(A) red",
             "cat or red",
             # a letter in front of other words than its option's, or a sign next to it
             "B. crimson", "B because it is not a cat", "B red cat", "B+", "-B", "B or A",
             "**A. red**", "（A）red", "A - red", "A (red)", "A: red", "A\nred", "Option A: red",
             "Answer: A, red", "The answer is A or B", "A、B", "A/B", "Options A and B", "not B",
             "**B+**", "Option B+", "B-", "B2", "Bé", "E", "Option E", "Answer", "Answer:",
             "The answer is", "option", r"\boxed{}"]


@pytest.mark.parametrize("prediction, answer, options, expected", [
    *((text, "B", ["cat", "red"], True) for text in CORRECT),
    *((text, "B", ["cat", "red"], False) for text in INCORRECT),
    (None, "B", ["cat", "red"], False),
    # the answer may be an option's words, too
    ("B", "red", ["cat", "red"], True), ("A", "red", ["cat", "red"], False),
    ("red", "(B) red", ["cat", "red"], True),
    # an option's own words come before its letter
    ("A", "A", ["B", "A"], True), ("B", "A", ["B", "A"], False),
    # an option that is punctuation only
    ("B", "B", ["cat", "?"], True), ("A", "B", ["cat", "?"], False),
    ("?", "B", ["cat", "?"], True), ("-", "B", ["+", "-"], True), ("+", "B", ["+", "-"], False),
    ("a", "B", ["+", "-"], False), ("7", "7", ["8", "9"], False),
    # options that differ in a sign only, or look like what is written around a letter
    ("$5", "C", ["5%", "5", "$5"], True), ("5", "C", ["5%", "5", "$5"], False),
    ("5 %", "B", ["5%", "5"], False), ("5 %", "A", ["5%", "5"], False),
    ("A. <5", "A", ["5", "<5"], False), ("B. <5", "B", ["5", "<5"], True),
    ("Answer: 5", "B", ["5%", "5", "$5"], True), ("B. -5", "B", ["5", "-5"], True),
    ("B - 5", "B", ["5", "-5"], False), ("−5", "B", ["5", "-5"], True),
    ("The answer is right", "B", ["left", "right"], True),
    ("Right answer: left", "A", ["left", "right"], True),
    ("right side", "B", ["left", "right"], False),
    ("Option A", "B", ["Option B", "Option A"], True), ("A", "A", ["Exit", "A exit"], True),
    ("Gate 5", "A", ["Gate A 5", "Gate B 5"], False), ("B蓝色", "B", ["红色", "蓝色"], True),
    ("答案是蓝色", "B", ["红色", "蓝色"], True), ("（Ｂ）红色", "A", ["红色", "蓝色"], False),
    # the first option may be right, and options are compared as answers are
    ("A", "A", ["cat", "red"], True), ("cat", "a", ["cat", "red"], True),
    ("red", "B", ["A Cat", "Red"], True), ("B. red", "B", ["A Cat", "Red"], True),
    ("A. cat", "the cat", ["A Cat", "Red"], True), ("B. cat", "cat", ["A Cat", "Red"], False),
    ("B. r", "B", ["cat", "red"], False), ("B. reddish", "B", ["cat", "red"], False),
    # as many letters as options
    ("E", "five", ["one", "two", "three", "four", "five"], True),
    ("(e) five", "e", ["one", "two", "three", "four", "five"], True),
    ("D", "D", ["cat", "red", "fox", "dog"], True),
    ("E", "D", ["cat", "red", "fox", "dog"], False)])
def test_multiple_choice(prediction, answer, options, expected):
    assert tools.match_answer(prediction, answer, options) is expected


@pytest.mark.parametrize("prediction, options, expected", [
    (None, None, True), ("", None, True), ("red", None, False), ("red", [], False),
    (None, ["cat", "red"], True), ("B", ["cat", "red"], True), ("red", ["cat", "red"], True),
    ("crimson", ["cat", "red"], False), ("B. crimson", ["cat", "red"], False)])
def test_only_other_words_need_a_judge(prediction, options, expected):
    assert tools.is_decided(prediction, options) is expected
