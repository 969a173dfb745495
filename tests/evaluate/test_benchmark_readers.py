"""Every benchmark's published files become items; wrong ones are told by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import benchmark_files as build
import pytest
from benchmark_files import SAMPLES, items_of, needs_samples

from sif_ray.config import ConfigError
from sif_ray.evaluate.benchmarks import BENCHMARKS, choose
from sif_ray.evaluate.benchmarks.viscot import DATASETS


def raw_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- real rows


@needs_samples
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("viscot/benchmark/*.json")), ids=lambda path: path.stem)
def test_real_questions_of_visual_cot(path):
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = items_of("viscot", path)
    assert [item.item_id for item in found] == [str(row["question_id"]) for row in rows]
    for item, row in zip(found, rows, strict=True):
        asked = row["conversations"][0]["value"]
        assert asked.startswith(f"<image>\n{item.question}") and "bounding box" not in item.question
        assert item.answer == row["conversations"][3]["value"]
        assert (item.category, item.image) == (row["dataset"], row["image"][0])


@needs_samples
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("viscot/benchmark_det/*.jsonl")), ids=lambda path: path.stem)
def test_real_detections_of_visual_cot(path):
    rows = raw_lines(path)
    found = list(choose("viscot", path).items(path))
    assert [item.item_id for item in found] == [str(row["question_id"]) for row in rows]
    assert [item.boxes_xyxy_px for item in found] == [(tuple(map(float, row["bbox"])),) for row in rows]
    assert [(item.width, item.height) for item in found] == [(row["width"], row["height"]) for row in rows]
    assert {item.category for item in found} == {path.stem}


@needs_samples
def test_a_folder_of_visual_cot_is_its_eleven_official_sets():
    for name, folder in (("viscot", "benchmark"), ("viscot_det", "benchmark_det")):
        found = items_of(name, SAMPLES / "viscot" / folder)
        assert list(dict.fromkeys(item.category for item in found)) == list(DATASETS)
        assert len({item.item_id for item in found}) == len(found) == 16 * 11
        assert found[0].item_id == "docvqa/0"


@needs_samples
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("rec/*.jsonl")), ids=lambda path: path.stem)
def test_real_rows_of_refcoco(path):
    rows = raw_lines(path)
    found = items_of("refcoco", path)
    assert [item.item_id for item in found] == [str(row["sent_id"]) for row in rows]
    assert all(row["expression"] in item.question for item, row in zip(found, rows, strict=True))
    assert [item.boxes_xyxy_px[0] for item in found] == [tuple(row["bbox"]) for row in rows]
    assert {f"REC_{item.category}" for item in found} == {path.stem}


@needs_samples
def test_a_folder_of_refcoco_has_eight_splits():
    assert len({item.category for item in items_of("refcoco", SAMPLES / "rec")}) == 8


@needs_samples
@pytest.mark.parametrize(
    ("name", "file"),
    [("mme", "bunny_mme"), ("pope", "bunny_pope_test"), ("gqa", "bunny_gqa_testdev_balanced"), ("seed", "bunny_mme")],
)
def test_real_general_questions_can_be_asked_without_their_labels(name, file, tmp_path):
    path = SAMPLES / f"general/{file}.jsonl"
    if name == "seed":  # the same layout; MME's rows stand for its own
        path = build.write_lines(tmp_path / "seed.jsonl", raw_lines(path))
    rows = raw_lines(path)
    found = items_of(name, path)
    assert [item.question for item in found] == [row["text"] for row in rows]
    assert [item.image for item in found] == [row["image"] for row in rows]
    assert not any(item.has_truth for item in found)
    assert all(item.plain for item in found)
    own = [str(row["question_id"]) for row in rows]
    assert [item.item_id.split("#")[0] for item in found] == own
    assert len({item.item_id for item in found}) == len(rows)


# --------------------------------------------------------------------------- files built after the descriptions


def test_a_question_is_asked_as_the_paper_asks(tmp_path):
    [item, _] = items_of("viscot", build.viscot(tmp_path))
    assert (item.item_id, item.question, item.answer, item.image) == ("7", "What is it?", "A cup", "cot/gqa/1.jpg")
    assert not item.plain


def test_refcoco_asks_for_the_region(tmp_path):
    [item] = items_of("refcoco", build.boxes(tmp_path / "REC_refcoco_unc_val.jsonl", [((1, 2, 3, 4), 10, 20)]))
    assert item.question == (
        "Please provide the bounding box coordinate of the region this sentence describes: the red cup."
    )


def test_spatialbench_takes_its_five_scored_files(tmp_path):
    build.spatialbench(tmp_path, "positional", ["left", "right"])
    build.spatialbench(tmp_path, "counting", ["3"])
    build.spatialbench(tmp_path, "existence", ["Yes", "No"])
    build.write_json(tmp_path / "grounding.json", [{"id": "grounding_0", "objects": []}])
    found = items_of("spatialbench", tmp_path)
    assert [item.category for item in found] == ["positional"] * 2 + ["existence"] * 2 + ["counting"]
    assert found[0].item_id == "positional/positional_0"
    [first, _] = items_of("spatialbench", tmp_path / "positional.json")
    assert (first.item_id, first.image) == ("positional_0", "positional/0.jpg")


def test_rows_without_an_id_have_their_position(tmp_path):
    rows = [{"image": ["a.jpg"], "question": "?", "answer": answer} for answer in (2, "4")]
    found = items_of("spatialbench", build.write_json(tmp_path / "counting.json", rows))
    assert [(item.item_id, item.answer) for item in found] == [("0", "2"), ("1", "4")]


def test_sat_lists_its_choices(tmp_path):
    found = items_of(
        "sat", build.sat(tmp_path / "static.parquet", [(("Left ", "right"), "Right", 1), (("a", "b"), "a", 2)])
    )
    assert found[0].question == (
        "Where is it?\nChoices:\n- Left \n- right\nAnswer strictly with only one of the above options."
    )
    assert (found[0].answer, found[0].category) == ("right", "obj_movement")
    assert [(item.item_id, item.num_images) for item in found] == [("0", 1), ("1", 2)]


def test_vstar_knows_its_options(tmp_path):
    [item] = items_of("vstar", build.vstar(tmp_path / "test_questions.jsonl", [("relative_position", "C")]))
    assert [choice.strip() for choice in item.choices] == ["red", "blue", "green", "white"]
    assert (item.item_id, item.answer, item.category) == ("q0", "C", "relative_position")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_cvbench_in_both_of_its_kinds_of_file(tmp_path, suffix):
    rows = [("COCO", "Count", "(B)"), ("Omni3D", "Depth order", "(A)")]
    first, second = items_of("cvbench", build.cvbench(tmp_path / f"test.{suffix}", rows))
    assert (first.item_id, first.category, first.task, first.answer) == ("10", "COCO", "Count", "B")
    assert second.question.startswith("How many cups? Select")


def test_ovdeval_asks_for_what_is_there_and_what_is_not(tmp_path):
    first, second = items_of("ovdeval", build.ovdeval(tmp_path))
    assert (first.item_id, first.category, first.labels) == ("5", "color", ("red cup", "blue cup"))
    assert '["red cup", "blue cup"]' in first.question
    assert (second.boxes_xyxy_px, second.box_labels) == (((50.0, 20.0, 90.0, 60.0),), ("blue cup",))


def test_mme_finds_its_labels_in_the_release_folder(tmp_path):
    asked = "Is it {}?\nAnswer the question using a single word or phrase."
    rows = [
        {"question_id": "color/7.jpg", "image": "color/7.jpg", "text": asked.format(word), "category": "color"}
        for word in ("red", "blue")
    ]
    path = build.write_lines(tmp_path / "bunny_mme.jsonl", rows)
    labels = tmp_path / "MME_Benchmark_release_version/color/questions_answers_YN"
    labels.mkdir(parents=True)
    (labels / "7.txt").write_text(
        "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n", encoding="utf-8"
    )
    found = items_of("mme", path, tmp_path / "MME_Benchmark_release_version")
    assert [(item.item_id, item.answer) for item in found] == [("color/7.jpg", "yes"), ("color/7.jpg#2", "no")]


def test_pope_finds_its_labels_in_the_official_files(tmp_path):
    rows = [{"category": "random", "image": "a.jpg"}, {"category": "adversarial", "image": "a.jpg"}]
    path = build.bunny(tmp_path / "bunny_pope_test.jsonl", rows)
    for category, label in (("random", "no"), ("adversarial", "yes")):
        official = [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": label}]
        build.write_lines(tmp_path / f"coco_pope_{category}.json", official)
    assert [item.answer for item in items_of("pope", path, tmp_path)] == ["no", "yes"]
    [item] = items_of("pope", tmp_path / "coco_pope_adversarial.json")
    assert (item.category, item.answer) == ("adversarial", "yes")


def test_gqa_finds_its_labels_and_types(tmp_path):
    path = build.bunny(tmp_path / "bunny_gqa.jsonl", [{"question_id": "201"}])
    question = {"answer": "yes", "types": {"structural": "verify"}}
    [item] = items_of("gqa", path, build.write_json(tmp_path / "testdev_balanced_questions.json", {"201": question}))
    assert (item.answer, item.category) == ("yes", "verify")


def test_vqav2_finds_the_ten_answers(tmp_path):
    path = build.bunny(tmp_path / "bunny_vqav2.jsonl", [{"question_id": 42}])
    people = [{"answer": f"a{number}", "answer_id": number} for number in range(10)]
    annotations = {"annotations": [{"question_id": 42, "answer_type": "other", "answers": people}]}
    [item] = items_of("vqav2", path, build.write_json(tmp_path / "v2_mscoco_val2014_annotations.json", annotations))
    assert (item.answers, item.category) == (tuple(f"a{number}" for number in range(10)), "other")


def test_seed_finds_its_letters(tmp_path):
    text = "What?\nA. one\nB. two\nC. three\nD. four\nAnswer with the option's letter from the given choices directly."
    path = build.bunny(tmp_path / "seed.jsonl", [{"question_id": 9, "text": text}])
    questions = {"questions": [{"question_id": "9", "answer": "C"}], "question_type": {}}
    [item] = items_of("seed", path, build.write_json(tmp_path / "SEED-Bench.json", questions))
    assert (item.answer, [choice.strip() for choice in item.choices]) == ("C", ["one", "two", "three", "four"])


def test_mmbench_reads_long_rows_and_missing_options(tmp_path):
    first, second = items_of("mmbench", build.mmbench(tmp_path / "dev.tsv", ["A", "C"]))
    ask = "Which?\nA. red\nB. blue\nC. green\nAnswer with the option's letter from the given choices directly."
    assert (first.item_id, first.question, first.choices) == ("50", ask, ("red", "blue", "green"))
    assert second.question == f"Look closely.\n{ask}" and second.answer == "C"


def test_mmmu_reads_both_kinds_of_question(tmp_path):
    rows = [("multiple-choice", "['x', \"it's\"]", "B"), ("open", "[]", "['7', 'seven']"), ("open", "[]", "3.5")]
    lettered, several, one = items_of("mmmu", build.mmmu(tmp_path / "Art_Theory.parquet", rows))
    assert (lettered.choices, lettered.answer, lettered.category) == (("x", "it's"), "B", "Art_Theory")
    assert "(A) x\n(B) it's\n" in lettered.question
    assert (several.answers, one.answers) == (("7", "seven"), ("3.5",))
    withheld = build.mmmu(tmp_path / "test.parquet", [("multiple-choice", "['x', 'y']", "?"), ("open", "[]", "?")])
    assert not any(item.has_truth for item in items_of("mmmu", withheld))


# ----------------------------------------------------------------------------------------------- wrong files


def broken(build_file: Callable[[Path], Path], change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """The file with its last row changed."""

    def make(folder: Path) -> Path:
        path = build_file(folder)
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
            change(rows[-1])
            return build.write_parquet(path, rows)
        rows = json.loads(path.read_text()) if path.suffix == ".json" else raw_lines(path)
        change(rows["images"][-1] if isinstance(rows, dict) else rows[-1])
        return build.write_json(path, rows) if path.suffix == ".json" else build.write_lines(path, rows)

    return make


def two_boxes(folder: Path) -> Path:
    return build.boxes(folder / "REC_refcoco_unc_val.jsonl", [((1, 2, 3, 4), 10, 20)] * 2)


WRONG = {
    "viscot without an answer": (
        "viscot",
        broken(build.viscot, lambda row: row["conversations"][3].update(value="")),
        r"gqa\.json, line 29: field 'conversations\[-1\].value'",
    ),
    "viscot without turns": (
        "viscot",
        broken(build.viscot, lambda row: row.update(conversations=[])),
        "'conversations'",
    ),
    "viscot without images": ("viscot", broken(build.viscot, lambda row: row.update(image=[])), "field 'image'"),
    "refcoco without a width": (
        "refcoco",
        broken(two_boxes, lambda row: row.pop("width")),
        r"val\.jsonl, line 2: field 'width' is missing",
    ),
    "refcoco with an empty box": (
        "refcoco",
        broken(two_boxes, lambda row: row.update(bbox=[3, 2, 3, 4])),
        "line 2: field 'bbox'",
    ),
    "spatialbench with a count of zero": (
        "spatialbench",
        lambda folder: build.spatialbench(folder, "counting", ["3", "0"]),
        r"line \d+: field 'answer'",
    ),
    "spatialbench without a second": (
        "spatialbench",
        lambda folder: build.spatialbench(folder, "reach", ["Yes", "No", "Yes"]),
        r"line \d+: .*pair",
    ),
    "spatialbench's grounding": (
        "spatialbench",
        lambda folder: build.write_json(folder / "grounding.json", [{}]),
        "name says the category",
    ),
    "sat without choices": (
        "sat",
        broken(
            lambda folder: build.sat(folder / "sat.parquet", [(("a", "b"), "a", 1)]),
            lambda row: row.update(answers=["a"]),
        ),
        r"sat\.parquet, row 0: field 'answers'",
    ),
    "vstar with a word as label": (
        "vstar",
        lambda folder: build.vstar(folder / "q.jsonl", [("relative_position", "A"), ("relative_position", "red")]),
        r"q\.jsonl, line 2: field 'label'",
    ),
    "vstar with a third category": (
        "vstar",
        lambda folder: build.vstar(folder / "q.jsonl", [("size", "A")]),
        "line 1: field 'category'",
    ),
    "cvbench with a bare letter": (
        "cvbench",
        lambda folder: build.cvbench(folder / "t.jsonl", [("COCO", "Count", "B")]),
        "line 1: field 'answer'",
    ),
    "cvbench with a letter that no choice has": (
        "cvbench",
        lambda folder: build.cvbench(folder / "t.jsonl", [("COCO", "Count", "(D)")]),
        "line 1: field 'answer'",
    ),
    "cvbench with another source": (
        "cvbench",
        lambda folder: build.cvbench(folder / "t.jsonl", [("LVIS", "Count", "(A)")]),
        "line 1: field 'source'",
    ),
    "ovdeval without labels": (
        "ovdeval",
        broken(build.ovdeval, lambda row: row.pop("text")),
        r"color\.json, images\[1\]: field 'text'",
    ),
    "ovdeval with boxes on no image": (
        "ovdeval",
        broken(build.ovdeval, lambda row: row.update(id=7)),
        "'annotations' names images that are not there",
    ),
    "mme with an unknown category": (
        "mme",
        lambda folder: build.bunny(folder / "m.jsonl", [{"category": "taste"}]),
        "line 1: field 'category'",
    ),
    "pope with another label": (
        "pope",
        lambda folder: build.bunny(folder / "p.jsonl", [{"label": "maybe"}]),
        "line 1: field 'answer'",
    ),
    "vqav2 with one person": (
        "vqav2",
        lambda folder: build.bunny(folder / "v.jsonl", [{"answers": ["x"]}]),
        "line 1: field 'answers'",
    ),
    "mmbench with a letter without text": (
        "mmbench",
        lambda folder: build.mmbench(folder / "d.tsv", ["D"]),
        r"d\.tsv, line 2: field 'answer'",
    ),
    "mmmu with options that are no list": (
        "mmmu",
        lambda folder: build.mmmu(folder / "m.parquet", [("multiple-choice", "[x", "A")]),
        "row 0: field 'options'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_told_by_line_and_field(tmp_path, case):
    name, make, says = WRONG[case]
    with pytest.raises(ConfigError, match=says):
        items_of(name, make(tmp_path))


def test_a_folder_holds_both_halves_of_cvbench(tmp_path):
    build.cvbench(tmp_path / "test_2d.parquet", [("COCO", "Count", "(A)")])
    build.cvbench(tmp_path / "test_3d.parquet", [("Omni3D", "Depth order", "(A)")])
    assert [item.item_id for item in items_of("cvbench", tmp_path)] == ["COCO/10", "Omni3D/10"]


def test_a_folder_of_mmmu_is_as_published(tmp_path):
    (tmp_path / "Art_Theory").mkdir()
    build.mmmu(tmp_path / "Art_Theory/validation-00000-of-00001.parquet", [("open", "[]", "7")])
    assert [item.item_id for item in items_of("mmmu", tmp_path)] == ["Art_Theory/validation_Art_Theory_1"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_file_says_where_it_comes_from(tmp_path, name):
    with pytest.raises(ConfigError) as refused:
        items_of(name, tmp_path / "absent.json")
    assert BENCHMARKS[name].obtain in str(refused.value)


def test_labels_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--answers .*coco_pope_random"):
        items_of("pope", build.bunny(tmp_path / "p.jsonl", [{}]), tmp_path / "absent")


def test_labels_that_are_no_utf_8_are_refused(tmp_path):
    answers = tmp_path / "v2_mscoco_val2014_annotations.json"
    answers.write_bytes(b'{"annotations": [{"question_id": "\xc1\xb7"}]}')
    with pytest.raises(ConfigError, match=r"--answers .*v2_mscoco_val2014"):
        items_of("vqav2", build.bunny(tmp_path / "v.jsonl", [{"question_id": 42}]), answers)


def test_labels_that_are_not_looked_at_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--answers"):
        items_of("viscot", build.viscot(tmp_path), tmp_path)
