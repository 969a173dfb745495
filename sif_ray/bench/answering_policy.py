"""A policy whose completions have known lengths and always an answer to judge, at the toy policy's full price.

It is the toy policy with other numbers in its language model: what the layers add to the state of a token is made so
small that the state is little more than its own embedding, and the output layer is a table of what class of tokens
follows which. Every layer computes as before, and what it adds moves the log-probs within a class.

It writes `<answer>` with a made-up word of four signs, 67,600 of them in all, and then a filler:
one never ends, or two end with a probability each, which gives a few completions that are many times longer than most.
"""

from __future__ import annotations

import shutil
import string
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sif_ray.policy.model import resolve_model
from sif_ray.policy.processor import PolicyProcessor

NEVER = -50.0  # logit of what does not follow
SHORT_TOKENS, LONG_TOKENS, LONG_SHARE = 24.0, 320.0, 0.12  # means of both fillers; share of the longer one
LAYERS_SHARE = 0.0005  # of what the toy policy's layers add to a state
LAYERS_WEIGHT = 1.0  # deviation of the output layer's weights for what they add
_LAYERS_OUTPUT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def write_answering_policy(folder: Path, *, long_tailed: bool = False) -> str:
    """A checkpoint folder. Without `long_tailed` a completion has as many tokens as it may have."""
    source = resolve_model("toy")
    shutil.copytree(source, folder)
    processor = PolicyProcessor(source)
    weights = load_file(folder / "model.safetensors")
    classes, follows = _language(processor, long_tailed)
    embedding = torch.zeros_like(weights["model.embed_tokens.weight"])
    head = LAYERS_WEIGHT * torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0))
    head[:, : len(classes)] = NEVER
    for place, (name, tokens) in enumerate(classes.items()):
        embedding[tokens, place] = 1.0
        for after, share in follows[name].items():
            head[classes[after], place] = torch.tensor(share / len(classes[after])).log()
    size = embedding.shape[1]
    changed = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(size),
        "lm_head.weight": head / size**0.5,  # the norm before it makes a single 1 this large
    }
    changed |= {name: LAYERS_SHARE * value for name, value in weights.items() if _closes_a_layer(name)}
    assert changed.keys() <= weights.keys()
    save_file(weights | changed, folder / "model.safetensors")
    return str(folder)


def _closes_a_layer(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith(_LAYERS_OUTPUT)


def _language(
    processor: PolicyProcessor, long_tailed: bool
) -> tuple[dict[str, Sequence[int]], dict[str, Mapping[str, float]]]:
    """Tokens of every class, and for each class the shares of those that follow it."""

    def tokens(text: str) -> list[int]:
        return processor.encode_completion(text)[:-1]

    (newline,), (opened, answer), (closed,) = tokens("\n"), tokens("<answer>"), tokens("</answer>")
    classes: dict[str, Sequence[int]] = {
        "prompt": [newline],  # its last token
        "opened": [opened],
        "answer": [answer],
        "capital": [token for sign in string.ascii_uppercase for token in tokens(sign)],
        "small": [token for sign in string.ascii_lowercase for token in tokens(sign)],
        "digit": [token for sign in string.digits for token in tokens(sign)],
        "mark": [token for sign in "!#$%&*+:;=" for token in tokens(sign)],
        "closed": [closed],
        "filler": [token for sign in ".?_|" for token in tokens(sign)],
        "long filler": [token for sign in ",^@~" for token in tokens(sign)],
        "end": [processor.eos_token_id],
    }
    chain = ("prompt", "opened", "answer", "capital", "small", "digit", "mark", "closed")
    follows: dict[str, Mapping[str, float]] = {name: {after: 1.0} for name, after in pairwise(chain)}
    if long_tailed:
        follows["closed"] = {"filler": 1 - LONG_SHARE, "long filler": LONG_SHARE}
        ends = {"filler": 1 / SHORT_TOKENS, "long filler": 1 / LONG_TOKENS}
    else:
        follows["closed"] = {"filler": 1.0}
        ends = {"filler": 0.0, "long filler": 0.0}
    follows |= {name: {name: 1 - end} | ({"end": end} if end else {}) for name, end in ends.items()}
    return classes, follows | {"end": {"end": 1.0}}
