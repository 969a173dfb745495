"""A model card says what its run says, and that the rest is unknown."""

from __future__ import annotations

import json

import yaml

from sif_ray.datagen.dataset import FORMAT
from sif_ray.policy.card import write_card


def test_a_card_tells_training_data_measurements_and_licences(tmp_path):
    data, run, base, out = (tmp_path / name for name in ("data", "run", "base", "out"))
    for folder in (data, run, base, out):
        folder.mkdir()
    made = {"source": "viscot", "depth_model": "depth-anything/Depth-Anything-V2-Large-hf", "profile": "published"}
    counts = {"accepted": 45_000, "rejected": 17, "splits": {}}
    manifest = {"format": FORMAT, "config": made, "counts": counts, "config_hash": "abc123"}
    (data / "manifest.json").write_text(json.dumps(manifest))
    settings = {"data": str(data), "split": "train", "prompt": {"depth_image": False, "with_depth_words": False}}
    learner = {"lora": {"rank": 64}, "learning_rate": 1e-5}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"objective": {}, "learner": learner}))
    lines = [{"step": step, "time_s": 0.0, "reward/total": step / 8, "lost": None} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n# Base\n")
    write_card(out, base="Qwen/Qwen2.5-VL-3B-Instruct", base_folder=base, run=run, adapter=True, licence="")
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["base_model"], head["library_name"]) == ("Qwen/Qwen2.5-VL-3B-Instruct", "peft")
    assert "license" not in head
    for told in (
        "stage: GRPO-SIF",
        "LoRA of rank 64",
        "45000 accepted, 17 refused",
        "source: viscot",
        "hash of its settings: abc123",
        "last step (2)",
        "| reward/total | 0.25 |",
        "base model: qwen-research",
        "Depth Anything V2 Large, CC-BY-NC-4.0: no commercial use",
        "this policy: not stated",
        "<image>QUESTION Please first output",
    ):
        assert told in card, told
    assert "bounding box with depth" not in card


def test_a_card_without_a_run_says_that_it_knows_nothing(tmp_path):
    write_card(tmp_path, base="", base_folder=tmp_path, run=None, adapter=False, licence="mit")
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    for told in ("base: unknown", "settings: unknown", "None are known here.", "base model: not stated in its folder"):
        assert told in card, told
