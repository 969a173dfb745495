"""Every call into vLLM's asynchronous engine, in one place: the rest of the package knows tokens, not vLLM.

Written against vLLM 0.32, whose API for weight updates changes with almost every minor version.

Versions of tokens are vLLM's own (`CompletionOutput.weight_versions`) and exact: a version label changes only while
the engine is paused; a completed pause has no batch in flight; the engine core stamps its label on the outputs of a
step in the thread that runs the steps. The pause also preempts running requests and clears prefix, processor and
encoder caches, so a request that goes on is recomputed under the new weights from its first token on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import psutil
from PIL import Image
from vllm import AsyncEngineArgs, RequestOutput, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.config.model import ModelDType
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.network_utils import get_ip
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats

from sif_ray.config import EngineConfig, SamplingConfig
from sif_ray.records import FloatArray, IntArray
from sif_ray.rollout.environment import executor
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError, WeightSyncError
from sif_ray.rollout.scheduler import SCHEDULER
from sif_ray.rollout.staging import Manifest
from sif_ray.rollout.transfer import BACKEND, WORKER_EXTENSION

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

CPU_BLOCK_TOKENS = 32  # of the prefix cache; vLLM's own 128 on a CPU is longer than most prompts of a small policy
FORBIDDEN_LOGIT_BIAS = -100.0  # the lowest of vLLM's API; at temperature 1 a probability of zero in float32
CPU_BATCH_TOKENS = 8192  # of one step, and of the images encoded in it
SHUTDOWN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Completion:
    """One sampled completion as vLLM reports it."""

    token_ids_T: IntArray
    logprobs_T: FloatArray
    version_spans: tuple[tuple[int, int], ...]
    finish_reason: str


@dataclass(frozen=True)
class EngineRequest:
    """A tokenised prompt with one placeholder per image, and how it is to be answered."""

    request_id: str
    token_ids: Sequence[int]
    images: Sequence[tuple[str, Image.Image]]  # each with an identifier of its content
    sampling: SamplingConfig
    stop_token_id: int
    forbidden_token_id: int
    seed: int | None
    adapter: str = ""  # by the name that the engine was started with; "" = the policy itself
    priority: int = 0  # the lowest goes first

    def prompt(self) -> TokensPrompt:
        return TokensPrompt(
            prompt_token_ids=list(self.token_ids),
            multi_modal_data={"image": [image for _, image in self.images]},
            multi_modal_uuids={"image": [identifier for identifier, _ in self.images]},
        )

    def sampling_params(self, **more: Any) -> SamplingParams:
        return SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            max_tokens=self.sampling.max_tokens,
            seed=self.seed,
            stop_token_ids=[self.stop_token_id],
            logit_bias={self.forbidden_token_id: FORBIDDEN_LOGIT_BIAS},
            **more,
        )

    def group_params(self, num_completions: int) -> SamplingParams:
        """For so many completions, each with the log-probs of its tokens, and no text."""
        return self.sampling_params(
            n=num_completions,
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


@dataclass(frozen=True)
class Delta:
    """What one completion has grown by."""

    text: str
    num_tokens: int
    finish_reason: str | None  # of the last one: "stop" or "length"
    num_prompt_tokens: int  # of the request


@dataclass
class PromptTokens:
    """Prompt tokens of requests, each of a group's G counted."""

    total: int = 0
    computed: int = 0  # the part that no cache held


