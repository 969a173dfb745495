"""lmms-eval asks a served policy: its own POPE task, on rendered scenes.

It wants an environment of its own: `python -m venv lmms && lmms/bin/pip install lmms-eval`, then
`LMMS_EVAL_PYTHON=lmms/bin/python pytest -m slow tests/serve/test_lmms_eval.py -s`. SIF_RAY_POLICY names a checkpoint,
the untrained toy policy by default, which answers nothing right.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sif_ray.config import EngineConfig, ServeConfig
from sif_ray.serve.stage import serving
from sif_ray.toyworld import benchmarks

LMMS_PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
MAX_TOKENS = 200
ASKED = "\nAnswer the question using a single word or phrase."  # what lmms-eval's task adds


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not LMMS_PYTHON, reason="LMMS_EVAL_PYTHON names no interpreter that has lmms-eval")
@pytest.mark.parametrize("model", ["sif", "sif-plain"])
def test_lmms_eval_scores_what_the_api_answers(tmp_path, model, ray_local):
    rows = pope(tmp_path)
    config = ServeConfig(
        policy=os.environ.get("SIF_RAY_POLICY", "toy"),
        depth_model="toy",
        port=0,
        max_tokens=MAX_TOKENS,
        engine=EngineConfig(max_model_len=512, max_num_seqs=8, kv_cache_gib=0.25),
    )
    with serving(config) as base_url:
        score, said = run_lmms_eval(tmp_path, f"{base_url}/v1", model)
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none")
        expected = [answer(client, model, row) for row in rows]
    assert said == expected
    right = sum(text.lower().strip() == row["answer"] for text, row in zip(expected, rows, strict=True))
    print(f"{model}: {right} of {len(rows)} right; lmms-eval says {score}")
    assert score == pytest.approx(right / len(rows))


def pope(folder: Path) -> list[dict]:
    """The toy variant in the columns of the data set that lmms-eval's task reads, as a Parquet file beside its task."""
    annotations, images = benchmarks.write("pope", folder, num_scenes=8)
    rows = []
    for line in annotations.read_text().splitlines():
        row = json.loads(line)
        image = {"bytes": (images / row["image"]).read_bytes(), "path": row["image"]}
        rows.append(
            {"question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"], "image": image}
        )
    text = {"dtype": "string", "_type": "Value"}
    features = {"question_id": text, "question": text, "answer": text, "image": {"_type": "Image"}}
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "test.parquet")
    return rows


def run_lmms_eval(folder: Path, base_url: str, model: str) -> tuple[float, list[str]]:
    """Its accuracy, and the text it got for every item, before its own filters."""
    installed = subprocess.run(
        [LMMS_PYTHON, "-c", "import lmms_eval; print(lmms_eval.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "toy_pope.yaml").write_text(
        f"include: {installed.stdout.strip()}/tasks/pope/pope.yaml\n"
        "task: toy_pope\n"
        "dataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'test.parquet'}}}}}\n"
    )
    command = [
        *(LMMS_PYTHON, "-m", "lmms_eval", "--model", "openai", "--include_path", str(tasks), "--tasks", "toy_pope"),
        *("--model_args", f"model={model},base_url={base_url},api_key=none,timeout=120,num_concurrent=4,max_retries=1"),
        *("--gen_kwargs", f"max_new_tokens={MAX_TOKENS}", "--log_samples", "--output_path", str(folder / "lmms")),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [results] = (folder / "lmms").rglob("*results.json")
    [samples] = (folder / "lmms").rglob("*samples*.jsonl")
    answered = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    scores = json.loads(results.read_text())["results"]["toy_pope"]
    said = [row.get("resps", row["filtered_resps"]) for row in answered]  # one of them where both are equal
    return scores["pope_accuracy,none"], said


def answer(client: openai.OpenAI, model: str, row: dict) -> str:
    url = "data:image/png;base64," + base64.b64encode(row["image"]["bytes"]).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": row["question"] + ASKED},
    ]
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=MAX_TOKENS, temperature=0
    )
    return reply.choices[0].message.content
