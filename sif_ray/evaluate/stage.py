"""Evaluation: every policy answers every item of every task, then the answers become numbers with intervals.

The answers are files of their own (`answers.py`): a run that goes on asks for what is missing, and what is there can be
scored again without a model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sif_ray.config import ConfigError, EvaluateConfig, JudgeConfig
from sif_ray.depth.checkpoint import tell_licence
from sif_ray.evaluate import heldout
from sif_ray.evaluate.answerer import check_endpoint
from sif_ray.evaluate.answering import answers
from sif_ray.evaluate.answers import Answers, content_hash
from sif_ray.evaluate.benchmarks.item import Reply
from sif_ray.evaluate.comparison import compare
from sif_ray.evaluate.page import PAGE, render
from sif_ray.evaluate.predictions import Matched
from sif_ray.evaluate.question import Answer, Key
from sif_ray.evaluate.score import judge_name
from sif_ray.evaluate.scoring import judged, score
from sif_ray.evaluate.task import TOY, BenchmarkTask, HeldoutTask, Task, make_tasks
from sif_ray.evaluate.worst import WorstItem, worst_of_benchmark, worst_of_samples
from sif_ray.judge.factory import check_judge, make_judge
from sif_ray.observe.jsonl import to_line
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import RunFolder, kept_to_itself, write_json, write_text
from sif_ray.policy.check import check_policy
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

Found = Mapping[Key, Answer]

WHY = {
    "several_images": "only questions about one image are asked",
    "image_missing": "correct images of the benchmark",
    "image_unreadable": "the file is damaged",
    "image_too_small": "a side is shorter than 16 px",
    "image_too_thin": "the processor refuses such a shape",
    "image_too_large": "more pixels than are read",
    "image_size_mismatch": "another size than the annotation states",
    "prompt_refused": "raise engine.max_model_len or lower max_pixels",
    "endpoint_refusal": "the endpoint works and will not answer this; see its audit log",
    "endpoint_timeout": "raise timeout_s of the endpoint",
    "endpoint_failed": "see the endpoint's audit log",
}
"""What may be done about questions without an answer, by reason."""


def run(config: EvaluateConfig) -> None:
    """Evaluate `config.checkpoints` and `config.endpoints`; results.json, items.jsonl and evaluation.html are in
    `config.output`.

    Raises `ConfigError` for a request that names nothing to evaluate, or files that are wrong.
    """
    started_s = time.monotonic()
    policies = [*config.checkpoints, *config.endpoints]
    if not policies:
        raise ConfigError("checkpoints is empty; name at least one, e.g. checkpoints.warmup=runs/warmup/checkpoint")
    output = Path(config.output)
    with kept_to_itself(output):
        tasks = make_tasks(config)
        if not tasks:
            raise ConfigError("data = '' and benchmarks is empty: there is nothing to ask; set one of them")
        found = _answer(config, tasks, _check(config, tasks), output)
        _tell_refusals(found)

        results: dict[str, Any] = {"policies": policies, "split": config.split, "benchmarks": {}}
        worst: dict[str, list[WorstItem]] = {}
        for task in tasks:
            if isinstance(task, HeldoutTask):
                items = heldout.items(task.samples, found, config)
                write_text(output / "items.jsonl", "".join(map(to_line, items)))
                results |= heldout.results(task.samples, items, policies, config)
                results["refused"] = {policy: _refused(task, of_policy) for policy, of_policy in found.items()}
                worst[task.name] = worst_of_samples(task.samples, items)
            else:
                replies = _replies(task, found, config)
                results["benchmarks"][task.name] = _scored(task, replies, found, config)
                worst[task.name] = worst_of_benchmark(task, {name: arms["greedy"][0] for name, arms in replies.items()})
        results["seconds"] = time.monotonic() - started_s
        write_json(output / "results.json", results)
        write_text(output / PAGE, render(results, worst, is_toy=_is_toy(config, tasks)))
    print_tables(results)
    log.info("evaluation is in %s", output / PAGE)


def _check(config: EvaluateConfig, tasks: Sequence[Task]) -> dict[str, str]:
    """Raise `ConfigError` for models that cannot answer; what identifies every policy."""
    estimating = [task for task in tasks if task.estimates_depth]
    if estimating:
        tell_licence(config.depth_model)
    for task in estimating:
        if config.depth_model == TOY and config.benchmarks[task.name].annotations != TOY:
            raise ConfigError(
                f"depth_model = {TOY!r}: it knows rendered scenes only, and benchmarks.{task.name} shows photographs; "
                "name a real one, e.g. depth_model=depth-anything/Depth-Anything-V2-Small-hf"
            )
    identities = {}
    for name, model in config.checkpoints.items():
        path = check_policy(model, f"checkpoints.{name}", engine_on_cpu=not config.engine.num_gpus)
        identities[name] = content_hash(Path(path))
    for name, endpoint in config.endpoints.items():
        check_endpoint(name, config)
        identities[name] = f"{endpoint.model} at {endpoint.base_url}"
    if any(isinstance(task, BenchmarkTask) and task.benchmark.judged for task in tasks):
        check_judge(_text_judge(config))
    return identities


def _text_judge(config: EvaluateConfig) -> JudgeConfig:
    """The judge of benchmarks, who reads text alone."""
    return replace(config.judge, with_image=False)


def _refused(task: Task, of_policy: Found) -> dict[str, int]:
    """How many answers are missing, by reason."""
    reasons = (answer.refusal for key, answer in of_policy.items() if key.task == task.name and answer.refusal)
    return dict(Counter(reasons))


def _tell_refusals(found: Mapping[str, Found]) -> None:
    """Warn of questions without an answer. Raises `RuntimeError` where a policy answered none of a task, as that would
    have a score all the same."""
    for policy, of_policy in found.items():
        by_task: dict[str, Counter[str]] = {}
        for key, answer in of_policy.items():
            by_task.setdefault(key.task, Counter())[answer.refusal] += 1
        for task, reasons in by_task.items():
            refused = {reason: number for reason, number in reasons.items() if reason}
            told = "; ".join(f"{reason} {number}: {WHY[reason]}" for reason, number in refused.items())
            told = f"{policy}: {sum(refused.values())} of {reasons.total()} questions of {task} have no answer ({told})"
            if not reasons[""]:
                raise RuntimeError(told)
            if refused:
                log.warning(told)


def _answer(
    config: EvaluateConfig, tasks: Sequence[Task], identities: Mapping[str, str], output: Path
) -> dict[str, dict[Key, Answer]]:
    """Every wanted answer by policy: those of earlier runs, and the others from the policies."""
    settings = {"prompt": asdict(config.prompt), "backend": config.backend, "depth_model": config.depth_model}
    settings |= {name: getattr(config, name) for name in ("max_tokens", "max_pixels", "seed")}
    found: dict[str, dict[Key, Answer]] = {name: {} for name in identities}
    wanted = {task.name: task.keys() for task in tasks}
    with ExitStack() as stack:
        files = {
            (name, task.name): stack.enter_context(
                closing(
                    Answers(
                        output / "answers" / name,
                        task.name,
                        task.origin() | settings | {"policy": identity},
                        resume=config.resume,
                    )
                )
            )
            for name, identity in identities.items()
            for task in tasks
        }
        for (name, task_name), file in files.items():
            found[name] |= file.known(wanted[task_name])
        todo = {name: [key for keys in wanted.values() for key in keys if key not in found[name]] for name in found}
        num_known, num_missing = sum(map(len, found.values())), sum(map(len, todo.values()))
        if num_known:
            log.info("%d answers are there already; %d are missing", num_known, num_missing)
        RunFolder(output, config)
        if not num_missing:
            return found
        stack.enter_context(ray_session(config.ray))
        with Progress("evaluate", total=num_missing, unit="answers") as progress:
            for name, answer in answers(todo, tasks, config):
                files[name, answer.task].add(answer)
                found[name][answer.key] = answer
                progress.advance()
    return found


Replies = dict[str, dict[str, list[list[Reply]]]]
"""{policy: {arm: [replies of a draw, ...]}}, replies in the order of the items."""


def _replies(task: BenchmarkTask, found: Mapping[str, Found], config: EvaluateConfig) -> Replies:
    """The answers to a benchmark, with the judge's verdicts where it has one."""

    def of_draw(policy: str, arm: str, draw: int) -> list[Reply]:
        replies = [Reply(item, found[policy][Key(task.name, arm, draw, item.item_id)].text) for item in task.items]
        if not task.benchmark.judged:
            return replies
        return asyncio.run(judged(replies, lambda: make_judge(_text_judge(config), Path(config.output) / "judge")))

    return {
        policy: {arm.name: [of_draw(policy, arm.name, draw) for draw in range(arm.draws)] for arm in task.arms}
        for policy in found
    }