class _PromptCounter(StatLoggerBase):
    """Adds up what vLLM says of every step."""

    def __init__(self, client: VllmClient) -> None:
        self._client = client

    def record(
        self, scheduler_stats: Any, iteration_stats: IterationStats | None, *others: Any, **more_others: Any
    ) -> None:
        if iteration_stats is not None:
            self._client.prompt_tokens.total += iteration_stats.prompt_token_stats.total
            self._client.prompt_tokens.computed += iteration_stats.prompt_token_stats.computed

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _lora_arguments(folders: Sequence[str]) -> dict[str, Any]:
    """For an engine that holds the adapters of these folders, all of them usable in one batch."""
    if not folders:
        return {}
    ranks = [json.loads((Path(folder) / "adapter_config.json").read_text())["r"] for folder in folders]
    room = min(size for size in get_args(MaxLoRARanks) if size >= max(ranks))
    # One more on a CPU, where a request without an adapter, beside one with an adapter, is given the last slot: it must
    # stay empty. Slots are taken from the first on.
    return {"enable_lora": True, "max_loras": len(folders) + on_cpu(), "max_lora_rank": room}


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU in this process."""
    return bool(current_platform.is_cpu())


def engine_arguments(
    model: str, config: EngineConfig, *, dtype: ModelDType, image_size_limits: dict[str, Any], seed: int
) -> dict[str, Any]:
    """vLLM's arguments for an engine of ours."""
    arguments: dict[str, Any] = {}
    if on_cpu():
        arguments = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "block_size": CPU_BLOCK_TOKENS,
            "scheduler_cls": SCHEDULER,
            # Whole prompts only: after a part of one, a seeded request on a CPU ends the engine (the sampler steps
            # its generator back, which CPU generators cannot).
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, config.max_model_len),
        }
    if image_size_limits:
        arguments["mm_processor_kwargs"] = image_size_limits
    return arguments | {
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "scheduling_policy": "priority",
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": executor(config, on_cpu=on_cpu()),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 2, "video": 0},
        "mm_processor_cache_gb": 0,  # a prompt comes once per epoch, and the cache's two halves can part over a pause
        "skip_mm_profiling": on_cpu(),  # nothing to size there: the KV cache has a given size
        "generation_config": "vllm",  # the checkpoint's own sampling defaults stay out
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,  # vLLM's own loggers; ours counts
    }


