"""Token-exact prompts against transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sif_ray.config import PromptConfig
from sif_ray.policy.processor import PolicyInputError, PolicyProcessor, decode_image
from sif_ray.toyworld.assets import path
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

QUESTION = "Which is closer, the red ball or the blue box?"


@pytest.fixture(scope="module")
def processor() -> PolicyProcessor:
    return PolicyProcessor(str(path("tiny_policy")))


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [png(render(make_scene(seed)).rgb) for seed in (0, 1)]


def test_both_token_forms_agree_with_the_checkpoints_processor(processor, images):
    from transformers import AutoProcessor

    encoded = processor.encode_prompt(QUESTION, images, PromptConfig())
    reference = AutoProcessor.from_pretrained(path("tiny_policy"))(
        text=[processor.prompt_text(QUESTION, PromptConfig())],
        images=[decode_image(image) for image in images],
        return_tensors="np",
    )
    assert encoded.token_ids_P == reference["input_ids"][0].tolist()
    np.testing.assert_array_equal(encoded.pixel_values, reference["pixel_values"])
    assert [list(grid) for grid in encoded.image_grid_thw] == reference["image_grid_thw"].tolist()
    assert encoded.engine_token_ids.count(processor.image_token_id) == 2
    assert encoded.token_ids_P.count(processor.image_token_id) == 2 * 16


def test_a_missing_image_is_refused_when_the_prompt_is_made(processor, images):
    with pytest.raises(PolicyInputError, match="2 image placeholders but 1 images"):
        processor.encode_prompt(QUESTION, images[:1], PromptConfig())
    assert processor.encode_prompt(QUESTION, images[:1], PromptConfig(depth_image=False)).image_grid_thw == ((1, 8, 8),)


@pytest.mark.parametrize("broken", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_refused(broken):
    with pytest.raises(PolicyInputError, match="cannot be decoded"):
        decode_image(broken)


def test_a_truncated_image_is_refused(images):
    with pytest.raises(PolicyInputError, match="cannot be decoded"):
        decode_image(images[0][: len(images[0]) // 2])


def test_large_images_are_shrunk_to_max_pixels(images):
    large = png(np.asarray(decode_image(images[0]).resize((448, 224), Image.Resampling.NEAREST)))
    limited = PolicyProcessor(str(path("tiny_policy")), max_pixels=56 * 56)
    ((_, height, width),) = limited.encode_prompt(QUESTION, [large], PromptConfig(depth_image=False)).image_grid_thw
    assert height * width * 14 * 14 <= 56 * 56


def test_completions_round_trip(processor):
    area = '[{"bbox_2d":[0.00,0.10,1.00,1.00],"depth":0.52}]'
    text = f"<think><area>{area}</area>\n<text>Look closer.</text></think>\n<answer>2</answer>"
    ids = processor.encode_completion(text)
    assert ids[-1] == processor.eos_token_id
    assert processor.decode(ids) == text
    assert processor.decode(processor.encode_completion("Ünïcode 🎈 {}")) == "Ünïcode 🎈 {}"


def test_image_tokens_must_fit_the_grids_image_by_image(processor, images):
    encoded = processor.encode_prompt(QUESTION, images, PromptConfig())
    tokens, grid = encoded.token_ids_P, encoded.image_grid_thw
    processor.check_image_tokens(tokens, grid)
    lost = tokens.index(processor.image_token_id)
    moved = [*tokens[:lost], *tokens[lost + 1 :]]
    moved.insert(len(moved) - moved[::-1].index(processor.image_token_id), processor.image_token_id)  # as many in all
    for wrong_tokens, wrong_grid in [
        (encoded.engine_token_ids, grid),
        (tokens[:lost] + tokens[lost + 1 :], grid),
        (moved, grid),
        (tokens, grid[:1]),
        (tokens, (grid[0], (1, 8, 16))),
        ([token for token in tokens if token != processor.image_token_id], grid),
    ]:
        with pytest.raises(PolicyInputError, match="image tokens, but the grids"):
            processor.check_image_tokens(wrong_tokens, wrong_grid)
