"""GRPO steps of TRL's `GRPOTrainer`, run by the interpreter of an environment of its own: the other side of the suite
`grpo`.

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0  # the CPU build, as for the project
    trl-env/bin/pip install -r sif_ray/bench/trl_requirements.txt
    trl-env/bin/python tools/repair_torchvision.py  # only where torchvision is a CUDA build
    SIF_RAY_TRL_PYTHON=trl-env/bin/python sif-ray bench grpo

Completions come from transformers' `generate`, as TRL has them where vLLM cannot run inside its process (its colocated
vLLM does not load on a CPU). Prompts, images and reward terms are the project's own code. A judge is asked over HTTP,
for every completion, by a pool of `JUDGE_THREADS` threads inside the reward function. TRL's documentation shows reward
functions that go through the completions one after the other, which would wait eight times as long.

As a program it takes the file of a `TrlRequest` as JSON and prints {"ended_s": [time of every step's end],
"prompt_tokens": mean, "completion_tokens": mean, "rewards": [mean of every step]} as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JUDGE_THREADS = 8


@dataclass(frozen=True)
class TrlRequest:
    """What TRL is to do, with the values of a `GrpoConfig`."""

    data: str  # dataset folder
    split: str
    policy: str
    output: str
    max_steps: int
    groups_per_step: int
    group_size: int
    max_tokens: int
    temperature: float
    learning_rate: float
    weight_decay: float
    micro_batch: int  # completions of one forward and backward pass
    threads: int
    profile: str
    seed: int
    judge_url: str = ""  # "" = answers are compared as text
    prompt: dict[str, bool] = field(default_factory=dict)  # of `PromptConfig`

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


def train(request: TrlRequest) -> dict[str, Any]:
    """Run the steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sif_ray.datagen.dataset import read_samples
    from sif_ray.method.prompts import user_content
    from sif_ray.policy.processor import decode_image

    torch.set_num_threads(request.threads)
    samples = {sample.sample_id: sample for sample in read_samples(request.data, request.split)}
    content = {name: user_content(sample.question, **request.prompt) for name, sample in samples.items()}
    rows = [
        {
            "prompt": [{"role": "user", "content": content[name]}],
            "images": [decode_image(image) for image in sample.prompt_images(request.prompt["depth_image"])],
            "sample_id": name,
        }
        for name, sample in samples.items()
    ]
    completions = request.groups_per_step * request.group_size
    arguments = GRPOConfig(
        output_dir=request.output,
        max_steps=request.max_steps,
        per_device_train_batch_size=request.micro_batch,
        gradient_accumulation_steps=completions // request.micro_batch,
        num_generations=request.group_size,
        max_completion_length=request.max_tokens,
        temperature=request.temperature,
        learning_rate=request.learning_rate,
        weight_decay=request.weight_decay,
        seed=request.seed,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    ended_s: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            ended_s.append(time.time())

    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(request.policy, dtype=torch.float32),
        processing_class=AutoProcessor.from_pretrained(request.policy, padding_side="left"),
        reward_funcs=reward_function(request, samples),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    completion_tokens = sum(line["completions/mean_length"] for line in logged) / len(logged)
    return {
        "ended_s": ended_s,
        "prompt_tokens": logged[-1]["num_tokens"] / (len(logged) * completions) - completion_tokens,
        "completion_tokens": completion_tokens,
        "rewards": [line["reward"] for line in logged],
    }


def reward_function(request: TrlRequest, samples: dict[str, Any]) -> Any:
    """TRL's form of the method's reward."""
    from sif_ray.config import RewardConfig
    from sif_ray.judge.exact import ExactMatchJudge
    from sif_ray.judge.scoring import read_depth_image, score_terms, weighted_total
    from sif_ray.method.trace import find_answer

    weights, exact = RewardConfig(), ExactMatchJudge()
    depths = {name: read_depth_image(sample.depth_image, request.profile) for name, sample in samples.items()}
    ask = _judge(request.judge_url) if request.judge_url else None

    def answer_score(text: str, sample: Any) -> float:
        answer = find_answer(text)
        if answer is None:
            return 0.0
        return ask(sample, answer) if ask else float(exact.same(sample.question, sample.answer, answer))

    def reward(completions: Sequence[Any], sample_id: Sequence[str], **others: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        texts = [text if isinstance(text, str) else text[0]["text"] for text in texts]
        asked = [samples[name] for name in sample_id]
        with ThreadPoolExecutor(JUDGE_THREADS) as pool:
            scores = list(pool.map(answer_score, texts, asked)) if ask else list(map(answer_score, texts, asked))
        return [
            weighted_total(
                score_terms(
                    text,
                    target_boxes=sample.boxes,
                    target_answer=sample.answer,
                    depth_rel=depths[sample.sample_id],
                    answer_score=score,
                    previous=None,
                    profile=request.profile,
                ),
                weights,
            )
            for text, sample, score in zip(texts, asked, scores, strict=True)
        ]

    return reward


def _judge(base_url: str) -> Any:
    from openai import OpenAI

    from sif_ray.config import JudgeConfig
    from sif_ray.judge.llm import Question
    from sif_ray.judge.reply import read_score
    from sif_ray.method.prompts import judge_user

    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
    config = JudgeConfig()

    def ask(sample: Any, answer: str) -> float:
        question = Question("bench", judge_user(sample.question, sample.answer, answer), sample.image)
        reply: Any = client.chat.completions.create(**question.request(config.max_tokens))
        return read_score(reply.choices[0].message.content)

    return ask


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request", type=Path)
    found = train(TrlRequest(**json.loads(parser.parse_args().request.read_text())))
    sys.stdout.write(json.dumps(found) + "\n")
