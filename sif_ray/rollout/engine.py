"""A rollout engine: prompts in; rollout groups with exact log-probs and versions out; weights updated in place."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import io
import itertools
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from PIL import Image

from sif_ray.config import EngineConfig, PromptConfig, SamplingConfig
from sif_ray.policy.model import resolve_model
from sif_ray.policy.processor import EncodedPrompt, PolicyInputError, PolicyProcessor, decode_image
from sif_ray.records import RecordError, Rollout, RolloutGroup
from sif_ray.rollout import wire
from sif_ray.rollout.environment import engine_environment, environment
from sif_ray.rollout.errors import EngineDiedError, RolloutRequestError, WeightSyncError
from sif_ray.rollout.request import RolloutRequest
from sif_ray.rollout.staging import staged_size, staging_file, write_staged
from sif_ray.rollout.weights import ByteArray, Receipt, WeightUpdate, specs_to_rows

POLL_S = 0.02  # how often an engine looks whether the learner has come to send

if TYPE_CHECKING:
    from vllm.config.model import ModelDType

    from sif_ray.rollout.vllm_client import Completion, Delta, EngineRequest, VllmClient


class RolloutEngine:
    """One vLLM engine that holds one policy version at a time.

    Invariant: a token is generated only while every worker holds all tensors of the version it is labelled with. A
    damaged update is refused before anything changes (`WeightSyncError`, generation goes on with the old weights); an
    update that fails half-way ends the engine (`EngineDiedError`).
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        prompt: PromptConfig,
        *,
        max_pixels: int = 0,
        dtype: ModelDType | None = None,
        seed: int = 0,
        version: int = 0,
        engine_id: str = "engine 0",
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """`model` is a checkpoint folder or hub id whose weights are `version`; max_pixels 0 = the checkpoint's limit.

        `dtype` None is float32 on a CPU and the checkpoint's own type elsewhere. `adapters` are LoRA adapters by name,
        as folders in peft's layout; an engine with adapters takes no weight updates.
        """
        self._adapters = dict(adapters or {})
        self.engine_id = engine_id
        self._model = resolve_model(model)
        self._config = config
        self._prompt = prompt
        self._max_pixels = max_pixels
        self._dtype = dtype
        self._seed = seed
        self._version = version
        self._requests = itertools.count()
        self._updating = asyncio.Lock()
        self._client: VllmClient | None = None
        self._processor: PolicyProcessor | None = None

    @property
    def version(self) -> int:
        """Policy version that generates now."""
        return self._version

    async def start(self) -> None:
        """Start vLLM's processes and load the checkpoint: 15 to 30 s on a CPU. Raises for a policy it cannot update."""
        with environment(engine_environment(self._config)):
            from sif_ray.rollout import vllm_client  # takes seconds to import and reads the environment

            cpu = vllm_client.on_cpu()
            if cpu:
                _refuse_tied_embeddings(self._model)
            self._processor = PolicyProcessor(self._model, self._max_pixels)
            self._client = vllm_client.VllmClient(
                self._model,
                self._config,
                dtype=self._dtype or ("float32" if cpu else "auto"),
                image_size_limits=self._processor.image_size_limits(),
                seed=self._seed,
                adapters=self._adapters,
            )
        await self._client.open(self._version)
        _return_memory()

    async def warm_up(self) -> None:
        """Answer one small image prompt; the first one takes seconds, which a measurement should not see."""
        grey = io.BytesIO()
        Image.new("RGB", (56, 56), (128, 128, 128)).save(grey, format="PNG")
        images = (grey.getvalue(),) * (2 if self._prompt.depth_image else 1)
        await self.generate(RolloutRequest("warm-up", "warm-up", "?", images, 1, SamplingConfig(max_tokens=2)))

    async def generate(self, request: RolloutRequest) -> RolloutGroup:
        """Answer one prompt `num_rollouts` times, across weight updates that may happen meanwhile.

        Image placeholders are never sampled, and the log-probs are those without them: a model that reads a completion
        again would look for the placeholder's image.

        Raises `RolloutRequestError` for a request that cannot be answered or an answer that contradicts itself,
        `EngineDiedError` when the engine is gone.
        """
        client, processor = self._started()
        if request.sampling.temperature == 0 and request.num_rollouts > 1:
            raise RolloutRequestError(
                f"num_rollouts = {request.num_rollouts} with temperature 0: greedy rollouts are all equal; ask for 1"
            )
        encoded = await self._encode(processor, request)
        prompt_ids, completions = await client.generate(
            engine_request(request, encoded, processor, next(self._requests)), request.num_rollouts
        )
        with _refusing(request):
            processor.check_image_tokens(prompt_ids, encoded.image_grid_thw)
            group = RolloutGroup(
                ticket_id=request.ticket_id,
                sample_id=request.sample_id,
                prompt_token_ids_P=np.asarray(prompt_ids, dtype=np.int32),
                images=tuple(request.images),
                image_grid_thw=encoded.image_grid_thw,
                rollouts=tuple(_rollout(completion, processor) for completion in completions),
            )
        if prompt_ids != encoded.token_ids_P:
            raise RolloutRequestError(
                f"sample {request.sample_id}: the engine's prompt ({len(prompt_ids)} tokens) is not what the policy's "
                f"processor made ({len(encoded.token_ids_P)}); both must use the same checkpoint"
            )
        return group

    async def stream(self, request: RolloutRequest) -> AsyncGenerator[Delta]:
        """One answer to a prompt while it is written; `num_rollouts` is not read. Closing the generator ends it.

        Raises `RolloutRequestError` before the first part, `EngineDiedError` at any time.
        """
        client, processor = self._started()
        encoded = await self._encode(processor, request)
        async with aclosing(client.stream(engine_request(request, encoded, processor, next(self._requests)))) as deltas:
            async for delta in deltas:
                yield delta

    async def update_weights(self, update: WeightUpdate) -> Receipt:
        """Replace the weights while requests are in flight; they go on under the new version.

        The update is fetched while generation goes on, verified by the workers between two of its steps and loaded in a
        pause. Raises `WeightSyncError` for an update that is damaged or incomplete, naming the tensor, or
        no newer than the engine's version (the engine keeps its weights and its version), `EngineDiedError` when
        loading fails half-way or a worker fails to verify (the engine is ended).
        """
        client, _ = self._started()
        if self._adapters:
            raise WeightSyncError(
                f"{self.engine_id} has adapters, which belong to the weights that it was started with"
            )
        async with self._updating:
            started = time.monotonic()
            if update.version <= self._version:
                raise WeightSyncError(
                    f"{self.engine_id} holds version {self._version}; the update to version {update.version} is stale"
                )
            await (_verify_staged(client, update) if update.send is None else _verify_sent(client, update))
            paused = time.monotonic()
            async with client.paused():
                version, num_tensors, num_bytes, checksum, encoded_images = await client.load_verified(update.version)
                self._version = version
            resumed = time.monotonic()
            prompts = client.take_prompt_tokens()
            return Receipt(
                version,
                num_tensors,
                num_bytes,
                checksum,
                self.engine_id,
                seconds=resumed - started,
                pause_s=resumed - paused,
                prompt_tokens=prompts.total,
                computed_prompt_tokens=prompts.computed,
                encoded_images=encoded_images,
            )

    async def shutdown(self) -> None:
        """End the engine's processes; pending and later calls fail with `EngineDiedError`. May be called twice."""
        client, self._client = self._client, None
        if client is not None:
            client.shutdown()

    async def _encode(self, processor: PolicyProcessor, request: RolloutRequest) -> EncodedPrompt:
        def encode() -> EncodedPrompt:
            if request.messages:
                return processor.encode_chat(processor.chat_text(request.messages), request.images)
            return processor.encode_prompt(request.question, request.images, self._prompt)

        with _refusing(request):
            encoded = await asyncio.to_thread(encode)
        if len(encoded.token_ids_P) >= self._config.max_model_len:
            raise RolloutRequestError(
                f"sample {request.sample_id}: prompt of {len(encoded.token_ids_P)} tokens leaves no room in "
                f"max_model_len = {self._config.max_model_len}; raise it or lower max_pixels"
            )
        return encoded

    def _started(self) -> tuple[VllmClient, PolicyProcessor]:
        if self._processor is None:
            raise RuntimeError(f"{self.engine_id} has not been started; await start() first")
        if self._client is None:
            raise EngineDiedError(f"{self.engine_id} has been shut down")
        return self._client, self._processor


