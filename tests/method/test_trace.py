from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.method.trace import (
    EXPLANATIONS,
    MAX_AREA_BOXES,
    AreaBox,
    Reason,
    Step,
    Trace,
    TraceError,
    find_answer,
    find_areas,
    parse,
)

FULL = '{"bbox_2d":[0,0,1,1],"depth":0.5}'
BOX = '{"bbox_2d":[0.1,0.2,0.3,0.4],"depth":0.25}'


def area(content: str) -> str:
    return f"<think><area>{content}</area>\n<text>seen</text></think>\n<answer>yes</answer>"


def item(box: str = "[0.1,0.2,0.3,0.4]", depth: str = "0.5") -> str:
    return area(f'[{{"bbox_2d":{box},"depth":{depth}}}]')


def reasons(text: object, profile: str = "corrected") -> tuple[Reason, ...]:
    try:
        parse(text, profile)
    except TraceError as error:
        return error.reasons
    return ()


def test_a_trace_is_read() -> None:
    text = (
        f"Sure.\n<think>\n<area>[{FULL}]</area>\n<text> A room. </text>\n"
        f"<area>[{BOX}, {FULL}]</area> <text>A cup\nand a bowl.</text> </think> so\n<answer> the cup </answer> done"
    )
    whole, part = AreaBox((0.0, 0.0, 1.0, 1.0), 0.5), AreaBox((0.1, 0.2, 0.3, 0.4), 0.25)
    expected = Trace((Step((whole,), "A room."), Step((part, whole), "A cup\nand a bowl.")), "the cup")
    assert parse(text) == parse(text, "published") == expected


