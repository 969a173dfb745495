"""Pools of workers that join, leave, die and are replaced: the engines and the scorers of a run.

    add ─► starting ──► attended (brought up to date) ──► ready ──► draining ─► gone
              ▲                                             │
              └────────── replaced, within a budget ◄───────┴─ lost: died, or given up because it is stuck

A place in the pool keeps its name ("engine 0") whoever fills it. No Ray here: workers come from a `Factory`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from sif_ray.clock import now_s
from sif_ray.config import ConfigError
from sif_ray.loop.watchdog import Watchdog
from sif_ray.rollout.errors import EngineDiedError, WeightSyncError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_RESTARTS = 3  # of one place within the window; one more ends the run
RESTART_WINDOW_S = 900.0
RESTART_DELAY_S = 1.0  # before the second restart in a window; 3 before the third


class WorkerDiedError(RuntimeError):
    """The worker's process is gone; the message says why."""


class PoolError(RuntimeError):
    """A place cannot be filled any more; the message names it and the cause."""


class Factory(Protocol):
    """Starts and ends the workers of a pool."""

    async def start(self, name: str) -> Any:
        """A worker that can be called. When it fails or is cancelled, nothing may be left of the worker."""
        ...

    async def end(self, worker: Any) -> None:
        """End the worker, be it alive, stuck or dead, also when this is cancelled. Raises nothing of its own."""
        ...

    async def stacks(self, worker: Any) -> str:
        """Where the worker's threads are, for people; a short reason where that cannot be seen. Raises nothing."""
        ...


