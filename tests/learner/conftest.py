"""Scored groups on the tiny policy: real prompts and images, made-up completions."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from sif_ray.config import PromptConfig
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import Rollout, RolloutGroup, Sample, ScoredGroup
from sif_ray.toyworld import assets

MakeGroup = Callable[..., ScoredGroup]


@pytest.fixture(scope="session")
def tiny_policy() -> str:
    return str(assets.path("tiny_policy"))


@pytest.fixture(scope="session")
def fresh_policy(tiny_policy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny policy before any training: every token about equally likely, and float32 exact to 1e-6."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from sif_ray.policy.model import save_policy

    folder = str(tmp_path_factory.mktemp("fresh") / "policy")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_policy))
    save_policy(model, tiny_policy, folder)
    return folder


@pytest.fixture(scope="session")
def process_group_of_one() -> Iterator[None]:
    """Engines in the test process share one group of one: DeepSpeed keeps its groups and would not know a second."""
    import torch.distributed as dist

    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def processor(tiny_policy: str) -> PolicyProcessor:
    return PolicyProcessor(tiny_policy)


@pytest.fixture(scope="session")
def merge_by_peft(tiny_policy: str) -> Callable[..., dict[str, torch.Tensor]]:
    """merge_by_peft(parameters, alpha): the tiny policy with the adapter weights among `parameters`, as peft's own
    model of transformers' own policy merges them."""

    def merge(parameters: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
        adapter = {f"base_model.model.{name}": value for name, value in parameters.items() if ".lora_" in name}
        layers = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in adapter})
        rank = next(len(value) for name, value in adapter.items() if ".lora_A" in name)
        policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_policy, dtype=torch.float32)
        model = peft.get_peft_model(policy, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
        assert not model.load_state_dict(adapter, strict=False).unexpected_keys
        return {name: value.detach() for name, value in model.merge_and_unload().named_parameters()}

    return merge


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """make_sample(scene, question=0): a row with a trace; rows of a scene share their images."""

    def make(scene: int, question: int = 0) -> Sample:
        rng = np.random.default_rng(scene)
        area = '<area>[{"bbox_2d":[0.10,0.20,0.30,0.40],"depth":0.50}]</area>'
        return Sample(
            sample_id=f"scene{scene}-{question}",
            scene_id=f"scene{scene}",
            dataset="noise",
            split="warmup",
            question=f"Which number is {question}?",
            question_type="",
            answer="red",
            boxes=((0.1, 0.2, 0.3, 0.4),),
            width=112,
            height=112,
            image=noise_image(rng),
            depth_image=noise_image(rng),
            depth_source="exact",
            source_frame="image",
            trace=f"<think>{area}<text>A box.</text></think><answer>red</answer>",
        )

    return make


@pytest.fixture(scope="session")
def make_group(processor: PolicyProcessor) -> MakeGroup:
    """make_group(seed, lengths): completions of random tokens in these lengths, random rewards and log-probs.

    Version 0 wrote the tokens, but the last one of every completion is of `last_version`.
    """

    def make(seed: int, lengths: tuple[int, ...] = (5, 9, 3, 7), last_version: int = 0) -> ScoredGroup:
        rng = np.random.default_rng(seed)
        images = (noise_image(rng), noise_image(rng))
        prompt = processor.encode_prompt(f"What is number {seed}?", images, PromptConfig())
        rollouts = tuple(
            Rollout(
                token_ids_T=rng.integers(20, 500, length).astype(np.int32),
                logprobs_T=rng.normal(-6.0, 0.5, length).astype(np.float32),
                version_spans=((0, length - 1), (last_version, 1)),
                finish_reason="length",
                text="",
            )
            for length in lengths
        )
        group = RolloutGroup(
            ticket_id=f"ticket-{seed}",
            sample_id=f"sample-{seed}",
            prompt_token_ids_P=np.asarray(prompt.token_ids_P, dtype=np.int32),
            images=images,
            image_grid_thw=prompt.image_grid_thw,
            rollouts=rollouts,
        )
        return ScoredGroup(group=group, rewards_G=rng.uniform(0, 4, len(lengths)).astype(np.float32), terms_G={})

    return make


def noise_image(rng: np.random.Generator) -> bytes:
    """A PNG of the toy world's size."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