def test_rendering_is_the_published_grammar() -> None:
    trace = Trace(
        (Step((AreaBox((0.0, 0.0, 1.0, 1.0), 0.5),), "a"), Step((AreaBox((0.1, 0.2, 0.3, 0.4), 0.25),) * 2, "b")), "c"
    )
    part = '{"bbox_2d":[0.100,0.200,0.300,0.400],"depth":0.250}'
    assert trace.render() == (
        '<think><area>[{"bbox_2d":[0.000,0.000,1.000,1.000],"depth":0.500}]</area>\n<text>a</text>'
        f"<area>[{part}, {part}]</area>\n<text>b</text></think>\n<answer>c</answer>"
    )
    assert '"bbox_2d":[0.10,0.20,0.30,0.40],"depth":0.25' in trace.render(decimals=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {Reason.NO_THINK, Reason.NO_ANSWER}),
        ("plain words", {Reason.NO_THINK, Reason.NO_ANSWER}),
        (item() + "x", set()),
        (item().replace("</answer>", ""), {Reason.NO_ANSWER}),
        (item().replace("</think>", ""), {Reason.NO_THINK}),
        (item().replace("yes", " \n"), {Reason.ANSWER_EMPTY}),
        (item().replace("seen", " "), {Reason.TEXT_EMPTY}),
        (item().replace("<think>", "<think>First: "), {Reason.THINK_START}),
        (item().replace("</think>", "That is all.</think>"), {Reason.THINK_END}),
        ("<think></think><answer>a</answer>", {Reason.THINK_START, Reason.THINK_END, Reason.TAG_ORDER}),
        (f"<think><area>[{BOX}]</area></think><answer>a</answer>", {Reason.THINK_END, Reason.TAG_ORDER}),
        (
            f"<think><text>a</text><area>[{BOX}]</area><text>b</text></think><answer>a</answer>",
            {Reason.THINK_START, Reason.TAG_ORDER},
        ),
        (
            f"<think><area><area>[{BOX}]</area></area><text>b</text></think><answer>a</answer>",
            {Reason.TAG_ORDER, Reason.AREA_NOT_JSON},
        ),
        (area("here"), {Reason.AREA_NOT_JSON}),
        (area(""), {Reason.AREA_NOT_JSON}),
        (area("[NaN]"), {Reason.AREA_NOT_JSON}),
        (area("[" * 100_000), {Reason.AREA_NOT_JSON}),
        (area(BOX), {Reason.AREA_NOT_LIST}),
        (area("3"), {Reason.AREA_NOT_LIST}),
        (area(f"[{', '.join([BOX] * MAX_AREA_BOXES)}]"), set()),
        (area(f"[{', '.join([BOX] * (MAX_AREA_BOXES + 1))}]"), {Reason.AREA_TOO_LONG}),
        (area("[3]"), {Reason.ITEM_NOT_OBJECT}),
        (area("[[0,0,1,1]]"), {Reason.ITEM_NOT_OBJECT}),
        (area("[{}]"), {Reason.BBOX_NOT_FOUR_NUMBERS, Reason.DEPTH_NOT_NUMBER}),
        (item("[0,0,1]"), {Reason.BBOX_NOT_FOUR_NUMBERS}),
        (item('["0","0","1","1"]'), {Reason.BBOX_NOT_FOUR_NUMBERS}),
        (item("[false,false,true,true]"), {Reason.BBOX_NOT_FOUR_NUMBERS}),
        (item("[0,0,1,1e999]"), {Reason.BBOX_NOT_FOUR_NUMBERS}),
        (item(f"[0,0,1,{'9' * 5000}]"), {Reason.BBOX_NOT_FOUR_NUMBERS}),
        (item("[0,0,1,Infinity]"), {Reason.AREA_NOT_JSON}),
        (item("[0,0,1,1.5]"), {Reason.BBOX_OUT_OF_RANGE}),
        (item("[-0.1,0,1,1]"), {Reason.BBOX_OUT_OF_RANGE}),
        (item("[0.5,0.1,0.5,0.2]"), {Reason.BBOX_INVERTED}),
        (item("[0.1,0.2,0.3,0.1]"), {Reason.BBOX_INVERTED}),
        (item("[0.1234,0.2,0.3,0.4]"), {Reason.TOO_MANY_DECIMALS}),
        (item("[1e-05,0.2,0.3,0.4]"), {Reason.TOO_MANY_DECIMALS}),
        (item("[0.1000,0.2,3e-1,0.4]"), set()),
        (item(depth="null"), {Reason.DEPTH_NOT_NUMBER}),
        (item(depth="true"), {Reason.DEPTH_NOT_NUMBER}),
        (item(depth='"0.5"'), {Reason.DEPTH_NOT_NUMBER}),
        (item(depth="1.001"), {Reason.DEPTH_OUT_OF_RANGE}),
        (item(depth="-0.1"), {Reason.DEPTH_OUT_OF_RANGE}),
        (item(depth="0.12345"), {Reason.TOO_MANY_DECIMALS}),
        (
            item("[0.5,-2,0.4,0.12345]", "7"),
            {Reason.BBOX_OUT_OF_RANGE, Reason.BBOX_INVERTED, Reason.TOO_MANY_DECIMALS, Reason.DEPTH_OUT_OF_RANGE},
        ),
        (area("[").replace("yes", ""), {Reason.AREA_NOT_JSON, Reason.ANSWER_EMPTY}),
    ],
)
def test_every_reason_is_found_in_both_profiles(text: str, expected: set[Reason]) -> None:
    assert set(reasons(text, "published")) == expected
    assert set(reasons(text, "corrected")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (area("[]"), Reason.AREA_EMPTY),
        (item() + "<answer>no</answer>", Reason.STRAY_TAG),
        (item() + item(), Reason.STRAY_TAG),
        (item().replace("seen", "<answer>no</answer>"), Reason.STRAY_TAG),
        ("</text>" + item(), Reason.STRAY_TAG),
        ("<answer>yes</answer>" + item().replace("<answer>yes</answer>", ""), Reason.STRAY_TAG),
        (item().replace("</area>", "</area> and there "), Reason.STRAY_TEXT),
        (area('[{"bbox_2d":[0,0,1,1],"depth":0.1,"depth":0.2}]'), Reason.KEY_REPEATED),
    ],
)
def test_what_only_the_corrected_profile_refuses(text: str, expected: Reason) -> None:
    assert reasons(text, "published") == ()
    assert reasons(text, "corrected") == (expected,)


@pytest.mark.parametrize("value", [None, 3, b"<think>", ["<think>"], object()])
def test_what_is_no_string(value: object) -> None:
    assert reasons(value) == (Reason.NOT_TEXT,)
    assert find_answer(value) is None
    assert find_areas(value) == []


