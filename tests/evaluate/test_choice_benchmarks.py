"""Benchmarks with lettered options: V*, CV-Bench, MMBench, SEED-Bench, MMMU."""

from __future__ import annotations

import pytest
from benchmark_files import bunny, cvbench, headline, mmbench, mmmu, output, replies, vstar
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.cvbench import published_choice
from sif_ray.evaluate.benchmarks.item import Item, Reply
from sif_ray.evaluate.benchmarks.mmmu import open_is_right, published_letter

# ------------------------------------------------------------------------------------------------------- V*


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [
        (output("A"), 1, 1),
        (output("(A) red"), 1, 1),
        (output("red"), 1, 0),
        (output("a"), 1, 0),  # the substring test knows capitals only
        (output("All of them are blue"), 0, 1),
        (output("Definitely B. A is wrong"), 0, 1),
        (output("(B), not (A)"), 0, 1),
        (output("A cup that is blue"), 0, 1),
        (output("B"), 0, 0),
        (output(None) + " A", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_letter_must_be_chosen_not_just_stand_there(tmp_path, text, strict, published):
    [reply] = replies(BENCHMARKS["vstar"], vstar(tmp_path / "q.jsonl", [("direct_attributes", "A")]), [text])
    assert headline("vstar", [reply]) == (strict, published)


def test_overall_is_over_items_and_categories_stand_alone(tmp_path):
    rows = [("direct_attributes", "A")] * 3 + [("relative_position", "B")]
    found = replies(BENCHMARKS["vstar"], vstar(tmp_path / "q.jsonl", rows), [output("A")] * 4)
    assert headline("vstar", found) == (0.75, 0.75)
    assert headline("vstar", found, "direct_attributes") == (1, 1)
    assert headline("vstar", found, "relative_position") == (0, 0)


# ------------------------------------------------------------------------------------------------- CV-Bench


@given(st.lists(st.tuples(st.sampled_from(["ADE20K", "COCO", "Omni3D"]), st.booleans()), min_size=1, max_size=40))
def test_the_combination(rows):
    """1/2 * ((ADE20K + COCO) / 2 + Omni3D), and the halves that are there where one is not."""
    found = [
        Reply(Item(str(i), source, "", "?", "A", choices=("x", "y"), task="t"), output("(A)" if right else "(B)"))
        for i, (source, right) in enumerate(rows)
    ]
    accuracy = {
        name: sum(right for source, right in rows if source == name) / len([1 for source, _ in rows if source == name])
        for name in {source for source, _ in rows}
    }
    two_d = [accuracy[name] for name in ("ADE20K", "COCO") if name in accuracy]
    halves = [sum(two_d) / len(two_d)] if two_d else []
    halves += [accuracy["Omni3D"]] if "Omni3D" in accuracy else []
    combined = sum(halves) / len(halves)
    assert headline("cvbench", found) == pytest.approx((combined, combined))


def test_by_hand(tmp_path):
    rows = [("ADE20K", "Count", "(A)")] * 4 + [
        ("COCO", "Spatial relation", "(A)"),
        ("Omni3D", "Depth order", "(A)"),
    ] * 2
    texts = [output("A")] + [output("B")] * 3 + [output("A"), output("B"), output("A"), output("A")]
    found = replies(BENCHMARKS["cvbench"], cvbench(tmp_path / "t.parquet", rows), texts)
    assert headline("cvbench", found)[0] == 0.5 * ((0.25 + 1.0) / 2 + 0.5)
    assert headline("cvbench", found, "2D")[0] == 0.625
    assert headline("cvbench", found, "Depth order", measure=1)[0] == 0.5


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("(B)", "b"), ("B", "b"), ("The answer is (C) two.", "c"), ("Answer: B.", "b"), ("10", "1"), ("", ""),
        ("because it is left, the answer is A", "a"), ("two", "t"),
    ],
)  # fmt: skip
def test_the_official_parser_takes_the_first_character(text, choice):
    assert published_choice(text) == choice


def test_the_official_parser_takes_ten_for_one(tmp_path):
    """Choices are 10, 1 and 2: "10" is cut to "1", which is the text of the second."""
    path = cvbench(tmp_path / "t.jsonl", [("COCO", "Count", "(B)"), ("COCO", "Count", "(A)")])
    assert headline("cvbench", replies(BENCHMARKS["cvbench"], path, [output("10"), output("10")])) == (0.5, 0.5)
    [first, second] = replies(BENCHMARKS["cvbench"], path, [output("10"), output("10")])
    assert headline("cvbench", [first]) == (0, 1)
    assert headline("cvbench", [second]) == (1, 0)


# ---------------------------------------------------------------------------------------------- plain choices


def test_mmbench(tmp_path):
    path = mmbench(tmp_path / "dev.tsv", ["A", "B", "C", "C"])
    found = replies(BENCHMARKS["mmbench"], path, ["A", "B. blue", "green", "A"])
    assert headline("mmbench", found) == (0.75, 0.25)


def test_seed_as_published_wants_the_letter_and_nothing_else(tmp_path):
    text = "What?\nA. one\nB. two\nC. three\nD. four"
    path = bunny(tmp_path / "seed.jsonl", [{"text": text, "answer": letter} for letter in "ABCD"])
    found = replies(BENCHMARKS["seed"], path, ["A", "B.", "three", "d"])
    assert headline("seed", found) == (1, 0.25)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("(A) no, (B)", "B"),
        ("A or rather C I think", "C"),
        ("it must be the one with the blue plate", "B"),
        ("blue", None),  # words count in more than five
        ("no idea", None),
        ("", None),
    ],
)
def test_the_official_letters_of_mmmu(text, letter):
    assert published_letter(text, ("red cup", "blue plate", "fork")) == letter


@pytest.mark.parametrize(
    ("text", "truths", "right"),
    [
        ("7", ["7"], True),
        ("The answer is 7.0", ["7"], True),
        ("so it is 1,234 in all", ["1234"], True),
        ("x = 12", ["12"], True),
        ("12 + 3", ["3"], True),  # every number counts
        ("12", ["2"], False),
        ("The result is a Gothic church", ["gothic"], True),
        ("Romanesque", ["gothic", "romanesque"], True),
        ("baroque", ["gothic"], False),
        ("b", ["b"], True),
        ("abc", ["b"], False),  # a single letter counts between blanks only
        ("2e3", ["2000"], True),
    ],
)
def test_the_official_open_answers_of_mmmu(text, truths, right):
    assert open_is_right(text, truths) is right


def test_mmmu_guesses_as_published_and_never_strictly(tmp_path):
    rows = [("multiple-choice", "['red', 'blue', 'green', 'white']", "B")] * 2 + [("open", "[]", "7")]
    found = replies(BENCHMARKS["mmmu"], mmmu(tmp_path / "Art.parquet", rows), ["no idea", "B", ""])
    assert headline("mmmu", found) == pytest.approx((1 / 3, (0.25 + 1 + 0) / 3))