def engine_request(
    request: RolloutRequest, encoded: EncodedPrompt, processor: PolicyProcessor, number: int
) -> EngineRequest:
    """What vLLM is asked for a request; `number` tells apart those of one ticket."""
    from sif_ray.rollout.vllm_client import EngineRequest

    return EngineRequest(
        request_id=f"{request.ticket_id}-{number}",
        token_ids=encoded.engine_token_ids,
        images=[(_content_id(image), decode_image(image)) for image in request.images],
        sampling=request.sampling,
        stop_token_id=processor.eos_token_id,
        forbidden_token_id=processor.image_token_id,
        seed=None if request.seed is None else _spread(request.seed),
        adapter=request.adapter,
        priority=-1 if request.urgent else 0,
    )


@contextmanager
def _refusing(request: RolloutRequest) -> Iterator[None]:
    """Images that cannot be used and records that contradict themselves end this request, not the engine."""
    try:
        yield
    except (PolicyInputError, RecordError) as error:
        raise RolloutRequestError(f"sample {request.sample_id}: {error}") from error


def _rollout(completion: Completion, processor: PolicyProcessor) -> Rollout:
    if processor.image_token_id in completion.token_ids_T:  # a bias, not a mask, keeps it out; see FORBIDDEN_LOGIT_BIAS
        raise RecordError("token_ids_T holds an image placeholder, which has no image")
    return Rollout(
        token_ids_T=completion.token_ids_T,
        logprobs_T=completion.logprobs_T,
        version_spans=completion.version_spans,
        finish_reason=completion.finish_reason,
        text=processor.decode(completion.token_ids_T.tolist()),
    )