def _scored(
    task: BenchmarkTask, replies: Replies, found: Mapping[str, Found], config: EvaluateConfig
) -> dict[str, Any]:
    """{"policies": {policy: {arm: [result of a draw, ...]}}, "paired": {policy: greedy, beside the baseline}}."""

    def result(policy: str, arm: str, draw: int, of_draw: list[Reply]) -> dict[str, Any]:
        of_arm = {key: answer for key, answer in found[policy].items() if (key.arm, key.draw) == (arm, draw)}
        matched = Matched(tuple(of_draw), missing=(), surplus=())
        return score(task.benchmark, matched, num_samples=config.bootstrap_samples, seed=config.seed) | {
            "refused": _refused(task, of_arm),
            "judge": judge_name(config.judge) if task.benchmark.judged else None,
        }

    baseline, *others = replies
    return {
        "benchmark": task.benchmark.name,
        "policies": {
            policy: {
                arm: [result(policy, arm, draw, of_draw) for draw, of_draw in enumerate(draws)]
                for arm, draws in arms.items()
            }
            for policy, arms in replies.items()
        },
        "baseline": baseline,
        "paired": {
            policy: compare(
                task.benchmark,
                replies[policy]["greedy"][0],
                replies[baseline]["greedy"][0],
                num_samples=config.bootstrap_samples,
                seed=config.seed,
            )
            for policy in others
        },
    }


