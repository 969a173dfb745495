"""Who answers: a vLLM engine or transformers with a checkpoint, or any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from sif_ray.config import ConfigError, EndpointConfig, EvaluateConfig, SamplingConfig
from sif_ray.evaluate.question import Answer, Question

if TYPE_CHECKING:
    from sif_ray.judge.caller import Call
    from sif_ray.judge.client import Completion


log = logging.getLogger(__name__)


class Answerer(Protocol):
    """Answers questions in one event loop; calls may overlap."""

    async def answer(self, question: Question) -> Answer:
        """What the policy writes, or why it writes nothing. Raises where nobody can be answered any more."""


def make_answerer(name: str, config: EvaluateConfig) -> Answerer:
    """The answerer of the policy `name` of a configuration."""
    if name in config.endpoints:
        return EndpointAnswerer(name, config)
    kind = EngineAnswerer if config.backend == "vllm" else TransformersAnswerer
    return kind(config.checkpoints[name], config)


class EngineAnswerer:
    """A vLLM engine in processes that end with this one."""

    def __init__(self, model: str, config: EvaluateConfig) -> None:
        from sif_ray.rollout.engine import RolloutEngine

        self._config = config
        self._engine = RolloutEngine(
            model, config.engine, config.prompt, max_pixels=config.max_pixels, seed=config.seed
        )
        self._starting = asyncio.Lock()
        self._started = False

    async def answer(self, question: Question) -> Answer:
        from sif_ray.rollout.engine import RolloutRequest
        from sif_ray.rollout.errors import RolloutRequestError

        async with self._starting:  # not in the constructor: an engine belongs to one event loop
            if not self._started:
                await self._engine.start()
                self._started = True
        request = RolloutRequest(
            ticket_id="-".join(map(str, question.key)),
            sample_id=question.item_id,
            question=question.text,
            images=question.images(self._config.prompt),
            num_rollouts=1,
            sampling=SamplingConfig(temperature=question.temperature, max_tokens=self._config.max_tokens),
            seed=question.key.seed(self._config.seed),
            messages=tuple(question.messages(self._config.prompt)),
        )
        try:
            group = await self._engine.generate(request)
        except RolloutRequestError as error:
            log.info("%s", error)
            return Answer(*question.key, refusal="prompt_refused")
        return Answer(*question.key, text=group.rollouts[0].text, num_tokens=group.num_tokens)


class TransformersAnswerer:
    """The checkpoint in this process, one question at a time: slow, and independent of any engine."""

    def __init__(self, model: str, config: EvaluateConfig) -> None:
        import torch

        from sif_ray.policy.model import load_policy
        from sif_ray.policy.processor import PolicyProcessor

        torch.set_num_threads(config.engine.threads)
        self._config = config
        self._processor = PolicyProcessor(model, config.max_pixels)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._policy: Any = load_policy(model, "bfloat16" if self._device == "cuda" else "float32").to(self._device)
        self._turn = asyncio.Lock()

    async def answer(self, question: Question) -> Answer:
        async with self._turn:
            return await asyncio.to_thread(self._answer, question)

    def _answer(self, question: Question) -> Answer:
        import torch

        from sif_ray.policy.processor import PolicyInputError

        processor, prompt = self._processor, self._config.prompt
        try:
            encoded = processor.encode_chat(processor.chat_text(question.messages(prompt)), question.images(prompt))
        except PolicyInputError as error:
            log.info("%s: %s", question.item_id, error)
            return Answer(*question.key, refusal="prompt_refused")
        if len(encoded.token_ids_P) >= self._config.engine.max_model_len:
            return Answer(*question.key, refusal="prompt_refused")
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}  # not what the checkpoint proposes
        if question.temperature:
            torch.manual_seed(question.key.seed(self._config.seed))
            sampling |= {"do_sample": True, "temperature": question.temperature, "top_p": 1.0, "top_k": 0}
        token_ids = torch.tensor([encoded.token_ids_P], device=self._device)
        room = self._config.engine.max_model_len - len(encoded.token_ids_P)
        with torch.inference_mode():
            found = self._policy.generate(
                input_ids=token_ids,
                attention_mask=torch.ones_like(token_ids),
                mm_token_type_ids=(token_ids == processor.image_token_id).int(),
                pixel_values=torch.tensor(encoded.pixel_values, device=self._device, dtype=self._policy.dtype),
                image_grid_thw=torch.tensor(encoded.image_grid_thw, device=self._device),
                max_new_tokens=min(self._config.max_tokens, room),
                eos_token_id=processor.eos_token_id,
                pad_token_id=processor.pad_token_id,
                suppress_tokens=[processor.image_token_id],
                **sampling,
            )
        written = found[0, token_ids.shape[1] :].tolist()
        return Answer(*question.key, text=processor.decode(written), num_tokens=len(written))


class EndpointAnswerer:
    """A chat model behind an OpenAI-compatible API. An outage is waited for, up to the endpoint's `max_wait_s`."""

    def __init__(self, name: str, config: EvaluateConfig) -> None:
        from sif_ray.judge.caller import Caller
        from sif_ray.judge.factory import read_api_key

        self._name, self._endpoint, self._config = name, config.endpoints[name], config
        key = read_api_key(self._endpoint, f"endpoints.{name}")
        audit = Path(config.output) / "answers" / name / f"audit-{socket.gethostname()}-{os.getpid()}.jsonl"
        ping = chat_call(_EASY, self._endpoint, config)
        self._caller = Caller("policy", self._endpoint, key, audit, config.actors_max, ping=ping)

    async def answer(self, question: Question) -> Answer:
        from sif_ray.judge.client import CallError, CallRefused, EndpointDown

        try:
            found = await self._caller.call(chat_call(question, self._endpoint, self._config))
        except CallRefused:
            return Answer(*question.key, refusal="endpoint_refusal")
        except CallError as error:
            if isinstance(error, EndpointDown) or not error.retry:
                raise RuntimeError(
                    f"endpoints.{self._name}: {self._endpoint.model!r} at {self._endpoint.base_url} answers nobody "
                    f"({error}); start the run again once it does, nothing is lost"
                ) from error
            return Answer(*question.key, refusal=f"endpoint_{'timeout' if error.reason == 'timeout' else 'failed'}")
        return Answer(*question.key, text=found.text, num_tokens=found.tokens_out)


