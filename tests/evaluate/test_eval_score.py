"""`sif-ray eval` as a user runs it: files in, results and refusals out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from benchmark_files import SAMPLES, bunny, needs_samples, output, spatialbench, viscot, vstar, write_lines
from faulty_http import served
from judge_servers import SmallJudge

from sif_ray.cli import main
from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.reference import references

LABELS = [
    ("direct_attributes", "A"),
    ("direct_attributes", "B"),
    ("relative_position", "C"),
    ("relative_position", "D"),
]


def score(folder: Path, benchmark: str, annotations: Path, predictions: list, *more: str) -> tuple[int, dict]:
    """Exit status and result; {} where there is none."""
    given, out = write_lines(folder / "predictions.jsonl", predictions), folder / "scores.json"
    files = ["--annotations", str(annotations), "--predictions", str(given), "--json", str(out)]
    status = main(["eval", "score", "--benchmark", benchmark, *files, *more])
    return status, json.loads(out.read_text()) if out.exists() else {}


def letters(*answers: str) -> list[dict]:
    return [{"id": f"q{number}", "text": output(answer)} for number, answer in enumerate(answers)]


def test_a_result_has_both_conventions_with_intervals_and_tables(tmp_path, capsys):
    path = vstar(tmp_path / "q.jsonl", LABELS)
    status, result = score(tmp_path, "vstar", path, letters("A", "All of B", "C", "A"))
    assert status == 0
    assert (result["strict"]["score"], result["published"]["score"]) == (0.5, 0.75)
    assert result["strict"]["n"] == result["n"] == 4
    low, high = result["strict"]["ci95"]
    assert low <= 0.5 <= high
    table = result["published"]["tables"]["accuracy"]
    assert list(table) == ["overall", "direct_attributes", "relative_position"]
    assert table["direct_attributes"]["score"] == 1 and table["relative_position"]["n"] == 2
    assert result["parse_failures"] == {"n": 1, "rate": 0.25}
    shown = capsys.readouterr().out
    assert "| overall | 4 | 0.500 [" in shown and "| relative_position | 2 |" in shown


def test_a_missing_prediction_is_wrong_and_a_surplus_one_is_told(tmp_path):
    path = vstar(tmp_path / "q.jsonl", LABELS)
    predictions = [*letters("A", "B"), {"id": "q3", "text": output("D")}, {"id": "other", "text": "x"}]
    status, result = score(tmp_path, "vstar", path, predictions)
    assert status == 0
    assert result["missing"] == {"n": 1, "first": ["q2"]} and result["surplus"] == {"n": 1, "first": ["other"]}
    assert result["strict"]["score"] == 0.75


def test_a_missing_prediction_is_right_only_where_the_defect_is(tmp_path):
    path = spatialbench(tmp_path, "positional", ["left", "right"])
    status, result = score(tmp_path, "spatialbench", path, [{"id": "positional_0", "text": output("on the left")}])
    assert (status, result["strict"]["score"], result["published"]["score"]) == (0, 0.5, 1)


def test_ids_may_be_numbers_and_positions(tmp_path):
    rows = [{"image": "a.jpg", "question": "?", "answer": "left"}] * 2
    path = tmp_path / "positional.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    _, result = score(tmp_path, "spatialbench", path, [{"id": number, "text": output("left")} for number in (1, 0)])
    assert result["strict"]["score"] == 1


def test_an_id_that_is_asked_twice_is_answered_in_order(tmp_path):
    same = {"question_id": "color/1.jpg", "image": "color/1.jpg", "category": "color"}
    path = bunny(tmp_path / "bunny_mme.jsonl", [{**same, "answer": "Yes"}, {**same, "answer": "No"}])
    predictions = [{"id": "color/1.jpg", "text": text} for text in ("Yes", "No")]
    assert score(tmp_path, "mme", path, predictions)[1]["strict"]["score"] == 200
    status, _ = score(tmp_path, "mme", path, [*predictions, predictions[0]])
    assert status == 2


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"id": "q0", "text": "A"}, {"id": "q0", "text": "B"}], "line 2: field 'id' is 'q0' once more"),
        ([{"id": "x", "text": "A"}, {"id": "x", "text": "B"}], "line 2: field 'id' is 'x' once more"),
        ([{"id": "q0"}], "line 1: field 'text'"),
        ([{"id": "q0", "text": None}], "line 1: field 'text'"),
        ([{"text": "A"}], "line 1: field 'id'"),
        ([{"id": [1], "text": "A"}], "line 1: field 'id'"),
        (["q0"], "line 1: 'q0' is not an object"),
        ([], "holds no row"),
    ],
)
def test_wrong_predictions_are_told_by_line_and_field(tmp_path, capsys, lines, says):
    status, result = score(tmp_path, "vstar", vstar(tmp_path / "q.jsonl", LABELS), lines)
    assert (status, result) == (2, {})
    told = capsys.readouterr().err
    assert told.startswith("sif-ray eval score: ") and f"predictions.jsonl, {says}" in told.replace(
        "jsonl: ", "jsonl, "
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bootstrap-samples", "0"], "--bootstrap-samples"),
        (["--judge", "absent.yaml"], "absent.yaml"),
        (["--answers", "labels"], "--answers"),
        (["--json", "absent/scores.json"], "--json"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, arguments, says):
    status, _ = score(tmp_path, "vstar", vstar(tmp_path / "q.jsonl", LABELS), letters("A"), *arguments)
    assert status == 2 and says in capsys.readouterr().err


def test_questions_without_answers_cannot_be_scored(tmp_path, capsys):
    path = bunny(tmp_path / "bunny_pope_test.jsonl", [{}])
    status, _ = score(tmp_path, "pope", path, [{"id": "0", "text": "Yes"}])
    told = capsys.readouterr().err
    assert status == 2 and "1 of 1 questions have no answer" in told and "coco_pope_random.json" in told


@needs_samples
def test_real_questions_with_the_exact_judge(tmp_path):
    path = SAMPLES / "viscot/benchmark/cub.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    right = [{"id": row["question_id"], "text": output(row["conversations"][3]["value"])} for row in rows]
    right[0]["text"] = output("None of these")
    _, result = score(tmp_path, "viscot", path, right)
    assert result["strict"]["tables"]["judge score"]["cub"]["score"] == pytest.approx(15 / 16)
    assert result["judge"] == {"kind": "exact"}


def judge_file(folder: Path, url: str) -> str:
    settings = {"kind": "llm", "model": "small", "base_url": f"{url}/v1", "max_retries": 0, "max_wait_s": 0.0}
    settings["max_concurrency"] = 1
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def test_a_chat_model_judges_the_answers_without_the_photo(tmp_path):
    judge = SmallJudge()
    with served(judge.app()) as url:
        predictions = [{"id": 7, "text": output("A cup")}, {"id": 9, "text": output("A cap")}]
        more = ("--judge", judge_file(tmp_path, url))
        status, result = score(tmp_path, "viscot", viscot(tmp_path), predictions, *more)
    assert status == 0 and not judge.images
    assert result["strict"]["score"] == pytest.approx((1 + 0.8) / 2)
    assert result["judge"] == {"kind": "llm", "model": "small"}


def test_what_the_judge_cannot_score_is_told_and_left_out(tmp_path):
    judge = SmallJudge()
    judge.reply = lambda shown: '{"score": 1}' if shown["model_answer"] != "A cap" else "fine"
    with served(judge.app()) as url:
        predictions = [{"id": 7, "text": output("A cup")}, {"id": 9, "text": output("A cap")}]
        more = ("--judge", judge_file(tmp_path, url))
        _, result = score(tmp_path, "viscot", viscot(tmp_path), predictions, *more)
    assert result["unjudged"] == 1
    assert (result["strict"]["score"], result["strict"]["n"], result["published"]["score"]) == (1, 1, 0.5)


def test_a_judge_that_answers_nobody_is_an_error_and_what_it_has_said_is_kept(tmp_path, caplog):
    judge = SmallJudge()

    def down_after_two(_: object) -> str:
        if len(judge.shown) > 2:
            raise web.HTTPServiceUnavailable
        return '{"score": 1}'  # of the question before a run, and of one answer

    judge.reply = down_after_two
    predictions = [{"id": 7, "text": output("A cup")}, {"id": 9, "text": output("A cap")}]
    with served(judge.app()) as url:
        more = ("--judge", judge_file(tmp_path, url))
        status, result = score(tmp_path, "viscot", viscot(tmp_path), predictions, *more)
        assert (status, result) == (1, {}) and url in caplog.text and "run this again" in caplog.text
        judge.shown.clear()
        judge.reply = lambda _: '{"score": 0.5}'
        status, result = score(tmp_path, "viscot", viscot(tmp_path), predictions, *more)
    assert (status, len(judge.shown)) == (0, 2)  # the question before a run, and the other answer
    assert result["strict"]["score"] == 0.75


def test_two_policies_are_compared_on_the_same_items(tmp_path):
    path = vstar(tmp_path / "q.jsonl", LABELS * 1)
    ours = write_lines(tmp_path / "ours.jsonl", letters("A", "B", "C", "A"))
    theirs = write_lines(tmp_path / "theirs.jsonl", letters("A", "A", "A", "A"))
    files = ["--annotations", str(path), "--predictions", str(ours), "--baseline", str(theirs)]
    assert main(["eval", "compare", "--benchmark", "vstar", *files, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["strict"]["accuracy"]["overall"]["difference"] == 0.5
    assert result["strict"]["mcnemar"] == {"only_ours": 2, "only_baseline": 0, "p": 0.5}


def test_the_list_names_every_benchmark(capsys):
    assert main(["eval", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}\n" in shown for name in BENCHMARKS)
    assert main(["eval", "list", "spatialbench"]) == 0
    assert "gated" in capsys.readouterr().out


def test_published_numbers_have_a_source_and_stand_apart(tmp_path, capsys):
    path = spatialbench(tmp_path, "positional", ["left"])
    _, result = score(tmp_path, "spatialbench", path, [{"id": "positional_0", "text": output("left")}])
    shown = capsys.readouterr().out
    assert "73.5" in shown.split("Published elsewhere, not measured here:")[1]
    assert "73.5" not in json.dumps(result)
    assert all(one.source and one.scores for name in BENCHMARKS for one in references(name))