class VllmClient:
    """One `AsyncLLM`. Create it in the event loop that will use it, in an environment made for it."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        dtype: ModelDType,
        image_size_limits: dict[str, Any],
        seed: int,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """`adapters`: name of each LoRA adapter to its folder, in peft's layout."""
        folders = dict(adapters or {})
        self._adapters = {
            name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(folders.items(), 1)
        }
        engine_args = AsyncEngineArgs(
            **engine_arguments(model, config, dtype=dtype, image_size_limits=image_size_limits, seed=seed),
            **_lora_arguments(list(folders.values())),
        )
        self.num_workers = config.tensor_parallel_size
        self.address = get_ip()  # of this machine, as others reach it; VLLM_HOST_IP wins
        self.prompt_tokens = PromptTokens()
        self._llm = AsyncLLM.from_engine_args(
            engine_args, stat_loggers=[lambda vllm_config, index: _PromptCounter(self)]
        )
        self._cores = [psutil.Process(core.pid) for core in self._llm.engine_core.resources.engine_manager.processes]
        self._workers = [worker for core in self._cores for worker in core.children(recursive=True)]
        self._exits: list[int] = []  # descriptors of the cores, readable once they have ended

    async def open(self, version: int) -> None:
        """Prepare weight updates and label the loaded weights as `version`."""
        self._end_with_cores()
        with _engine_errors():
            await self._ask(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={})))
            await self._ask(self._llm.update_weight_version(str(version)))
            await self._ask(self._llm.get_supported_tasks())  # kept; else the first prompt asks, and may wait for ever

    async def generate(self, request: EngineRequest, num_completions: int) -> tuple[list[int], list[Completion]]:
        """`num_completions` samples of one prompt and the prompt's token ids with image placeholders expanded."""
        with _engine_errors():
            async for output in self._outputs(request, request.group_params(num_completions)):
                if output.finished:
                    return list(output.prompt_token_ids or ()), [_completion(item) for item in output.outputs]
        raise EngineDiedError(f"request {request.request_id} ended without an output")

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Delta]:
        """One sample of one prompt while it is written. Closing the generator ends the request."""
        with _engine_errors():
            params = request.sampling_params(output_kind=RequestOutputKind.DELTA)
            async for output in self._outputs(request, params):
                [written] = output.outputs
                num_prompt_tokens = len(output.prompt_token_ids or ())
                yield Delta(written.text, len(written.token_ids), _finish(written), num_prompt_tokens)

    def _outputs(self, request: EngineRequest, params: SamplingParams) -> AsyncGenerator[RequestOutput]:
        adapter = self._adapters[request.adapter] if request.adapter else None
        return self._llm.generate(
            request.prompt(), params, request.request_id, lora_request=adapter, priority=request.priority
        )

    def take_prompt_tokens(self) -> PromptTokens:
        """What was asked and computed since the last call."""
        taken, self.prompt_tokens = self.prompt_tokens, PromptTokens()
        return taken

    async def verify_weights(self, manifest: Manifest) -> None:
        """Have every worker check an update; raises `WeightSyncError` with the reasons of those that refuse. A worker
        that fails over it, for want of memory say, is one that cannot be relied on: the engine is ended."""
        try:
            with _worker_errors("the update was not verified"):
                reasons = await self._ask(self._llm.collective_rpc("verify_weights", args=(manifest,)))
        except EngineDiedError:
            self.shutdown()
            raise
        if any(reasons):
            raise WeightSyncError("; ".join(sorted({reason for reason in reasons if reason})))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is generated inside; requests are kept. An error inside ends the engine instead of resuming it."""
        try:
            with _engine_errors():
                await self._ask(self._llm.pause_generation(mode="keep", clear_cache=True))
            yield
            with _engine_errors():
                await self._ask(self._llm.resume_generation())
        except BaseException:
            self.shutdown()
            raise

    async def load_verified(self, version: int) -> tuple[int, int, int, int, int]:
        """Load the verified update while paused and label what follows; see `VerifiedTransfer.receipt`.

        Every tensor-parallel worker must give the same receipt.
        """
        with _worker_errors(f"version {version} was loaded in part"):
            update = WeightTransferUpdateRequest(update_info={"version": version})
            await self._ask(self._llm.start_weight_update())
            await self._ask(self._llm.update_weights(update))
            await self._ask(self._llm.finish_weight_update(weight_version=str(version)))
            receipts = await self._ask(self._llm.collective_rpc("weight_receipt"))
        if len(receipts) != self.num_workers or len({tuple(receipt) for receipt in receipts}) != 1:
            raise EngineDiedError(
                f"version {version}: the receipts of {self.num_workers} workers must be equal, they are {receipts}; "
                "the engine is ended"
            )
        return tuple(receipts[0])

    async def _ask(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        """What the engine answers to anything but a prompt. vLLM leaves such a call waiting when the engine dies; its
        task that reads the engine's answers ends then."""
        asked, reading = asyncio.ensure_future(call), self._llm.output_handler
        assert reading is not None
        try:
            await asyncio.wait((asked, reading), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise EngineDeadError()
            return asked.result()
        finally:
            asked.cancel()

    def _end_with_cores(self) -> None:
        """End the engine as soon as a core dies. vLLM watches them too, but its thread may itself die of a core that is
        just ending, and then nothing that the engine was asked would ever fail."""
        for core in self._cores:
            ended = os.pidfd_open(core.pid)
            self._exits.append(ended)
            asyncio.get_running_loop().add_reader(ended, self.shutdown)

    def shutdown(self) -> None:
        """End every process of the engine and wait for them; pending requests fail. May be called twice."""
        while self._exits:
            ended = self._exits.pop()
            asyncio.get_running_loop().remove_reader(ended)
            os.close(ended)
        self._llm.output_processor.propagate_error(EngineDeadError())
        self._llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
        _, alive = psutil.wait_procs(self._cores + self._workers, timeout=SHUTDOWN_TIMEOUT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)


def _finish(output: Any) -> str | None:
    if output.finish_reason not in (None, "stop", "length"):
        raise EngineDiedError(f"a completion ended by {output.finish_reason!r}; the engine is shutting down")
    return output.finish_reason


def _completion(output: Any) -> Completion:
    reason = _finish(output)
    assert reason is not None
    if output.weight_versions is None:
        raise EngineDiedError("vLLM reported no weight versions of the sampled tokens; use vllm 0.32")
    return Completion(
        token_ids_T=np.asarray(output.token_ids, dtype=np.int32),
        logprobs_T=np.asarray(output.logprobs.logprobs, dtype=np.float32),
        version_spans=tuple((int(span.version), span.end - span.start) for span in output.weight_versions),
        finish_reason=reason,
    )


@contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except VLLMValidationError as error:
        raise RolloutRequestError(f"vLLM refuses the request: {error}") from error
    except EngineDeadError as error:
        raise EngineDiedError(f"the vLLM engine died: {error}") from error


@contextmanager
def _worker_errors(what: str) -> Iterator[None]:
    """Any failure of a worker as `EngineDiedError`."""
    try:
        with _engine_errors():
            yield
    except EngineDiedError:
        raise
    except Exception as error:  # vLLM reports a worker's failure as a bare Exception
        raise EngineDiedError(f"{what}; the engine is ended: {error}") from error
