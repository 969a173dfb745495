"""Each way in which a policy folder can be wrong is told before anything starts, with the file and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sif_ray.config import ConfigError, LearnerConfig
from sif_ray.policy.check import check_policy, check_room, check_training_room
from sif_ray.toyworld.assets import path


@pytest.fixture
def policy(tmp_path) -> Path:
    return shutil.copytree(path("tiny_policy"), tmp_path / "policy")


def edit(file: Path, change: Callable[[dict], object]) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def test_a_whole_policy_passes_and_its_folder_is_returned(policy):
    assert check_policy(str(policy), engine_on_cpu=True) == str(policy)
    assert check_policy("toy") == str(path("tiny_policy"))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", r"config\.json is missing; name a Hugging Face checkpoint folder"),
        ("preprocessor_config.json", r"no preprocessor_config\.json or processor_config\.json .*copy it from the base"),
        ("tokenizer.json", r"no tokenizer\.json or vocab\.json and merges\.txt \(tokenizer\); copy it"),
        ("tokenizer_config.json", r"no tokenizer_config\.json .*copy it"),
        ("chat_template.jinja", r"no chat template \(chat_template\.jinja or .*copy it"),
        ("model.safetensors", r"model\.safetensors: missing; copy the whole checkpoint"),
    ],
)
def test_a_missing_file_is_named(policy, lost, message):
    (policy / lost).unlink()
    with pytest.raises(ConfigError, match=message):
        check_policy(str(policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llava"), r"model_type 'llava'; policies are qwen2_5_vl or qwen3_vl"),
        (
            lambda c: c["text_config"].update(vocab_size=500),
            r"embed_tokens.* has shape .*json says \(500, 160\)",
        ),
        (lambda c: c["vision_config"].update(depth=4), r"no tensor for model\.visual\.blocks\.3"),
        (lambda c: c.update(image_token_id=7), r"image_token_id = 7 in .*tokenizer, not <\|image_pad\|>; put"),
    ],
)
def test_a_configuration_of_another_model_is_refused(policy, change, message):
    edit(policy / "config.json", change)
    with pytest.raises(ConfigError, match=message):
        check_policy(str(policy))


def test_a_tokenizer_with_more_tokens_than_the_embeddings_have_rows_is_refused(policy):
    def add(tokenizer):
        token = dict(tokenizer["added_tokens"][-1], id=588, content="<extra>")
        tokenizer["added_tokens"].append(token)

    edit(policy / "tokenizer.json", add)
    with pytest.raises(ConfigError, match=r"has 589 tokens, the embeddings 588 rows.*put the tokenizer files"):
        check_policy(str(policy))


def test_weights_that_were_cut_off_are_refused(policy):
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cut off or damaged .*copy it again"):
        check_policy(str(policy))


def test_tied_embeddings_are_refused_where_an_engine_runs_on_a_cpu(policy):
    edit(policy / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit(policy / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=True))
    check_policy(str(policy))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings in .*config\.json.*engine\.num_gpus.*untied"):
        check_policy(str(policy), engine_on_cpu=True)


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoints\.best = .* is neither a folder nor a model that the hub gives"):
        check_policy(str(tmp_path / "nowhere"), "checkpoints.best")


def test_a_disk_that_is_too_small_is_told_before_the_training(tmp_path):
    check_room(tmp_path / "not" / "there" / "yet", 1e6)
    with pytest.raises(ConfigError, match=r"output = .*: 1000000000\.0 GB are to be written, .* free; choose"):
        check_room(tmp_path / "out", 1e18)
    check_training_room(str(tmp_path), "toy", LearnerConfig(), checkpoints_kept=2)
    with pytest.raises(ConfigError, match="GB are to be written"):
        check_training_room(str(tmp_path), "qwen2.5-vl-72b", LearnerConfig(), checkpoints_kept=10_000)
