"""The command line's contract: one mechanism, four exit statuses, and nothing heavy before the work starts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from sif_ray import cli
from sif_ray.config import ConfigError, RewardConfig, load
from sif_ray.datagen.dataset import FORMAT

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "cluster")
HEAVY = "{'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}"
SCRIPTS = sorted({name.split()[0] for name in cli.JOBS | cli.TOOLS})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run has left in the checkout must not matter."""
    monkeypatch.chdir(tmp_path)


def stage_of(config: Path) -> str:
    """The job a shipped configuration is for: its name starts with the job's, real photographs are generated from, and
    the other published ones are GRPO's."""
    if config.stem.startswith("eval_"):
        return "evaluate"
    if config.parent.name == "published" and not config.stem.startswith("warmup"):
        return "grpo"
    return next((name for name in cli.JOBS if config.stem.startswith(name)), "generate")


def install_tool(monkeypatch: pytest.MonkeyPatch, name: str, run: object) -> None:
    """A tool that takes one argument, in the place of the real one."""
    module = types.ModuleType("tool_under_test")
    module.add_arguments = lambda parser: parser.add_argument("thing")  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cli.TOOLS[name].module, module)


def install_stage(monkeypatch: pytest.MonkeyPatch, name: str, run: object) -> None:
    module = types.ModuleType("stage_under_test")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, cli.JOBS[name].module, module)


# --- exit statuses ---------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> object:
    def run(config: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (lambda config: None, 0),
        (raising(RuntimeError("the work broke")), 1),
        (raising(ConfigError("data = 'nowhere': no such folder")), 2),
        (raising(KeyboardInterrupt()), 130),
        (lambda config: os.kill(os.getpid(), signal.SIGTERM), 130),
    ],
    ids=["done", "failed", "wrong request", "interrupted", "SIGTERM"],
)
@pytest.mark.parametrize("name", [*cli.JOBS, *cli.TOOLS])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, name: str, run: object, status: int) -> None:
    arguments = name.split()
    if name in cli.TOOLS:
        install_tool(monkeypatch, name, run)
        arguments.append("thing")
    else:
        install_stage(monkeypatch, name, run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(arguments) == status
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_tool_may_say_that_its_work_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    install_tool(monkeypatch, "data inspect", lambda options: seen.append(options) or 1)
    assert cli.main(["data", "inspect", "runs/data"]) == 1
    assert seen[0].thing == "runs/data"


def test_a_refusal_is_one_line_and_a_failure_is_told_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    install_stage(monkeypatch, "grpo", raising(ConfigError("data = 'nowhere': no such folder")))
    cli.main(["grpo"])
    assert capsys.readouterr().err.strip() == "sif-ray grpo: data = 'nowhere': no such folder"
    install_stage(monkeypatch, "grpo", raising(RuntimeError("the work broke")))
    cli.main(["grpo"])
    assert caplog.records[-1].exc_info is not None


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["data"],
        ["data", "nonsense"],
        ["data inspect", "runs/data"],
        ["data", "inspect"],
        ["data", "inspect", "runs/data", "--nonsense"],
        ["data", "inspect", "runs/data"],
        ["data", "export", "runs/data"],
        ["grpo", "--nonsense"],
        ["grpo", "no_such_key=1"],
        ["grpo", "group_size=many"],
        ["grpo", "--config", "no/such/file.yaml"],
        ["grpo", "--config"],
    ],
    ids=" ".join,
)
def test_a_wrong_request_is_status_2_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    install_stage(monkeypatch, "grpo", raising(AssertionError("the stage ran")))
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("content", ["group_size: [1, 2", "- a\n- list", "group_size: many", "x: 1", "caf\xe9"])
def test_a_broken_file_is_status_2(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content.encode("latin-1"))
    assert cli.main(["grpo", "--config", str(file), "--dry-run"]) == 2


# --- help, dry run, overrides ----------------------------------------------------------------------------------------


def test_help_lists_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, job in (cli.JOBS | cli.TOOLS).items():
        assert name in shown and job.summary in shown


def test_the_help_of_a_family_lists_its_members_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    jobs = capsys.readouterr().out.partition("jobs:\n")[2]
    assert [line.split()[0] for line in jobs.splitlines()] == ["convert", "inspect", "export", "import"]


@pytest.mark.parametrize("name", cli.TOOLS)
def test_tool_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "exit status" in shown
    for example in cli.TOOLS[name].examples:
        assert f"sif-ray {name} {example}" in shown
        cli.tool_parser(name).parse_args(example.split())


@pytest.mark.parametrize("name", cli.JOBS)
def test_job_help_has_examples_that_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--dry-run" in shown and "exit status" in shown
    config = str(ROOT / "configs" / f"{name}.yaml")
    assert cli.main([name, "--config", config, cli.JOBS[name].override, "--dry-run"]) == 0


