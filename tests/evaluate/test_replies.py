"""What is read from texts that try to be misread."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.replies import json_list, last_boxes, option_letter, plain_answer

CHOICES = ("red", "blue", "green car", "2")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        (" **B**. ", "B"),
        ("D.", "D"),
        ("(B) blue", "B"),
        ("B. blue", "B"),
        ("C: green car", "C"),
        ("A) red", "A"),
        ("The answer is B because A is not red.", "B"),
        ("The answer is A because it is red", "A"),
        ("Answer: (C).", "C"),
        ("The correct option is B", "B"),
        ("I'd go with option A.", "A"),
        ("The answer is (B). (A) would be wrong.", "B"),
        ("Blue.", "B"),
        ("green car", "C"),
        ("2", "D"),
        ("blue", "B"),
    ],
)
def test_a_letter_that_is_chosen_is_read(answer, letter):
    assert option_letter(answer, CHOICES) == letter


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "  ",
        "A red car",  # the article
        "The answer is A red car",
        "All of them",
        "An answer",
        "A and B",
        "A or B",
        "(A) or (B)",
        "A) red or B) blue",
        "Neither A nor B",
        "Option B looks right but option C is right",
        "E",
        "(E)",
        "The answer is E",
        "The answer is B or C",
        "The answer is (B) or (C).",
        "Answer: A, B",
        "option B and C",
        "ABCD",
        "It is blue",
        "Blue and red",
        "Bob",
        "The answer is Blueish",
        "3",
        "D2",
    ],
)
def test_a_text_that_chooses_none_or_several_has_no_letter(answer):
    assert option_letter(answer, CHOICES) is None


def test_the_same_words_twice_choose_nothing():
    assert option_letter("red", ("red", "red")) is None


def test_there_are_as_many_letters_as_choices():
    assert option_letter("C", ("left", "right")) is None
    assert option_letter("F", tuple("123456")) == "F"


@given(st.text(alphabet="ABCDE abc().,:*answer is option\n", max_size=40), st.integers(2, 5))
def test_a_letter_is_one_of_the_choices_whatever_the_text(text, num_choices):
    letter = option_letter(text, [f"choice {number}" for number in range(num_choices)])
    assert letter is None or letter in "ABCDE"[:num_choices]


@given(
    st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "Answer: {}", "answer is ({})", "**{}**", "({}) x"])
)
def test_every_form_of_a_choice_is_read(letter, form):
    assert option_letter(form.format(letter), CHOICES) == letter


def test_boxes_are_those_of_the_last_area():
    first, last = '[{"bbox_2d":[0,0,1,1],"depth":0.5}]', '[{"bbox_2d":[0.1,0.2,0.3,0.4]},{"bbox_2d":[0.5,0.5,0.6,0.7]}]'
    assert last_boxes(f"<area>{first}</area><area>{last}</area>") == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.6, 0.7)]


@pytest.mark.parametrize("text", ["", "<area>", "<area>not JSON</area>", '<area>[{"bbox_2d":[1,2,3]}]</area>'])
def test_no_boxes(text):
    assert last_boxes(text) == []


def test_an_unreadable_last_area_does_not_fall_back_to_the_first():
    assert last_boxes('<area>[{"bbox_2d":[0,0,1,1]}]</area><area>oops</area>') == []


def test_plain_answers():
    assert plain_answer(" Yes. ") == "Yes."
    assert plain_answer("<think></think><answer> no </answer>") == "no"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('[{"label": "cup"}]', [{"label": "cup"}]),
        ("Here:\n```json\n[1, 2]\n```", [1, 2]),
        ("None.", []),
        ("[]", []),
        ("{}", None),
        ("cup", None),
        ("[" * 5000, None),
    ],
)
def test_json_lists(answer, found):
    assert json_list(answer) == found
