"""The tiny policy: the class of Qwen2.5-VL with its own small tokenizer. A toy: it knows rendered solids and no more.

This file builds it with random weights; `pretrain` teaches it to see.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sif_ray.datagen.teacher import VOCABULARY_SENTENCES, frame_sentences
from sif_ray.method.boxes import FULL_IMAGE
from sif_ray.method.depth_code import from_disparity
from sif_ray.method.prompts import SUFFIX, SUFFIX_WITH_DEPTH_WORDS
from sif_ray.method.trace import AreaBox, Step, Trace
from sif_ray.toyworld.plain_text import all_texts
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import SIZE_PX, make_scene

NUMBERS = tuple(f"{hundredths / 100:.2f}" for hundredths in range(101))
"""Every number that a toy trace holds, from 0.00 to 1.00: one token each."""

PATCH_PX, MERGE = 14, 2
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_PIECES = Regex(
    r"[01]\.\d\d"
    r'|(?:</?(?:think|area|text|answer)>\n?|\[\{"bbox_2d":\[|\],"depth":|\}\]|\}, \{"bbox_2d":\[)+'
    r"|Original image: |\nDepth image: "
    r"| ?[A-Za-z]+|."
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(folder: str | Path, seed: int = 0, init_std: float = 0.06) -> None:
    """Write a random-weight tiny policy with tokenizer, chat template and image processor to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    _write_processor_files(folder)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, init_std))
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every number, tag run, prompt suffix and toy word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (SUFFIX, SUFFIX_WITH_DEPTH_WORDS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(_SPECIAL[1:2] + _SPECIAL[3:]),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    split = [number for number in NUMBERS if len(fast(number)["input_ids"]) != 1]
    if split:
        raise AssertionError(f"numbers that are not one token: {split[:5]}")
    return fast


def number_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of 0.00, 0.01, ... 1.00, in order."""
    return [tokenizer.convert_tokens_to_ids(number) for number in NUMBERS]


def build_config(tokenizer: PreTrainedTokenizerFast, init_std: float) -> Qwen2_5_VLConfig:
    """head_dim 32 everywhere (vLLM's minimum on a CPU) and untied embeddings (its weight update needs them)."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 160,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "initializer_range": init_std,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 160,
            "fullatt_block_indexes": [0, 1, 2],
            "window_size": SIZE_PX,
            "initializer_range": init_std,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D weights inside the blocks: what Muon trains. Embeddings, head, patches and vectors are the others."""
    outside = ("embed_tokens", "lm_head", "patch_embed")
    return [p for name, p in model.named_parameters() if p.ndim == 2 and not any(part in name for part in outside)]


def _write_processor_files(folder: Path) -> None:
    limits = {"shortest_edge": 28 * 28, "longest_edge": SIZE_PX * SIZE_PX}
    shared = {
        "patch_size": PATCH_PX,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": limits,
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", **shared}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2_5_VLProcessor", **shared}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n", encoding="utf-8")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")


def _corpus() -> Iterator[str]:
    yield from itertools.chain.from_iterable(itertools.repeat(number, 50) for number in NUMBERS)
    yield from itertools.repeat("Original image: \nDepth image: \nuser\nassistant\nsystem\n", 50)
    for sentence in VOCABULARY_SENTENCES:
        yield from itertools.repeat(sentence, 50)
    for seed in range(400):
        scene = make_scene(seed)
        rendering = render(scene)
        for question, answer in all_texts(scene, rendering, from_disparity(rendering.disparity)):
            yield question
            yield answer
            yield _trace(answer)


def _trace(answer: str) -> str:
    area = (AreaBox(FULL_IMAGE, 0.5),)
    pair = (AreaBox((0.1, 0.2, 0.3, 0.4), 0.5), AreaBox((0.5, 0.2, 0.7, 0.4), 0.5))
    frames = [[FULL_IMAGE], [box.bbox_2d for box in pair]]
    texts = frame_sentences(frames, ("red ball", "blue box"))
    return Trace((Step(area, texts[0]), Step(pair, texts[1])), answer[:20].split("<")[0]).render(decimals=2)