def chat_call(question: Question, endpoint: EndpointConfig, config: EvaluateConfig) -> Call[Completion]:
    """A chat completion with the images inside."""
    from sif_ray.judge.caller import Call
    from sif_ray.judge.client import image_part

    images = iter(question.images(config.prompt))

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [image_part(next(images)) if part["type"] == "image" else part for part in content]

    request = {
        "model": endpoint.model,
        "messages": [
            {**message, "content": filled(message["content"])} for message in question.messages(config.prompt)
        ],
        "temperature": question.temperature,
        "max_tokens": config.max_tokens,
        "seed": question.key.seed(config.seed),
    }
    note = {"task": question.task, "arm": question.arm, "draw": question.draw, "item_id": question.item_id}
    return Call(lambda: request, lambda completion: completion, note)


def _green_square() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(picture, "PNG")
    return picture.getvalue()


_EASY = Question("", "", 0, "", "Which colour is this? One word.", photo=_green_square(), plain=True)
"""What any endpoint can answer."""


def check_endpoint(name: str, config: EvaluateConfig) -> None:
    """Raise `ConfigError` where an endpoint cannot work: it is asked something easy about a picture."""
    from sif_ray.judge.caller import ask_before_a_run
    from sif_ray.judge.client import CallError
    from sif_ray.judge.factory import read_api_key

    endpoint = config.endpoints[name]
    key = read_api_key(endpoint, f"endpoints.{name}")
    try:
        asyncio.run(ask_before_a_run(endpoint, key, chat_call(_EASY, endpoint, config)))
    except CallError as error:
        raise ConfigError(
            f"endpoints.{name}: {endpoint.model!r} at {endpoint.base_url} did not answer a question about a picture "
            f"({error}); start it, or correct base_url, model, api_key_env or max_tokens"
        ) from error