def _is_toy(config: EvaluateConfig, tasks: Sequence[Task]) -> bool:
    """Whether all that was asked is about rendered scenes."""
    return all(
        {sample.dataset for sample in task.samples} == {"toyworld"}
        if isinstance(task, HeldoutTask)
        else config.benchmarks[task.name].annotations == TOY
        for task in tasks
    )


def print_tables(results: Mapping[str, Any]) -> None:
    """Print what people look at first."""
    console = Console(width=max(Console().width, heldout.TABLE_WIDTH))
    if "checkpoints" in results:
        console.print(heldout.table(results))
    if results["benchmarks"]:
        console.print(table(results))


def table(results: Mapping[str, Any]) -> Table:
    """The headline of every benchmark, strict and published, greedy; ± half an interval."""
    shown = Table(title="benchmarks: strict (published)", box=SIMPLE_HEAD)
    for column in ("", *results["policies"]):
        shown.add_column(column, no_wrap=True)
    for name, found in results["benchmarks"].items():
        shown.add_row(name, *(_cell(found["policies"][policy]["greedy"][0]) for policy in results["policies"]))
    return shown


def _cell(result: Mapping[str, Any]) -> str:
    strict, published = result["strict"], result["published"]
    if strict["score"] is None:
        return "–"
    half = f" ±{(strict['ci95'][1] - strict['ci95'][0]) / 2:.3f}" if strict["ci95"] else ""
    return f"{strict['score']:.3f}{half} ({'–' if published['score'] is None else format(published['score'], '.3f')})"