def test_every_reason_is_explained_and_an_error_survives_another_process() -> None:
    assert set(EXPLANATIONS) == set(Reason)
    error = TraceError({Reason.NO_ANSWER, Reason.NO_THINK})
    assert error.reasons == ("no_think", "no_answer")
    assert "there is no <think>" in str(error)
    assert pickle.loads(pickle.dumps(error)).reasons == error.reasons


thousandths = st.integers(0, 1000)
sides = st.tuples(thousandths, thousandths).filter(lambda s: s[0] != s[1]).map(sorted)
area_boxes = st.builds(
    lambda x, y, d: AreaBox((x[0] / 1000, y[0] / 1000, x[1] / 1000, y[1] / 1000), d / 1000), sides, sides, thousandths
)
words = st.text(min_size=1, max_size=30).map(str.strip).filter(lambda text: text and "<" not in text)
traces = st.builds(
    Trace,
    st.lists(
        st.builds(Step, st.lists(area_boxes, min_size=1, max_size=3).map(tuple), words), min_size=1, max_size=4
    ).map(tuple),
    words,
)


@given(traces)
def test_traces_survive_rendering_and_parsing(trace: Trace) -> None:
    text = trace.render()
    assert parse(text) == parse(text, "published") == trace
    assert find_answer(text) == trace.answer
    assert find_areas(text, strict=True) == [list(step.boxes) for step in trace.steps]


@pytest.mark.parametrize(
    "trace",
    [
        Trace((), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), 0.5),), "a </text> b"),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), 0.5),), "a <answer> b"),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), 0.5),), " "),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.1001, 0.2), 0.5),), "a"),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), None),), "a"),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, float("nan")), 0.5),), "a"),), "a"),
        Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), 0.5),), "a"),), ""),
    ],
)
def test_what_could_not_be_read_back_is_not_rendered(trace: Trace) -> None:
    with pytest.raises(TraceError):
        trace.render()


def test_decimals_are_checked() -> None:
    trace = Trace((Step((AreaBox((0.1, 0.1, 0.2, 0.2), 0.5),), "a"),), "a")
    for decimals in (0, 4, -1):
        with pytest.raises(ValueError, match="decimals"):
            trace.render(decimals)


def test_lenient_reading() -> None:
    text = (
        f"<area>[{BOX}, 3, {{}}]</area> blah <area>oops</area><area>[]</area>"
        '<area>[{"bbox_2d":[5,-1,2,2]}, {"bbox_2d":[0,0,1,1],"depth":7}]</area><area>[' + BOX
    )
    assert find_areas(text) == [
        [AreaBox((0.1, 0.2, 0.3, 0.4), 0.25)],
        [],
        [],
        [AreaBox((5.0, -1.0, 2.0, 2.0), None), AreaBox((0.0, 0.0, 1.0, 1.0), 7.0)],
    ]
    with pytest.raises(TraceError) as caught:
        find_areas(text, strict=True)
    assert caught.value.reasons == (Reason.ITEM_NOT_OBJECT, Reason.BBOX_NOT_FOUR_NUMBERS)
    assert find_areas(f"<area>[{BOX}]</area><area>[]</area>", strict=True)[1] == []


NUMBERS = ["0.0", "0.25", "0.500", "1.000", "1.001", "1.999", "0.1234", "2.0", "1", "-0.5", "00.5", "1.5e-1"]
numbers = st.sampled_from(NUMBERS)


@settings(max_examples=300)
@given(st.lists(st.tuples(*[numbers] * 5), max_size=3))
def test_areas_are_read_alike_however_they_are_spelt(rows: list[tuple[str, ...]]) -> None:
    items = ",".join(f'{{"bbox_2d":[{x1},{y1},{x2},{y2}],"depth":{depth}}}' for x1, y1, x2, y2, depth in rows)
    plain, spaced = area(f"[{items}]"), area(f"[{items}]".replace('"depth":', '"depth" : '))
    assert find_areas(plain) == find_areas(spaced)
    for profile in ("published", "corrected"):
        assert reasons(plain, profile) == reasons(spaced, profile)