async def _verify_staged(client: VllmClient, update: WeightUpdate) -> None:
    """Fetch the buckets, hand them to the workers in a file and have them verified."""
    buckets = await _fetch(update.buckets)
    with staging_file(staged_size(buckets)) as path:
        manifest = await asyncio.to_thread(write_staged, path, update.version, update.tensors, buckets)
        await client.verify_weights(manifest)


async def _verify_sent(client: VllmClient, update: WeightUpdate) -> None:
    """Have the learner send the buckets to the workers, and have them verified there."""
    assert update.send is not None
    host = client.address
    store = await asyncio.to_thread(wire.open_store, host)
    manifest = {
        "version": update.version,
        "tensors": specs_to_rows(update.tensors),
        "num_bytes": list(update.buckets),
        "host": host,
        "port": store.port,
    }
    sending = asyncio.ensure_future(_awaited(update.send(host, store.port, client.num_workers)))
    while not store.check([wire.BACKEND_KEY]):  # a learner in the middle of a step comes after it
        if sending.done():
            await sending
        await asyncio.sleep(POLL_S)
    await asyncio.gather(client.verify_weights(manifest), sending)


async def _awaited(call: Awaitable[None]) -> None:
    await call


async def _fetch(buckets: Iterable[Any]) -> list[ByteArray]:
    return [bucket if isinstance(bucket, np.ndarray) else await bucket for bucket in buckets]


def _content_id(image: bytes) -> str:
    """Identifier under which the engine caches what it computed for an image."""
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def _spread(seed: int) -> int:
    """A seed whose neighbours are far away: vLLM gives rollout i of a group the seed `seed + i`."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest()) >> 1


def _return_memory() -> None:
    """Hand freed memory back to the system: loading a tokenizer of 150,000 tokens, as vLLM does several times, leaves
    0.7 GB of it with glibc, for good."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _refuse_tied_embeddings(model: str) -> None:
    config = transformers.AutoConfig.from_pretrained(model)
    if config.get_text_config().tie_word_embeddings or config.tie_word_embeddings:
        raise WeightSyncError(
            f"lm_head.weight is tied to the input embedding in {model} (tie_word_embeddings), and vLLM on a CPU would "
            "keep a packed copy of the old one after a weight update; use a checkpoint with untied embeddings, or a GPU"
        )
