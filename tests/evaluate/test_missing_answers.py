"""SpatialBench and SAT: pair rules, and the two defects that count a missing answer as right.

The released scripts are written out here once more, as plainly as they work on one list of responses.
"""

from __future__ import annotations

import re

import pytest
from benchmark_files import headline, output, replies, sat, spatialbench
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.item import Item, Reply

ANSWERS = st.sampled_from(
    [
        "Yes",
        "No",
        "Yes, it is",
        "yes",
        "",
        "No.",
        "3",
        "4",
        " 3 ",
        "three",
        "-2",
        None,
        "left side",
        "the left",
        "right",
    ]
)


def extracted(text: str) -> str | None:
    match = re.search(r"<answer>\n?(.*?)\n?</answer>", text, re.DOTALL)
    return match.group(1).strip() if match else None


def released_spatialbench(category: str, truths: list[str], texts: list[str]) -> float:
    responses = [extracted(text) or truth for text, truth in zip(texts, truths, strict=True)]
    right = [truth in response for truth, response in zip(truths, responses, strict=True)]
    if category in ("reach", "size"):
        points = sum(a + b + (a and b) for a, b in zip(right[0::2], right[1::2], strict=True))
        return points / (3 * (len(right) // 2))
    if category == "existence":
        return sum(a and b for a, b in zip(right[0::2], right[1::2], strict=True)) / (len(right) // 2)
    if category == "positional":
        return sum(right) / len(right)
    errors = []
    for truth, response in zip(truths, responses, strict=True):
        try:
            errors.append(abs(int(response) - int(truth)) / int(truth))
        except ValueError:
            errors.append(1.0)  # there it crashes; the decision here is a score of 0
    return 1 - sum(errors) / len(errors)


def spatial_replies(category: str, truths: list[str], texts: list[str]) -> list[Reply]:
    return [Reply(Item(str(i), category, "", "?", t), x) for i, (t, x) in enumerate(zip(truths, texts, strict=True))]


@given(
    st.sampled_from(["positional", "existence", "reach", "size", "counting"]),
    st.lists(st.tuples(ANSWERS, ANSWERS, st.booleans()), min_size=1, max_size=8),
)
def test_the_published_score_is_that_of_the_released_script(category, pairs):
    truths = ["3" if category == "counting" else truth for _ in pairs for truth in ("Yes", "No")]
    texts = [output(answer) for first, second, _ in pairs for answer in (first, second)]
    found = spatial_replies(category, truths, texts)
    strict, published = headline("spatialbench", found)
    assert published == pytest.approx(released_spatialbench(category, truths, texts))
    # Strictly only a missing answer is scored otherwise: with an answer that is wrong in its place nothing differs.
    wrong = [text if extracted(text) else output("wrong") for text in texts]
    assert strict == pytest.approx(released_spatialbench(category, truths, wrong))


@pytest.mark.parametrize(
    ("category", "first", "second", "score"),
    [
        ("existence", "Yes", "No", 1),
        ("existence", "Yes", "Yes", 0),
        ("reach", "Yes", "No", 1),
        ("reach", "Yes", "Yes", 1 / 3),
        ("reach", "No", "No", 1 / 3),
        ("size", "No", "Yes", 0),
    ],
)
def test_pairs(tmp_path, category, first, second, score):
    path = spatialbench(tmp_path, category, ["Yes", "No"])
    found = replies(BENCHMARKS["spatialbench"], path, [output(first), output(second)])
    assert headline("spatialbench", found) == pytest.approx((score, score))


def test_half_a_pair_without_an_answer(tmp_path):
    path = spatialbench(tmp_path, "size", ["Yes", "No"])
    found = replies(BENCHMARKS["spatialbench"], path, [output("Yes"), output(None)])
    assert headline("spatialbench", found) == pytest.approx((1 / 3, 1))


@pytest.mark.parametrize(("answer", "score"), [("4", 1), ("3", 0.75), ("12", -1), ("four", 0), ("4.0", 0), ("0", 0)])
def test_counting(tmp_path, answer, score):
    found = replies(BENCHMARKS["spatialbench"], spatialbench(tmp_path, "counting", ["4"]), [output(answer)])
    assert headline("spatialbench", found) == pytest.approx((score, score))


def test_the_five_categories_count_alike(tmp_path):
    for category, truths in (
        ("positional", ["left"] * 4), ("existence", ["Yes", "No"]), ("counting", ["2"]), ("reach", ["Yes", "No"]),
        ("size", ["Yes", "No"] * 3),
    ):  # fmt: skip
        spatialbench(tmp_path, category, truths)
    texts = [output("left")] + [output(None)] * 14
    strict, published = headline("spatialbench", replies(BENCHMARKS["spatialbench"], tmp_path, texts))
    assert (strict, published) == (pytest.approx(0.25 / 5), 1)


# ------------------------------------------------------------------------------------------------------ SAT


def released_sat(rows: list[tuple[list[str], str, int]], texts: list[str]) -> float:
    correct = 0
    for (choices, truth, num_images), text in zip(rows, texts, strict=True):
        if num_images > 1:
            continue
        truth = truth.strip().lower()
        match = re.search(r"<answer>\n?(.*?)\n?</answer>", text.strip().lower(), re.DOTALL)
        response = match.group(1).strip() if match else truth
        correct += next((choice.lower() for choice in choices if choice.lower() in response), None) == truth
    return correct / len(rows)


SAT_ROWS = st.tuples(
    st.sampled_from([["left", "right"], ["left", "left side"], ["Rotated left", "rotated right"]]),
    st.integers(0, 1),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from(["left", "LEFT side", "the right one", "", "up", "rotated Left", None]),
    st.booleans(),
)


@given(st.lists(SAT_ROWS, min_size=1, max_size=8))
def test_the_published_score_is_that_of_the_released_script_for_sat(rows):
    table = [(choices, choices[right], num_images) for choices, right, num_images, _, _ in rows]
    texts = [output(answer).upper() if upper else output(answer) for *_, answer, upper in rows]
    found = [
        Reply(Item(str(i), "x", "", "?", truth.lower(), choices=tuple(choices), num_images=num), text)
        for i, ((choices, truth, num), text) in enumerate(zip(table, texts, strict=True))
    ]
    strict, published = headline("sat", found)
    assert published == pytest.approx(released_sat(table, texts))
    single = [(row, text) for row, text in zip(table, texts, strict=True) if row[2] == 1]
    if single:
        wrong = [text if "answer>" in text.lower() else output("none of them") for _, text in single]
        assert strict == pytest.approx(released_sat([row for row, _ in single], wrong))


def test_the_first_option_that_is_contained_counts(tmp_path):
    path = sat(tmp_path / "sat.parquet", [(("left", "left side"), "left side", 1), (("left", "right"), "right", 1)])
    found = replies(BENCHMARKS["sat"], path, [output("left side"), output("right, not left")])
    assert headline("sat", found) == (0, 0)


def test_several_images_are_no_questions_strictly_and_wrong_as_published(tmp_path):
    path = sat(tmp_path / "sat.parquet", [(("a1", "b1"), "a1", 1), (("a1", "b1"), "b1", 2)])
    assert headline("sat", replies(BENCHMARKS["sat"], path, [output("a1"), output("b1")])) == (1, 0.5)