def test_too_many_plain_boxes_are_one_unreadable_area() -> None:
    boxes = [BOX] * (MAX_AREA_BOXES + 1)
    assert reasons(area(f"[{','.join(boxes)}]")) == (Reason.AREA_TOO_LONG,)
    assert len(find_areas(area(f"[{','.join(boxes[1:])}]"))[0]) == MAX_AREA_BOXES


def test_lenient_answer() -> None:
    assert find_answer("so <answer> 3 </answer> or <answer>4</answer>") == "3"
    assert find_answer("<answer>3") is None
    assert find_answer("<answer> </answer>") is None


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<area>", "</area>", "<text>", "</text>", "[", "]", "{", "}",
    ",", ":", '"bbox_2d"', '"depth"', "[0,0,1,1]", "0.5", "NaN", "-Infinity", "1e400", "true", "null", '"', "\\",
    "\n", "a", "\ud800", "<", f"[{BOX}]", f"<area>[{BOX}]</area><text>a</text>",
]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=50))
def test_any_text_is_read_or_refused_with_reasons(text: str) -> None:
    for profile in ("published", "corrected"):
        try:
            trace = parse(text, profile)
        except TraceError as error:
            assert error.reasons
        else:
            assert trace.steps
            assert trace.answer
    find_answer(text)
    find_areas(text)


MEGABYTE = 1_000_000
HOSTILE = {
    "openings": "<think>" + "<area>" * (MEGABYTE // 6),
    "closed openings": "<think>" + "<area>" * (MEGABYTE // 6) + "</area></think><answer>a</answer>",
    "thinks": "<think>" * (MEGABYTE // 7),
    "answers": "<answer>" * (MEGABYTE // 8) + "</answer>",
    "empty areas": area("[]</area><text>a</text><area>" * (MEGABYTE // 32) + "[]"),
    "angle brackets": "<" * MEGABYTE,
    "white space": "<think>" + " " * MEGABYTE + "</think>",
    "nested lists": area("[" * MEGABYTE),
    "nested objects": area('{"a":' * (MEGABYTE // 5)),
    "a long number": item(depth="9" * MEGABYTE),
    "a long fraction": item(depth="0." + "1" * MEGABYTE),
    "a long exponent": item(depth="1e" + "9" * MEGABYTE),
    "many boxes": area(f"[{', '.join([BOX] * (MEGABYTE // len(BOX)))}]"),
    "many areas": area(f"[{BOX}]</area><text>a</text><area>" * (MEGABYTE // 70) + "[]"),
    "an open string": area('["' + "a" * MEGABYTE),
    "backslashes": area('["' + "\\" * MEGABYTE),
    "noise": "".join(random.Random(0).choices(PIECES, k=100_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_is_refused_with_reasons(name: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse(HOSTILE[name])
    assert caught.value.reasons
    assert len(str(caught.value)) < 2000
    find_answer(HOSTILE[name])
    find_areas(HOSTILE[name])


class CountingText(str):
    """A text that counts the characters its searches go over, slices included."""

    work: list[int]

    @classmethod
    def of(cls, text: str, work: list[int]) -> CountingText:
        counting = cls(text)
        counting.work = work
        return counting

    def find(self, part: str, start: int = 0) -> int:
        found = super().find(part, start)
        self.work[0] += (len(self) if found < 0 else found) - start + 1
        return found

    def __getitem__(self, key: slice) -> CountingText:
        return self.of(super().__getitem__(key), self.work)


@pytest.mark.parametrize(
    "name", ["openings", "closed openings", "thinks", "answers", "empty areas", "many areas", "noise"]
)
def test_searching_takes_work_linear_in_the_text(name: str) -> None:
    def work(text: str) -> int:
        counter = [0]
        counting = CountingText.of(text, counter)
        with pytest.raises(TraceError):
            parse(counting)
        find_answer(counting)
        find_areas(counting)
        return counter[0]

    text = HOSTILE[name][: MEGABYTE // 5]
    once = work(text)
    assert once <= 20 * len(text)
    assert work(text * 4) <= 8 * max(once, len(text))
