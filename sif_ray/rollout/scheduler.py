"""A vLLM scheduler whose running requests survive a cache reset, for vLLM's first model runner (the one on a CPU).

vLLM 0.32 drops the pixels of an image from what it sends to the workers when the prefix cache already covers it, as
for all but the first rollout of a group. When such a request is preempted and its cache is gone (every weight update
does both) the worker has no pixels to encode the image again, and the engine dies. The second model runner, on a GPU,
is sent a resumed request anew and is not affected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


class ImageKeepingScheduler(Scheduler):
    """Sends the images of every new request to the workers, also those that the prefix cache covers."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        images: dict[str, Any] = {}  # one object per image, so that the message to the workers holds it once
        for new in output.scheduled_new_reqs:
            new.mm_features = [
                replace(feature, data=images.setdefault(feature.identifier, feature.data))
                for feature in self.requests[new.req_id].mm_features
            ]
        return output


SCHEDULER = f"{__name__}.{ImageKeepingScheduler.__name__}"
