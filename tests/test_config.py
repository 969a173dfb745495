"""Configurations are read exactly, and a wrong one names the key, the value and the way out."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from sif_ray.config import STAGES, ConfigError, GrpoConfig, QuickstartConfig, describe, differences, load, to_yaml
from sif_ray.quickstart import with_paths

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_valid_and_survive_yaml(stage, tmp_path):
    config = load(stage)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(stage, str(file)) == config
    assert differences(config) == {}


def test_a_file_and_overrides_are_merged_in_order(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("group_size: 4\nsampling: {temperature: 0.7}\n", encoding="utf-8")
    config = load("grpo", str(file), ["group_size=6", "rewards.box=2"])
    assert (config.group_size, config.sampling.temperature, config.rewards.box) == (6, 0.7, 2.0)
    assert set(differences(config)) == {"group_size", "sampling.temperature", "rewards.box"}
    assert "group_size = 6  (default 8)" in describe(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["group_size=1"], ["group_size = 1", "at least 2"]),
        (["group_sice=8"], ["group_sice"]),
        (["group_size=many"], ["group_size", "many"]),
        (["sampling.temperature=0"], ["sampling", "temperature 0"]),
        (["stuck_after_s=200"], ["stuck_after_s (200)", "lease_timeout_s (300)"]),
        (["eval_samples=0"], ["eval_samples = 0", "at least 1"]),
        (["learner.zero_stage=4"], ["learner.zero_stage = 4", "0, 1, 2 or 3"]),
        (["profile=paper"], ["profile = 'paper'", "published, corrected"]),
        (["engine.max_model_len=1"], ["engine.max_model_len = 1"]),
        (["objective.clip_high=nan"], ["objective.clip_high = nan"]),
        (["objective.surrogate=ppo"], ["objective.surrogate = 'ppo'", "clip, gspo or cispo"]),
        (["objective.importance_cap=0.5"], ["objective.importance_cap = 0.5", "at least 1"]),
        (["objective.updates_per_batch=0"], ["objective.updates_per_batch = 0"]),
        (["engine.num_gpus=1", "engine.tensor_parallel_size=2"], ["engine.num_gpus = 1", "tensor_parallel_size = 2"]),
        (["weight_transfer=ipc"], ["weight_transfer = 'ipc'", "object_store, gloo or nccl"]),
        (["weight_transfer=nccl", "engine.num_gpus=1"], ["weight_transfer = 'nccl'", "learner.num_gpus_per_rank = 0"]),
        (["engine.num_gpus=2"], ["engine.num_gpus = 2 with tensor_parallel_size = 1", "set both to the same number"]),
        (["engine.num_gpus=1.5", "engine.tensor_parallel_size=2"], ["num_gpus = 1.5", "a GPU for each"]),
        (["ray.object_store_mib=1"], ["ray.object_store_mib = 1"]),
        (["judge.kind=human"], ["judge.kind = 'human'", "exact or llm"]),
        (["judge.kind=llm", "judge.base_url=http://x/v1"], ["judge.model = ''", "an endpoint needs"]),
        (["judge.base_url=localhost:8000"], ["judge.base_url = 'localhost:8000'", "http://"]),
        (["judge.usd_per_million_tokens=[1]"], ["judge.usd_per_million_tokens = [1.0]"]),
        (
            ["judge.kind=llm", "judge.model=m", "judge.base_url=http://x/v1", "judge.max_wait_s=300"],
            ["judge.max_wait_s (60 + 300)", "lease_timeout_s (300)"],
        ),
        (
            ["judge.kind=llm", "judge.model=m", "judge.base_url=http://x/v1", "num_reward_workers=33"],
            ["num_reward_workers (33)", "judge.max_concurrency (32)"],
        ),
        (["sampling.temperature=2.5"], ["sampling.temperature = 2.5", "[0, 2]"]),
        (["sampling.max_tokens=4096"], ["sampling.max_tokens (4096)", "engine.max_model_len (4096)"]),
        (["learner.micro_batch_tokens=4095"], ["learner.micro_batch_tokens (4095)", "engine.max_model_len (4096)"]),
        (["weight_transfer=nccl", "placement.colocate=true"], ["weight_transfer = 'nccl'", "use object_store"]),
        (["learner.dtype=bfloat16"], ["learner.dtype = 'bfloat16' on CPUs", "learner.num_gpus_per_rank"]),
    ],
)
def test_a_wrong_value_is_named(overrides, words):
    with pytest.raises(ConfigError) as error:
        load("grpo", None, overrides)
    for word in words:
        assert word in str(error.value)


def test_a_key_in_the_place_of_its_name_is_not_repeated():
    settings = ["judge.kind=llm", "judge.model=m", "judge.base_url=http://x/v1", "judge.api_key_env=sk-12345"]
    with pytest.raises(ConfigError, match=r"judge\.api_key_env must be the name") as error:
        load("grpo", None, settings)
    assert "12345" not in str(error.value)


@pytest.mark.parametrize("content", ["group_size: [", "- 1\n- 2\n", "group_size: {a: 1}\n", "\tx"])
def test_a_broken_file_is_a_configuration_error(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load("grpo", str(file))


@pytest.mark.parametrize("layout", [(0, 1), (0, 2), (1, 1), (0.5, 1), (4, 4)])
def test_engines_on_cpus_on_shared_and_on_several_gpus_are_layouts(layout):
    gpus, size = layout
    engine = load("grpo", None, [f"engine.num_gpus={gpus}", f"engine.tensor_parallel_size={size}"]).engine
    assert (engine.num_gpus, engine.tensor_parallel_size) == layout


def test_depth_actors_need_a_range():
    with pytest.raises(ConfigError, match=r"depth_actors_max \(1\) is below depth_actors_min \(2\)"):
        load("generate", None, ["depth_actors_min=2", "depth_actors_max=1"])


def test_what_is_wrong_inside_a_block_is_said_with_the_block():
    with pytest.raises(ConfigError, match=r"^grpo\.sampling\.max_tokens \(4096\) leaves no room"):
        load("quickstart", None, ["grpo.sampling.max_tokens=4096"])


def test_splits_of_a_file_replace_the_default(tmp_path):
    file = tmp_path / "generate.yaml"
    file.write_text("splits: {a: 3}\n", encoding="utf-8")
    assert load("generate", str(file)).scenes_per_split == {"a": 3}
    assert load("generate").scenes_per_split == {"train": 256}


def test_the_quickstart_chains_its_stages_and_misses_no_split():
    config = load("quickstart", str(CONFIGS / "quickstart.yaml"), ["run_dir=elsewhere"])
    chained = with_paths(config)
    assert chained.warmup.data == chained.grpo.data == chained.evaluate.data == chained.generate.output
    assert chained.grpo.policy == chained.evaluate.checkpoints["warmup"] == "elsewhere/warmup/checkpoint"
    assert chained.serve.policy == chained.evaluate.checkpoints["grpo"] == "elsewhere/grpo/checkpoint"
    with pytest.raises(ConfigError, match="unheard"):
        with_paths(replace(config, grpo=replace(config.grpo, split="unheard")))


def test_there_are_few_keys():
    def keys(kind) -> int:
        defaults = kind()
        return sum(
            keys(type(getattr(defaults, item.name))) if is_dataclass(getattr(defaults, item.name)) else 1
            for item in fields(kind)
        )

    assert keys(GrpoConfig) <= 100
    assert QuickstartConfig().grpo == GrpoConfig()
