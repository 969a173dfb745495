"""The supervised loss of dataset rows against transformers alone, one unpacked row at a time."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from sif_ray.config import LearnerConfig, PromptConfig
from sif_ray.learner.engine import LearnerEngine
from sif_ray.learner.rows import encode_share, scene_sequence
from sif_ray.method.prompts import user_content

pytestmark = pytest.mark.usefixtures("process_group_of_one")


@pytest.fixture(scope="module")
def samples(make_sample):
    """Two questions about one photograph and one about another, with answers of different lengths."""
    return [make_sample(0, question=0), make_sample(0, question=17), make_sample(1)]


@pytest.fixture(scope="module")
def engine(fresh_policy) -> LearnerEngine:
    return LearnerEngine(LearnerConfig(learning_rate=1e-9), fresh_policy, total_steps=10)


def plain_loss(policy: str, sample) -> tuple[float, int]:
    """Sum of -log p over the assistant's tokens, its end-of-sequence token included, and their number, by hand."""
    processor = AutoProcessor.from_pretrained(policy)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": user_content(sample.question, depth_image=True, with_depth_words=True)}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in (sample.image, sample.depth_image)]
    inputs = processor(text=[prompt + sample.trace + processor.tokenizer.eos_token], images=images, return_tensors="pt")
    length = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    logits[:, model.config.image_token_id] = -1e9  # never an answer
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    answer = logprobs[length - 1 :]
    return -float(answer.double().sum()), len(answer)


def test_the_masked_loss_of_two_samples_is_the_one_computed_by_hand(engine, fresh_policy, processor, samples):
    pair = [samples[0], samples[2]]
    by_hand = [plain_loss(fresh_policy, sample) for sample in pair]
    total, num_tokens = sum(loss for loss, _ in by_hand), sum(count for _, count in by_hand)
    sequences = encode_share(0, pair, processor, PromptConfig(), max_length=0).sequences
    assert engine.sft_loss(sequences) == (pytest.approx(total, rel=1e-5), num_tokens)
    metrics = engine.sft_step(sequences)
    assert metrics["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert metrics["trained_tokens"] == num_tokens


def test_packed_rows_have_the_loss_of_unpacked_ones(engine, processor, samples):
    packed = encode_share(0, samples, processor, PromptConfig(), max_length=0).sequences
    unpacked = [scene_sequence([sample], processor, PromptConfig()) for sample in samples]
    assert (len(packed), len(unpacked)) == (2, 3)
    together, num_tokens = engine.sft_loss(packed)
    one_by_one = [engine.sft_loss([sequence]) for sequence in unpacked]
    assert num_tokens == sum(count for _, count in one_by_one)
    assert together / num_tokens == pytest.approx(sum(loss for loss, _ in one_by_one) / num_tokens, abs=1e-5)
