"""Engines, scorers and a learner in one process, behind a wire that loses, delays and repeats messages.

They do what the real ones promise to the loop, and no more: an engine writes tokens that show under whose weights they
were written, a learner's weights show what they were trained on. Each may die wherever it waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sif_ray.chaos.faults import Faults
from sif_ray.chaos.truth import FIRST_POLICY, History, Truth, read_history, score_of, token_of, write_history
from sif_ray.clock import now_s
from sif_ray.config import JudgeConfig
from sif_ray.judge.caller import Call, Caller
from sif_ray.judge.client import RATE_LIMIT, CallError, CallRefused, Completion
from sif_ray.judge.llm import outcome_of
from sif_ray.judge.outcome import Failed, JudgeUnavailable, Unavailable
from sif_ray.judge.scoring import ABLATION_TERMS, TERMS
from sif_ray.learner.actor import LearnerDied
from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.records import FloatArray, Rollout, RolloutGroup, Sample, ScoredGroup
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError
from sif_ray.rollout.request import RolloutRequest
from sif_ray.rollout.weights import Receipt, TensorSpec, WeightUpdate

T = TypeVar("T")

MESSAGE_S = 0.05  # mean of one way
LATE = 100.0
PIECES = 3  # of a completion, between which an update may come
LOGPROB = -1.0
PING = "ping"


class Process:
    """Something that can die. What it was doing is never finished, and who asked is told after a while."""

    def __init__(self, name: str, faults: Faults, truth: Truth, kind: str, died: type[Exception]) -> None:
        """`kind` is the field of `Rates` by which it dies, `died` what its callers see."""
        self.name = name
        self.faults, self.truth = faults, truth
        self._kind, self._died = kind, died
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def dead(self) -> bool:
        return self._death.done()

    def die(self) -> None:
        """At once, with all that it was doing."""
        if not self.dead:
            self._death.set_result(None)
            for task in list(self._tasks):
                task.cancel()

    async def pause(self, mean_s: float) -> None:
        """Work or wait for a while; it may die of it."""
        if self.faults.happens(self._kind):
            self.die()
        await asyncio.sleep(self.faults.rng.expovariate(1 / mean_s))

    async def call(self, work: Callable[[], Coroutine[Any, Any, T]], *, leased: bool = False) -> T:
        """Send a request for `work` and get its answer, as far as the wire and the process let it.

        Where nobody is ever taken for stuck, only what is asked under a lease may get lost.
        """
        may_lose = leased or self.truth.config.stuck_after_s > 0
        if not await self._travel(may_lose):
            await self._hear_of_death()
        if self.dead:
            await self._hear_of_death()
        running = self._start(work())
        if self.faults.happens("doubled"):
            self._start(work())
        await asyncio.wait([running, self._death], return_when=asyncio.FIRST_COMPLETED)
        if self.dead or running.cancelled() or not await self._travel(may_lose):
            await self._hear_of_death()
        return running.result()

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone

    async def _travel(self, may_lose: bool) -> bool:
        """One way of a message; False when it is lost."""
        rng, rates = self.faults.rng, self.faults
        slow = LATE if rates.happens("late") else 1.0
        await asyncio.sleep(rng.expovariate(1 / MESSAGE_S) * slow)
        return not (may_lose and rates.happens("lost"))

    async def _hear_of_death(self) -> None:
        """An answer that does not come: for ever, unless the process dies."""
        await asyncio.wait([self._death])
        await asyncio.sleep(self.faults.rng.random())
        raise self._died(f"{self.name} died in the simulation")


class SimulatedEngine(Process):
    """Writes tokens that carry the weights it holds."""

    def __init__(self, name: str, faults: Faults, truth: Truth) -> None:
        super().__init__(name, faults, truth, "engine_dies", EngineDiedError)
        self._version, self._policy = 0, FIRST_POLICY
        self._acknowledged: int | None = 0  # as far as the loop knows; None while an update is under way
        self._owed: dict[str, float] = {}  # tickets that the loop waits for, and since when

    def generate(self, request: RolloutRequest) -> Awaitable[RolloutGroup]:
        name = f"{request.ticket_id} {request.seed}"
        leased = not request.ticket_id.startswith(("eval/", "probe/"))
        if leased:
            self.truth.may_lease(self.name)
            self._owed[name] = now_s()
        self.truth.may_generate(self.name, name, self._version, self._acknowledged, len(self._owed))

        async def ask() -> RolloutGroup:
            try:
                group = await self.call(lambda: self._generate(request), leased=leased)
                if leased:
                    self.truth.holds_group(group)
                return group
            finally:
                self._owed.pop(name, None)

        return ask()

    @property
    def unanswered(self) -> list[str]:
        """Tickets whose leases have not expired."""
        since_s = now_s() - self.truth.config.lease_timeout_s
        return [name for name, asked_s in self._owed.items() if asked_s > since_s]

    async def update_weights(self, update: WeightUpdate) -> Receipt:
        self._acknowledged = None
        self.truth.updating.add(self)
        receipt = await self.call(lambda: self._update(update))
        self._acknowledged = receipt.version
        if receipt.checksum == update.checksum:
            self.truth.updating.discard(self)
        return receipt

    async def _generate(self, request: RolloutRequest) -> RolloutGroup:
        if self.faults.happens("refused"):
            await self.pause(0.1)
            raise RolloutRequestError("refused in the simulation")
        rng = self.faults.rng
        texts = [f"{request.ticket_id} {request.seed} {index}" for index in range(request.num_rollouts)]
        written: list[list[tuple[int, int]]] = [[] for _ in texts]
        for _ in range(PIECES):
            await self.pause(0.5)
            for tokens in written:
                tokens.extend([(self._version, token_of(self._policy))] * rng.randint(0 if tokens else 1, 2))
        grid = ((1, 4, 4),) * len(request.images)
        rollouts = tuple(_rollout(tokens, text) for tokens, text in zip(written, texts, strict=True))
        ids = np.arange(3, dtype=np.int32)
        return RolloutGroup(request.ticket_id, request.sample_id, ids, request.images, grid, rollouts)

    async def _update(self, update: WeightUpdate) -> Receipt:
        await self.pause(0.2)
        if update.version != self._version:  # a repeated message changes nothing
            self.truth.may_update(self.name, self._version, update.version)
            self._version, self._policy = update.version, update.buckets[0]
            if self.faults.happens("wrong_bytes"):
                self._policy = self._policy[::-1]
        intact = self._policy == update.buckets[0]
        await self.pause(0.1)
        checksum = update.checksum if intact else update.checksum ^ 1
        return Receipt(update.version, len(update.tensors), update.num_bytes, checksum, self.name, 0.3, 0.2)


def _rollout(tokens: Sequence[tuple[int, int]], text: str) -> Rollout:
    spans: list[tuple[int, int]] = []
    for version, _ in tokens:
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1] + 1)
        else:
            spans.append((version, 1))
    ids = np.array([token for _, token in tokens], np.int32)
    return Rollout(ids, np.full(len(tokens), LOGPROB, np.float32), tuple(spans), "stop", text)


class SimulatedScorer(Process):
    """Has every answer judged by the real caller with its breaker and limits."""

    def __init__(self, name: str, faults: Faults, truth: Truth, caller: Caller) -> None:
        super().__init__(name, faults, truth, "scorer_dies", WorkerDiedError)
        self._caller = caller

    async def score(
        self, texts_G: Sequence[str], sample: Sample, previous: float | None
    ) -> GroupScores | ScoringFailed:
        leased = not texts_G[0].startswith("eval/")
        ticket_id = texts_G[0].split(" ", 1)[0]
        if leased:
            self.truth.may_score(ticket_id, previous)
        answer = await self.call(lambda: self._score(texts_G), leased=leased)
        if isinstance(answer, GroupScores) and leased:
            self.truth.was_scored(ticket_id, answer.terms_G["answer_score"].tolist())
        return answer

    async def metrics(self) -> dict[str, float]:
        async def tell() -> dict[str, float]:
            return self._caller.metrics()

        return await self.call(tell)

    async def _score(self, texts_G: Sequence[str]) -> GroupScores | ScoringFailed:
        await self.pause(0.1)
        calls = (self._caller.call(question(text)) for text in texts_G)
        scores = await asyncio.gather(*calls, return_exceptions=True)
        for error in scores:
            if isinstance(error, CallError):
                outcome = outcome_of(error, self.truth.config.judge)
                if isinstance(outcome, Unavailable):
                    raise JudgeUnavailable(outcome.advice)
                return ScoringFailed(outcome.reason, retry=isinstance(outcome, Failed))
            if isinstance(error, BaseException):
                raise error
        scores_G = np.array(scores, np.float32)
        return GroupScores(scores_G, dict.fromkeys((*TERMS, *ABLATION_TERMS, "iou_last", "answer_score"), scores_G))


def question(text: str) -> Call[float]:
    """What the simulated judge is asked of a text."""
    return Call(lambda: {"text": text}, lambda completion: float(completion.text), {}, result="score")


class SimulatedModel:
    """The judge as one worker sees it: it is down for stretches of time, refuses, asks for patience, or answers. It
    holds its callers to the limits of the configuration."""

    def __init__(self, faults: Faults, truth: Truth, config: JudgeConfig, num_workers: int) -> None:
        self._faults, self._truth = faults, truth
        self._config = config
        self._spacing_s = 60 * num_workers / config.requests_per_minute if config.requests_per_minute else 0.0
        self._most_failures = min(config.breaker_failures, max(1, config.max_retries) + 1)
        self._patience_s = -1e9  # until when it wants to be left alone
        self._started_s = self._failed_s = -1e9
        self._failures = 0  # in a row, that speak against the server
        self._probing = False  # somebody asks a judge that is taken for down
        self._down_until_s = self._up_until_s = 0.0
        self._hangs = False  # while it is down, instead of answering so

    async def complete(self, request: Any) -> Completion:
        now_s = asyncio.get_running_loop().time()
        self._truth.promise(now_s - self._started_s >= self._spacing_s - 1e-6, "calls of the judge follow too closely")
        self._truth.promise(now_s >= self._patience_s - 1e-6, "a judge that asked for patience is called")
        most, truth = self._config.max_concurrency, self._truth
        truth.promise(truth.judge_calls < most, f"more than {most} calls of the judge at once")
        probes = self._failures >= self._most_failures
        if probes:
            truth.promise(request["text"] == PING, f"a judge that is down is asked {request}")
            truth.promise(not self._probing, "two probes of a judge that is down")
            rest_s = self._config.breaker_cooldown_s
            truth.promise(now_s - self._failed_s >= rest_s - 1e-6, "a judge that is down gets no time to cool down")
        self._started_s = now_s
        truth.judge_calls += 1
        self._probing |= probes
        try:
            completion = await self._complete(request)
            self._failures = 0
            return completion
        except CallError as error:
            now_s = asyncio.get_running_loop().time()
            if error.reason == RATE_LIMIT:
                self._patience_s = now_s + (error.retry_after_s or self._config.breaker_cooldown_s)
            else:
                self._failures, self._failed_s = self._failures + 1 if error.down else 0, now_s
            raise
        finally:
            truth.judge_calls -= 1
            self._probing &= not probes

    async def _complete(self, request: Any) -> Completion:
        faults, rng = self._faults, self._faults.rng
        seconds = rng.expovariate(1 / 0.3) * (LATE if faults.happens("late") else 1.0)
        if self._is_down() and self._hangs:
            seconds = math.inf
        await asyncio.sleep(min(seconds, self._config.timeout_s))
        if seconds > self._config.timeout_s:
            raise CallError("timeout", retry=True, down=True)
        if self._is_down():
            raise CallError("HTTP 503", retry=True, down=True)
        if faults.happens("judge_fails"):
            raise rng.choice(
                [
                    CallError("HTTP 500", retry=True, down=True),
                    CallError("rate limit", retry=True, retry_after_s=rng.choice([0.0, 2.0, 20.0])),
                    CallError("unreadable reply", retry=True),
                    CallRefused("HTTP 400"),
                ]
            )
        return Completion(str(score_of(request["text"])))

    def _is_down(self) -> bool:
        share, now_s = self._faults.rates.judge_down, asyncio.get_running_loop().time()
        if share and now_s >= max(self._down_until_s, self._up_until_s):
            self._faults.happened["judge_down"] += 1
            down_s = self._faults.rng.expovariate(1 / 15.0)
            self._down_until_s = now_s + down_s
            self._up_until_s = self._down_until_s + down_s * (1 - share) / share
            self._hangs = self._faults.rng.random() < 0.5
        return bool(share) and now_s < self._down_until_s

    async def close(self) -> None:
        """Nothing to close."""


class SimulatedLearner(Process):
    """Its weights are a digest of all that it was ever trained on."""

    def __init__(self, faults: Faults, truth: Truth) -> None:
        super().__init__("the learner", faults, truth, "learner_dies", LearnerDied)
        self._history = History()
        truth.begin_learner()

    async def start(self, total_steps: int) -> None:
        await self.call(lambda: self.pause(2.0))

    async def train(self, groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
        async def train() -> dict[str, float]:
            await self.pause(1.0)
            if not self._repeats(groups, version):
                self.truth.may_train(self._history, groups, version)
                self._history.add({scored.group.ticket_id: scored.group.oldest_version for scored in groups})
            await self.pause(0.5)
            return {"staleness_max": float(max(version - scored.group.oldest_version for scored in groups))}

        return await self.call(train)

    def _repeats(self, groups: Sequence[ScoredGroup], version: int) -> bool:
        """Whether this step is done already: the message came twice."""
        tickets = [scored.group.ticket_id for scored in groups]
        return version < self._history.version and tickets == list(self._history.steps[version])

    async def publish(self, version: int) -> WeightUpdate:
        async def publish() -> WeightUpdate:
            self.truth.promise(
                version == self._history.version, f"version {self._history.version} is published as {version}"
            )
            await self.pause(0.2)
            policy = self._history.policies[-1]
            spec = TensorSpec("weight", "float32", (16,), int(policy[-8:], 16), bucket=0, offset_bytes=0)
            return WeightUpdate(version, (spec,), (policy,))

        update = await self.call(publish)
        self.truth.holds_update(update)
        return update

    async def log_probs(self, groups: Sequence[RolloutGroup]) -> list[list[FloatArray]]:
        async def log_probs() -> list[list[FloatArray]]:
            version, policy = self._history.version, self._history.policies[-1]
            for group in groups:
                tokens = {int(token) for rollout in group.rollouts for token in rollout.token_ids_T}
                self.truth.promise(
                    tokens == {token_of(policy)}, f"a probe of version {version} with tokens of other weights"
                )
            await self.pause(0.3)
            return [[rollout.logprobs_T for rollout in group.rollouts] for group in groups]

        return await self.call(log_probs)

    async def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        async def save() -> None:
            self.truth.promise(
                client_state["version"] == self._history.version, f"{client_state} of {self._history.version}"
            )
            await self.pause(0.5)
            Path(folder).mkdir(exist_ok=True)
            write_history(Path(folder), self._history)
            await self.pause(0.5)

        await self.call(save)

    async def load_checkpoint(self, folder: str) -> dict[str, Any]:
        async def load() -> dict[str, Any]:
            await self.pause(1.0)
            self._history = read_history(Path(folder))
            return {"version": self._history.version}

        return await self.call(load)

    async def save_policy(self, output: str) -> None:
        async def save() -> None:
            await self.pause(0.5)
            Path(output).mkdir(exist_ok=True)
            write_history(Path(output), self._history)

        await self.call(save)

    async def check_alive(self) -> None:
        await asyncio.sleep(1.0)
        if self.dead:
            raise LearnerDied("the learner died in the simulation")

    def shutdown(self) -> None:
        self.die()


class SimulatedFactory:
    """Starts processes of one kind."""

    def __init__(self, make: Callable[[str], Process], faults: Faults, truth: Truth) -> None:
        self._make, self._faults, self._truth = make, faults, truth
        self.running: set[str] = set()

    async def start(self, name: str) -> Process:
        await asyncio.sleep(self._faults.rng.expovariate(1 / 3.0))
        if self._faults.happens("start_fails"):
            raise RuntimeError("no room in the simulation")
        self._truth.promise(name not in self.running, f"{name} is started beside the one that runs")
        worker = self._make(name)
        self.running.add(name)
        return worker

    async def end(self, worker: Process) -> None:
        task = asyncio.current_task()
        if isinstance(worker, SimulatedEngine) and not worker.dead and task is not None and not task.cancelling():
            self._truth.may_leave(worker.name, worker.unanswered, self._faults.rates)
        try:
            await asyncio.sleep(self._faults.rng.random())
        finally:
            worker.die()
            self._truth.updating.discard(worker)
            self.running.discard(worker.name)

    async def stacks(self, worker: Process) -> str:
        return "in a simulation"
