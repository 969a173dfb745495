"""The structure of Qwen2.5-VL-7B, with random weights and the real Qwen2.5 tokenizer and chat template, goes through
every stage on a CPU, by the jobs that a user calls: data, warm-up, GRPO, export, serving.

Seven billion weights in float32 do not fit here, so the policy has 2 of 28 and 2 of 32 blocks, and every width is a
quarter (7 heads of 128 over 1 of keys); the vocabulary of 152,064 is whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from sif_ray.config import EngineConfig, PromptConfig, ServeConfig
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.random_policy import scaled_down, with_layers, write_random_policy
from sif_ray.resources.shapes import KNOWN
from sif_ray.serve.client import ask
from sif_ray.serve.stage import serving
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

ROOT = Path(__file__).parents[1]
SHAPE = with_layers(scaled_down(KNOWN["qwen2.5-vl-7b"], 4), 2)
ENGINE = {"max_model_len": 640, "max_num_seqs": 8, "kv_cache_gib": 0.25, "threads": 2}
MAX_MEMORY_GB = 14


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_structure_goes_through_every_stage(tmp_path):
    base, warm, grpo = tmp_path / "base", tmp_path / "warmup", tmp_path / "grpo"
    write_random_policy(SHAPE, base)
    assert len(AutoTokenizer.from_pretrained(base)) == 151_665
    engine = [f"engine.{key}={value}" for key, value in ENGINE.items()]
    lora = ("learner.lora.rank=8", "learner.gradient_checkpointing=true", "learner.threads=2")
    with Peak() as peak:
        job("generate", f"output={tmp_path / 'data'}", "splits.train=8", "questions_per_scene=1", "subset_rows=0")
        job(
            *("warmup", f"data={tmp_path / 'data'}", f"policy={base}", f"output={warm}", "epochs=1", "batch_size=4"),
            *(*lora, "learner.micro_batch_tokens=1024"),
        )
        job(
            *("grpo", f"data={tmp_path / 'data'}", f"policy={warm / 'checkpoint'}", f"output={grpo}", "max_steps=2"),
            *("groups_per_step=2", "group_size=4", "sampling.max_tokens=24", *engine, *lora),
            *("learner.micro_batch_tokens=1024", "checkpoint_every=1", "ray.object_store_mib=2600"),
        )
        steps = sorted((grpo / "checkpoints").iterdir())
        job("export", str(steps[-1]), "--output", str(tmp_path / "exported"), "--shard-gb", "0.5")
        photo = png(render(make_scene(7)).rgb)
        config = ServeConfig(policy=str(tmp_path / "exported"), port=0, max_tokens=16, engine=EngineConfig(**ENGINE))
        with serving(config) as base_url:
            reply = ask(base_url, photo, "How many balls are there?")
    print(f"peak memory of all processes: {peak.gigabytes:.1f} GB")
    assert peak.gigabytes < MAX_MEMORY_GB
    assert [line["step"] for line in lines(warm / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines(grpo / "metrics.jsonl")] == [1, 2]
    assert json.loads((grpo / "finished.json").read_text())["version"] == 2
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 2
    trained, exported = (
        AutoModelForImageTextToText.from_pretrained(f) for f in (grpo / "checkpoint", tmp_path / "exported")
    )
    start = dict(AutoModelForImageTextToText.from_pretrained(base).named_parameters())
    for (name, value), other in zip(exported.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=0, msg=name)
        changed = not torch.equal(value, start[name])
        assert changed == (value.ndim == 2 and "visual" not in name and "embed_tokens" not in name), name
    assert reply.text == greedy_text(exported, tmp_path / "exported", photo, reply.depth_image)


def greedy_text(policy, folder: Path, photo: bytes, depth_image: str) -> str:
    """What transformers generates for the request that was served."""
    import base64

    processor = PolicyProcessor(str(folder))
    encoded = processor.encode_prompt(
        "How many balls are there?", (photo, base64.b64decode(depth_image)), PromptConfig()
    )
    prompt = torch.tensor([encoded.token_ids_P])
    with torch.no_grad():
        tokens = policy.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=(prompt == processor.image_token_id).int(),
            pixel_values=torch.from_numpy(encoded.pixel_values),
            image_grid_thw=torch.tensor(encoded.image_grid_thw),
            max_new_tokens=16,
            do_sample=False,
        )
    return processor.decode(tokens[0, prompt.shape[1] :].tolist())


def job(name: str, *arguments: str) -> None:
    command = [sys.executable, f"jobs/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Peak:
    """The most memory (proportional set size: what is shared counts once) that this process and its children took."""

    def __enter__(self) -> Peak:
        self.gigabytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.gigabytes = max(self.gigabytes, sum(map(memory, processes)) / 1e9)


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0
