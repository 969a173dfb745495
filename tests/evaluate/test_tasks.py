"""What is asked of a benchmark: which items, with which photographs, and which cannot be asked."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import benchmark_files as build
import pytest
from PIL import Image

from sif_ray.config import BenchmarkConfig, ConfigError, EngineConfig, EvaluateConfig, PromptConfig, RayConfig
from sif_ray.evaluate.answering import policies_at_once
from sif_ray.evaluate.answers import Answers
from sif_ray.evaluate.question import ANSWER_SCHEMA, QUESTION_SCHEMA, Answer, Key, Question, pack, unpack
from sif_ray.evaluate.task import BenchmarkTask, make_tasks
from sif_ray.method.prompts import SUFFIX
from sif_ray.toyworld.benchmarks import write

SETTINGS = EvaluateConfig(data="", temperatures=[0.5], draws=2)


def task_of(name, annotations, **others):
    return BenchmarkTask(name, BenchmarkConfig(name=name, annotations=str(annotations), **others), SETTINGS)


def test_every_item_is_asked_in_every_arm_and_draw(tmp_path):
    task = task_of("sat", build.sat(tmp_path / "s.parquet", [(("left", "right"), "left", 1)] * 3))
    arms = [("greedy", 0), ("sampled_T0.5", 0), ("sampled_T0.5", 1)]
    assert task.keys() == [Key("sat", arm, draw, str(number)) for number in range(3) for arm, draw in arms]
    again = pickle.loads(pickle.dumps(task))
    assert again.keys() == task.keys()
    assert [asked.key for asked in again.questions(set(task.keys()))] == task.keys()
    assert [asked.key for asked in again.questions({task.keys()[4]})] == [task.keys()[4]]


def test_what_cannot_be_asked_says_why(tmp_path):
    sat = task_of("sat", build.sat(tmp_path / "s.parquet", [(("a", "b"), "a", 1), (("a", "b"), "a", 2)]))
    small, several = [asked for asked in sat.questions(set(sat.keys())) if asked.arm == "greedy"]
    assert (small.refusal, several.refusal) == ("image_too_small", "several_images")  # the file's photograph is 4 x 3
    (tmp_path / "images/relative_position").mkdir(parents=True)
    (tmp_path / "images/relative_position/0.jpg").write_bytes(b"no picture")
    rows = [("relative_position", "A"), ("relative_position", "B")]
    vstar = task_of("vstar", build.vstar(tmp_path / "v.jsonl", rows), images=str(tmp_path / "images"))
    broken, missing = [asked for asked in vstar.questions(set(vstar.keys())) if asked.arm == "greedy"]
    assert (broken.refusal, missing.refusal) == ("image_unreadable", "image_missing")


def test_options_are_asked_in_an_order_of_their_own_where_that_is_wanted(tmp_path):
    options = ("left", "right", "above", "below")
    path = build.sat(tmp_path / "s.parquet", [(options, "left", 1)] * 20)
    plain, shuffled = task_of("sat", path), task_of("sat", path, shuffle=True)
    texts = [plain._question(item).text for item in plain.items]
    others = [shuffled._question(item).text for item in shuffled.items]
    assert others == [shuffled._question(item).text for item in pickle.loads(pickle.dumps(shuffled)).items]
    assert len(set(texts)) == 1 and len(set(others)) > 8
    assert all(sorted(text.splitlines()) == sorted(texts[0].splitlines()) for text in others)
    assert all(text.splitlines()[-1] == texts[0].splitlines()[-1] for text in others)
    assert plain.items == shuffled.items, "scoring knows the file's order"
    assert plain.origin() != shuffled.origin()
    with pytest.raises(ConfigError, match=r"benchmarks\.vstar\.shuffle: .* only in sat"):
        task_of("vstar", build.vstar(tmp_path / "v.jsonl", [("relative_position", "A")]), shuffle=True)


def test_photographs_inside_the_annotations_need_no_folder(tmp_path):
    annotations, _ = write("cvbench", tmp_path, 4)
    task = task_of("cvbench", annotations)
    asked = list(task.questions(set(task.keys())))
    assert [Image.open(io.BytesIO(one.photo)).size for one in asked] == [(112, 112)] * len(asked)
    assert not any(item.picture for item in task.items), "a list of all items stays small"


def test_drawn_items_keep_their_pairs_and_their_order(tmp_path):
    rows = [{"image": f"{n // 2}.jpg", "question": "?", "answer": "Yes", "id": f"e{n}"} for n in range(40)]
    path = build.write_json(tmp_path / "existence.json", rows)
    (tmp_path / "3.jpg").write_bytes(build.photo())
    task = task_of("spatialbench", path, images=str(tmp_path), max_items=11)
    numbers = [int(item.item_id[1:]) for item in task.items]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert all(a % 2 == 0 and b == a + 1 for a, b in zip(numbers[::2], numbers[1::2], strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "nosuch"}, "sif-ray eval list knows"),
        ({"name": "mmmu", "annotations": "toy"}, "no toy variant"),
        ({"images": ""}, "images = ''"),
        ({"images": "no/such/folder"}, "no image of the first 1 questions.*'relative_position/0.jpg'"),
        ({"name": "pope", "annotations": "toy", "max_items": 1}, "max_items = 1"),
        ({"annotations": "no/such/file.jsonl"}, "no such file"),
    ],
)
def test_wrong_benchmarks_are_refused(change, word, tmp_path):
    path = build.vstar(tmp_path / "v.jsonl", [("relative_position", "A")])
    values = {"name": "vstar", "annotations": str(path), "images": str(tmp_path), **change}
    config = EvaluateConfig(data="", output=str(tmp_path / "out"), benchmarks={"mine": BenchmarkConfig(**values)})
    with pytest.raises(ConfigError, match=word):
        make_tasks(config)


def test_a_question_is_asked_as_the_paper_asks():
    asked = Question("t", "greedy", 0, "1", "What is it?", photo=b"photo", depth_image=b"depth")
    [user] = asked.messages(PromptConfig(with_depth_words=False))
    assert [part["type"] for part in user["content"]] == ["text", "image", "text", "image", "text"]
    assert user["content"][-1]["text"] == f"\nWhat is it?{SUFFIX}"
    assert asked.images(PromptConfig()) == (b"photo", b"depth")
    rgb_only = PromptConfig(depth_image=False)
    assert [part["type"] for part in asked.messages(rgb_only)[0]["content"]] == ["image", "text"]
    assert asked.images(rgb_only) == (b"photo",)


def test_a_plain_question_is_the_photograph_and_its_words():
    asked = Question("t", "greedy", 0, "1", "Is it?", photo=b"photo", depth_image=b"depth", plain=True)
    system, user = asked.messages(PromptConfig())
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert user["content"] == [{"type": "image"}, {"type": "text", "text": "Is it?"}]
    assert asked.images(PromptConfig()) == (b"photo",)


def test_policies_run_side_by_side_where_there_is_room(tmp_path):
    thinking = task_of("sat", write("sat", tmp_path, 3)[0])
    plain = task_of("pope", *(str(place) for place in write("pope", tmp_path, 3)[:1]), images=str(tmp_path / "images"))
    config = replace(SETTINGS, depth_num_cpus=0.5)
    assert policies_at_once([plain], config, {"CPU": 4.0}) == 4
    assert policies_at_once([plain, thinking], config, {"CPU": 4.0}) == 2
    on_gpus = replace(config, engine=EngineConfig(num_gpus=1), depth_num_gpus=0.25)
    assert policies_at_once([thinking], on_gpus, {"CPU": 4.0, "GPU": 3.0}) == 2
    with pytest.raises(ConfigError, match=r"needs 0 CPUs and 1\.25 GPUs at once, and there are 4 and 1"):
        policies_at_once([thinking], on_gpus, {"CPU": 4.0, "GPU": 1.0})
    joined = replace(on_gpus, ray=RayConfig(address="auto"))
    assert policies_at_once([thinking], joined, {"CPU": 4.0}) == 1, "a cluster may grow"


def test_seeds_are_of_the_answer_alone():
    seeds = {Key(task, arm, draw, item).seed(0) for task in "ab" for arm in "xy" for draw in (0, 1) for item in "12"}
    assert len(seeds) == 4  # of item and draw: arms and policies share their luck
    assert seeds.isdisjoint({Key("a", "x", draw, item).seed(1) for draw in (0, 1) for item in "12"})


def test_questions_and_answers_travel_unchanged():
    questions = [
        Question("t", "greedy", 0, "1", "What?", photo=b"\x00\xff", depth_image=b"d", temperature=0.5),
        Question("t", "greedy", 1, "2", "", plain=True, refusal="image_missing"),
    ]
    assert unpack(pack(questions, QUESTION_SCHEMA)) == questions
    answer = Answer("t", "greedy", 0, "1", "text", 3)
    assert Answer(**pack([answer], ANSWER_SCHEMA)["batch"].to_pylist()[0][0]) == answer


def test_answers_are_kept_and_a_torn_line_is_forgotten(tmp_path):
    keys = [Key("t", arm, draw, str(n)) for arm, draw in (("greedy", 0), ("hot", 0), ("hot", 1)) for n in range(2)]
    given = [Answer(*key, text=f"{key}", num_tokens=3) for key in keys]
    answers = Answers(tmp_path, "t", {"policy": "a"})
    for answer in given:
        answers.add(answer)
    refused = Key("t", "greedy", 0, "refused")
    answers.add(Answer(*refused, refusal="image_missing"))
    assert refused not in answers.known([refused]), "it is tried again"
    answers.close()
    assert sorted(path.name for path in (tmp_path / "t").glob("*.jsonl")) == [
        "greedy.jsonl",
        "hot.1.jsonl",
        "hot.jsonl",
    ]
    with (tmp_path / "t/greedy.jsonl").open("a") as file:
        file.write('{"id": "torn", "te')
    again = Answers(tmp_path, "t", {"policy": "a"})
    assert again.known([*keys, Key("t", "greedy", 0, "torn")]) == dict(zip(keys, given, strict=True))
    again.add(Answer("t", "greedy", 0, "torn", "whole", 1))
    assert again.known([Key("t", "greedy", 0, "torn")]) == {
        Key("t", "greedy", 0, "torn"): Answer("t", "greedy", 0, "torn", "whole", 1)
    }
    again.close()
    with pytest.raises(ConfigError, match="another policy"):
        Answers(tmp_path, "t", {"policy": "b"})
    assert Answers(tmp_path, "t", {"policy": "b"}, resume=False).known(keys) == {}