def test_the_file_then_the_overrides_reach_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    install_stage(monkeypatch, "grpo", seen.append)
    file = tmp_path / "grpo.yaml"
    file.write_text("group_size: 4\nseed: 7\n")
    assert cli.main(["grpo", "seed=8", "--config", str(file), "sampling.temperature=0.5"]) == 0
    assert (seen[0].group_size, seen[0].seed, seen[0].sampling.temperature) == (4, 8, 0.5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_dry_runs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([stage_of(config), "--config", str(config), "--dry-run"]) == 0
    resolved, _, plan = capsys.readouterr().out.partition("\n\n")
    assert isinstance(yaml.safe_load(resolved), dict)
    assert plan.strip()


PUBLISHED = [path for path in CONFIGS if path.parent.name == "published" and stage_of(path) == "grpo"]
# machines, learner ranks, engines
PUBLISHED_LAYOUTS = {"as-released": (1, 2, 6), "split": (1, 4, 4), "colocated": (1, 8, 8), "two-nodes": (2, 8, 8)}


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_configuration_is_planned_without_data_checkpoint_or_gpu(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grpo", "--config", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    size = config.stem[:2]
    nodes, ranks, engines = PUBLISHED_LAYOUTS[config.stem[3:]]
    assert f"Placement ({nodes} x 8 GPUs, " in shown
    assert shown.count("learner ") >= ranks and f"learner {ranks - 1} (" in shown and f"learner {ranks} (" not in shown
    assert f"engine {engines - 1} (" in shown and f"engine {engines} (" not in shown
    assert ("learner 7 (1 CPU, 0.5 GPU) + engine 7 (1 CPU, 0.5 GPU)" in shown) == config.stem.endswith("colocated")
    assert f"shape: qwen2.5-vl-{size}, by the policy's name" in shown
    assert "of 80 GiB" in shown and "sequences of" in shown
    assert "data: data/sif" in shown and shown.count("is not found here") == 2
    assert "lora.rank = 64  (default 0)" in shown


def test_the_released_hyper_parameters_are_those_of_the_released_run() -> None:
    config = load("grpo", str(ROOT / "configs/published/7b-as-released.yaml"))
    assert config.profile == "published" and config.epochs == 1 and config.group_size == 8
    assert config.groups_per_step * config.group_size == 16  # completions a step
    learner, objective, sampling = config.learner, config.objective, config.sampling
    assert (learner.learning_rate, learner.lr_schedule, learner.weight_decay) == (1e-5, "linear", 0)
    assert (learner.lora.rank, learner.lora.alpha, learner.lora.dropout) == (64, 128, 0.05)
    assert learner.zero_stage == 3 and learner.gradient_checkpointing and learner.freeze_vision
    assert (objective.kl_beta, objective.clip_low, objective.clip_high) == (0.04, 0.2, 0.2)
    assert (objective.advantage_norm, objective.loss_mean, objective.updates_per_batch) == ("std", "sequence", 1)
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (1.0, 50, 2048)
    assert config.rewards == RewardConfig()  # the four terms at weight 1, no gate


def test_the_released_warm_up_is_that_of_the_released_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs/published/warmup_qwen2_5_vl_7b.yaml")
    config = load("warmup", path)
    learner = config.learner
    assert (learner.lora.rank, learner.lora.alpha, learner.lora.dropout, learner.freeze_vision) == (8, 16, 0.0, True)
    assert (learner.learning_rate, learner.lr_schedule, learner.warmup_share) == (1e-4, "cosine", 0.1)
    assert (config.epochs, config.batch_size, config.eval_share, config.eval_every) == (3, 128, 0.1, 100)
    assert (config.max_pixels, config.max_length, config.checkpoint_every) == (512 * 512, 2048, 200)
    manifest = {"format": FORMAT, "counts": {"splits": {"train": {"accepted": 50_000}}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["warmup", "--config", path, "--dry-run", f"data={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "about 1055 = 3 epochs of 45000 rows in batches of 128 (16 a rank)" in shown
    assert "8.29 B parameters + 21.4 M of LoRA, 21.4 M trained" in shown and "learner rank: " in shown


def test_a_plan_that_cannot_work_is_status_2_in_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/published/7b-split.yaml")
    assert cli.main(["grpo", "--config", config, "--dry-run", "num_engines=5"]) == 2
    assert "9 GPUs (4 learner ranks + 5 engines x 1)" in capsys.readouterr().err


LIGHT = [
    *([job, "--dry-run"] for job in ("grpo", "warmup", "generate")),
    *([*name.split(), "--help"] for name in cli.TOOLS),
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_dry_runs_and_help_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        f"import sys; from sif_ray.cli import main; status = main({arguments})\n"
        f"print(status, sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "0 []"


# --- the scripts are the command -------------------------------------------------------------------------------------


def test_there_is_a_script_for_every_job_and_no_other() -> None:
    assert sorted(path.stem for path in (ROOT / "jobs").glob("*.py")) == SCRIPTS


@pytest.mark.parametrize("name", [*cli.JOBS, *cli.TOOLS])
def test_the_script_runs_its_own_job(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    script_name, *arguments = name.split()
    spec = importlib.util.spec_from_file_location(f"job_{script_name}", ROOT / "jobs" / f"{script_name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    seen = []
    if name in cli.TOOLS:
        install_tool(monkeypatch, name, seen.append)
        arguments.append("thing")
    else:
        install_stage(monkeypatch, name, seen.append)
    assert script.main(arguments) == 0
    assert len(seen) == 1


@pytest.mark.parametrize("name", [*cli.JOBS, *cli.TOOLS])
def test_the_module_of_every_job_exists(name: str) -> None:
    assert importlib.util.find_spec((cli.JOBS | cli.TOOLS)[name].module) is not None


def test_console_command_and_script_say_the_same(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "sif-ray"
    arguments = ["group_size=4", "--dry-run"]
    by_command = subprocess.run([command, "grpo", *arguments], cwd=tmp_path, capture_output=True, text=True)
    by_script = subprocess.run(
        [sys.executable, ROOT / "jobs/grpo.py", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert by_command.returncode == by_script.returncode == 0, by_command.stderr + by_script.stderr
    assert by_command.stdout == by_script.stdout
