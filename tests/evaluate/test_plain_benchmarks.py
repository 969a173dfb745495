"""Benchmarks with short answers: MME, POPE, VQAv2, GQA."""

from __future__ import annotations

import pytest
from benchmark_files import bunny, headline, output, replies
from hypothesis import given
from hypothesis import strategies as st

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.item import Item, Reply
from sif_ray.evaluate.benchmarks.yesno import yes_or_no
from sif_ray.evaluate.vqa_text import normal, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "yes"), ("no.", "no"), ("Yes, it is. There is no other.", "yes"), ("It is not", "no"), ("", None),
        ("Maybe", None), ("yes and no", None), ("nothing", None), ("Norway", None), ("yesterday", None),
        ("There is\nyes", None),
    ],
)  # fmt: skip
def test_yes_or_no(answer, word):
    assert yes_or_no(answer) == word


def yes_no_items(rows) -> list[Item]:
    return [Item(str(i), category, f"{image}.jpg", "?", truth) for i, (category, image, truth) in enumerate(rows)]


def test_mme_points_by_hand():
    images = (("color", 1), ("color", 2), ("code_reasoning", 1))
    rows = [(category, image, truth) for category, image in images for truth in ("yes", "no")]
    texts = ["Yes", "No", "Yes", "Yes", "no", "perhaps"]
    found = [Reply(item, text) for item, text in zip(yes_no_items(rows), texts, strict=True)]
    assert headline("mme", found, "color") == (100 * (3 / 4 + 1 / 2),) * 2
    assert headline("mme", found, "perception") == (125, 125)
    assert headline("mme", found, "cognition") == (0, 0)
    assert headline("mme", found) == (125, 125)


@pytest.mark.parametrize(
    ("text", "strict", "published"),
    [("Yes", 200, 200), ("The answer is yes", 200, 0), (" yes", 200, 200), (output("Yes"), 200, 0), ("nyes", 0, 200)],
)
def test_mme_as_published_looks_at_four_characters(text, strict, published):
    assert headline("mme", [Reply(yes_no_items([("color", 1, "yes")])[0], text)]) == (strict, published)


WORDS = st.sampled_from(["Yes", "No", "yes, there is", "There is no cup.", "It is not", "Perhaps", "", "Yes. No."])


def naive_f1(truths: list[str], said: list[str]) -> float:
    true_positives = sum(t == s == "yes" for t, s in zip(truths, said, strict=True))
    claimed, real = said.count("yes"), truths.count("yes")
    if not true_positives:
        return 0.0
    precision, recall = true_positives / claimed, true_positives / real
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), WORDS), min_size=1, max_size=20))
def test_pope_against_precision_and_recall(rows):
    truths, texts = [truth for truth, _ in rows], [text for _, text in rows]
    found = [
        Reply(item, text) for item, text in zip(yes_no_items([("random", 1, t) for t in truths]), texts, strict=True)
    ]
    said = ["no" if {"No", "no", "not"} & set(t.split(".")[0].replace(",", "").split()) else "yes" for t in texts]
    strict_said = [yes_or_no(text) for text in texts]
    # Neither word is wrong: a missed "yes", a false one where "no" is true.
    counted = [word or ("no" if truth == "yes" else "yes") for word, truth in zip(strict_said, truths, strict=True)]
    for value, words in zip(headline("pope", found), (counted, said), strict=True):
        if "yes" in truths or "yes" in words:
            assert value == pytest.approx(naive_f1(truths, words))
    accuracies = [sum(w == t for w, t in zip(words, truths, strict=True)) / len(rows) for words in (strict_said, said)]
    assert headline("pope", found, measure=1) == pytest.approx(accuracies)


def test_pope_takes_silence_for_yes_as_published():
    items = yes_no_items([("random", 1, "yes"), ("random", 2, "no")])
    assert headline("pope", [Reply(item, "") for item in items], measure=1) == (0, 0.5)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("A Red Cup.", "red cup"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("it's 3.5", "it 's 3.5"),
        ("yes, sir?", "yes sir"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("the\nanswer", "answer"),
        ("wouldnt've", "wouldn't've"),
    ],
)
def test_answers_are_made_alike(answer, plain):
    assert normal(answer) == plain


@pytest.mark.parametrize(("same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_agreement_with_ten_people(same, score):
    """Ten ways to leave one person out: with three agreeing, 7 see three of them and 3 see two."""
    people = ["Two"] * same + [f"other {number}" for number in range(10 - same)]
    assert vqa_accuracy("2", people) == pytest.approx(score)


def test_vqav2_and_gqa(tmp_path):
    people = ["cup"] * 10
    path = bunny(tmp_path / "v.jsonl", [{"answers": people}] * 3)
    assert headline("vqav2", replies(BENCHMARKS["vqav2"], path, ["A cup.", output("cup"), "plate"])) == pytest.approx(
        (2 / 3, 1 / 3)
    )
    path = bunny(tmp_path / "g.jsonl", [{"answer": "cup"}] * 4)
    assert headline("gqa", replies(BENCHMARKS["gqa"], path, ["Cup.", "a cup", output("cup"), "cups"])) == (0.5, 0.25)