class Member:
    """A worker in its place. Calls to it end when it is given up, whether it answers or not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.worker: Any = None  # set once it has started
        self.ready = False
        self.draining = False  # gets nothing new; leaves when it holds nothing
        self.calls = 0  # under way, its start included
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # the reason


AnyMember = TypeVar("AnyMember", bound=Member)


class Pool(Generic[AnyMember]):
    """The workers of one kind, each kept in its place by a task of its own.

    `attend(member)` brings a started worker up to date, calls `join`, and returns when a draining member may go.
    `take_back(member)` is called at the very moment a member is lost and says what becomes of its work.
    """

    def __init__(
        self,
        kind: str,
        factory: Factory,
        watchdog: Watchdog,
        *,
        member: Callable[[str], AnyMember],
        attend: Callable[[AnyMember], Awaitable[None]],
        take_back: Callable[[AnyMember], str],
        changed: Callable[[], None],
    ) -> None:
        self.kind = kind
        self._factory = factory
        self._watchdog = watchdog
        self._member = member
        self._attend = attend
        self._take_back = take_back
        self._changed = changed
        self._places: dict[str, AnyMember] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._closed = False
        self._empty_since_s: dict[str, float] = {}  # by place

    @property
    def ready(self) -> list[AnyMember]:
        """Members that may be given work, in the order of their places."""
        return [member for member in self._places.values() if member.ready and not member.draining]

    @property
    def names(self) -> list[str]:
        """The places that were not told to close, filled or not."""
        return [name for name, member in self._places.items() if not member.draining]

    @property
    def all_started(self) -> bool:
        """Whether every place is filled, if not up to date."""
        return all(member.worker is not None for member in self._places.values())

    def find(self, name: str) -> AnyMember | None:
        """Who fills the place `name` now, ready or not."""
        return self._places.get(name)

    def add(self, tasks: asyncio.TaskGroup) -> str:
        """Open one more place and return its name; its worker joins when it has started. A place that cannot be filled
        ends `tasks` with `PoolError`. Raises `ValueError` once the run is ending."""
        ending = ValueError(f"the run is ending and starts no further {self.kind}")
        if self._closed:
            raise ending
        name = f"{self.kind} {next(self._numbers)}"
        keeping = self._keep(name)
        try:
            keeper = tasks.create_task(keeping, name=f"keep {name}")
        except RuntimeError:  # an error of any of its tasks is ending the group
            keeping.close()
            raise ending from None
        self._places[name] = self._member(name)
        self._empty_since_s[name] = now_s()
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)
        return name

    def remove(self, name: str) -> None:
        """Let a member finish what it holds, and close its place. Raises `ValueError` for an unknown or last place."""
        member = self._places.get(name)
        if member is None:
            raise ValueError(f"there is no {name}; there are {', '.join(self._places) or 'none'}")
        if all(other is member or other.draining for other in self._places.values()):
            raise ValueError(f"{name} is the last {self.kind}; add another one first")
        member.draining = True
        self._changed()

    def close(self) -> None:
        """End every worker, for good; the task group waits for it."""
        self._closed = True
        for keeper in self._keepers:
            keeper.cancel()

    def join(self, member: AnyMember, detail: str = "") -> None:
        """The member is up to date and takes work from now on, unless it was given up at this very moment."""
        if member.lost.done():
            return
        member.ready = True
        empty_s = now_s() - self._empty_since_s[member.name]
        log.info("%s is ready%s; its place was empty for %.1f s", member.name, detail, empty_s)
        self._changed()

    def give_up(self, member: AnyMember, reason: str) -> None:
        """Take the member for dead, once: its calls fail with `WorkerDiedError` and its work is taken back now."""
        if member.lost.done():
            return
        member.ready = False
        member.lost.set_result(reason)
        self._watchdog.forget(member.name)
        self._empty_since_s[member.name] = now_s()
        log.warning("%s is lost: %s; %s", member.name, reason, self._take_back(member))
        self._changed()

    async def stacks(self, member: AnyMember) -> str:
        """See `Factory.stacks`."""
        return "it has not started" if member.worker is None else await self._factory.stacks(member.worker)

    async def call(self, member: AnyMember, what: str, answer: Awaitable[Result]) -> Result:
        """The `answer` of a member, watched. A member that turns out to be dead is given up.

        Raises `WorkerDiedError` as soon as the member is lost, and the answer's own errors.
        """
        with self._watchdog.call(member.name, what):
            member.calls += 1
            try:
                return await self._while_alive(member, answer)
            finally:
                member.calls -= 1

    async def _while_alive(self, member: AnyMember, answer: Awaitable[Result]) -> Result:
        pending = asyncio.ensure_future(answer)
        try:
            both: list[asyncio.Future[Any]] = [pending, member.lost]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                raise WorkerDiedError(member.lost.result())
            return pending.result()
        except (EngineDiedError, WorkerDiedError) as error:
            self.give_up(member, str(error))
            raise WorkerDiedError(str(error)) from error
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)

    async def _keep(self, name: str) -> None:
        """Fill one place until it is removed."""
        losses_s: list[float] = []  # when its workers were lost, within the window
        try:
            while not self._places[name].draining:
                error = await self._fill(self._places[name])
                if error is None:
                    break
                lost_s = now_s()
                losses_s = [at_s for at_s in losses_s if at_s > lost_s - RESTART_WINDOW_S] + [lost_s]
                if len(losses_s) > MAX_RESTARTS:
                    raise PoolError(
                        f"{name} was lost {len(losses_s)} times within {RESTART_WINDOW_S:g} s and is not started "
                        f"again; the last time: {error}"
                    ) from error
                del error  # with the frames in it, which hold what the worker was given: a whole update of weights
                if not self._places[name].draining:
                    self._places[name] = self._member(name)
                    await asyncio.sleep(RESTART_DELAY_S * (2 ** (len(losses_s) - 1) - 1))
            log.info("%s has left", name)
        finally:
            del self._places[name]
            self._changed()

    async def _fill(self, member: AnyMember) -> WorkerDiedError | None:
        """The life of one worker; returns what it died of, None when it was let go."""
        try:
            await self.call(member, "start", self._start(member))
            await self._while_alive(member, self._attend(member))
        except WorkerDiedError as error:
            return error
        finally:
            if not member.lost.done():  # calls that nobody waits for any more
                member.lost.set_result("it was ended")
            if member.worker is not None:
                await self._factory.end(member.worker)
        return None

    async def _start(self, member: AnyMember) -> None:
        try:
            member.worker = await self._factory.start(member.name)
        except (ConfigError, WeightSyncError):  # another attempt would end in the same way
            raise
        except Exception as error:  # whatever a start raises is a worker that did not come up; the budget bounds it
            raise WorkerDiedError(f"it did not start: {type(error).__name__}: {error}") from error
