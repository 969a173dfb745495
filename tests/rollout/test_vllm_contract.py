"""What sif_ray relies on in vLLM, name by name: a new vLLM version fails here first, and says where to look.

No engine runs here. That tokens carry the version that wrote them across `pause_generation(mode="keep")` is proved
with a real one in `test_rollout_engine.py`, that nothing stale is used after an update in `test_fresh_engine.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.nccl import unpinned_nccl_env
from vllm.utils.network_utils import get_ip
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import PauseMode
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.worker.gpu_worker import Worker

from sif_ray.rollout.scheduler import SCHEDULER, ImageKeepingScheduler
from sif_ray.rollout.transfer import BACKEND, WORKER_EXTENSION, VerifiedTransfer, WorkerExtension
from sif_ray.rollout.vllm_client import FORBIDDEN_LOGIT_BIAS

CALLS: list[tuple[Callable[..., Any], str]] = [
    (AsyncLLM.from_engine_args, "engine_args stat_loggers"),
    (AsyncLLM.generate, "prompt sampling_params request_id lora_request priority"),
    (AsyncLLM.collective_rpc, "method args"),
    (AsyncLLM.pause_generation, "mode clear_cache"),
    (AsyncLLM.resume_generation, ""),
    (AsyncLLM.init_weight_transfer_engine, "request"),
    (AsyncLLM.update_weight_version, "new_version"),
    (AsyncLLM.start_weight_update, ""),
    (AsyncLLM.update_weights, "request"),
    (AsyncLLM.finish_weight_update, "weight_version"),
    (AsyncLLM.compute_weight_checksums, ""),
    (AsyncLLM.shutdown, "timeout"),
    (OutputProcessor.propagate_error, "e"),
    (Scheduler.schedule, ""),
    (StatLoggerBase.record, "scheduler_stats iteration_stats"),
    (StatLoggerBase.log_engine_initialized, ""),
    (initialize_layerwise_reload, "model"),
    (finalize_layerwise_reload, ""),  # wrapped: takes anything, the model and its configuration
    (unpinned_nccl_env, ""),
    (get_ip, ""),
    (WeightTransferEngineFactory.register_engine, "name module_path_or_cls"),
    (base.WeightTransferEngine.__init__, "config vllm_config device model"),
    (base.WeightTransferEngine.parse_update_info, "update_dict"),
    (Worker.init_weight_transfer_engine, "init_info"),
    (Worker.start_weight_update, ""),
    (Worker.update_weights, "update_info"),
    (Worker.finish_weight_update, ""),
]


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[_name(function) for function, _ in CALLS])
def test_a_call_takes_the_arguments_it_is_given(function: Callable[..., Any], arguments: str) -> None:
    """It takes ours and demands no other."""
    parameters = dict(inspect.signature(function).parameters)
    ours = arguments.split()
    assert not set(ours) - set(parameters), f"vLLM's {_name(function)} takes {list(parameters)} now"
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    demanded = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variadic and name != "self"
    ]
    assert not set(demanded) - set(ours), f"vLLM's {_name(function)} demands {demanded} now"


ENGINE_ARGUMENTS = """model dtype seed max_model_len max_num_seqs tensor_parallel_size gpu_memory_utilization
    distributed_executor_backend scheduling_policy enforce_eager enable_prefix_caching limit_mm_per_prompt
    mm_processor_cache_gb skip_mm_profiling generation_config logprobs_mode weight_transfer_config worker_extension_cls
    disable_log_stats kv_cache_memory_bytes block_size scheduler_cls enable_chunked_prefill max_num_batched_tokens
    mm_processor_kwargs"""
SAMPLING = """n temperature top_p top_k max_tokens seed logprobs flat_logprobs stop_token_ids logit_bias detokenize
    output_kind"""


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (AsyncEngineArgs, ENGINE_ARGUMENTS),
        (SamplingParams, SAMPLING),
        (TokensPrompt, "prompt_token_ids multi_modal_data multi_modal_uuids"),
        (RequestOutput, "finished outputs prompt_token_ids"),
        (CompletionOutput, "token_ids logprobs finish_reason weight_versions"),
        (WeightVersionSpan, "version start end"),
        (FlatLogprobs, "logprobs"),
        (WeightTransferConfig, "backend"),
        (base.WeightTransferInitRequest, "init_info"),
        (base.WeightTransferUpdateRequest, "update_info"),
        (SchedulerOutput, "scheduled_new_reqs"),
        (NewRequestData, "req_id mm_features"),
        (MultiModalFeatureSpec, "identifier data"),
    ],
)
def test_a_record_has_the_fields_that_are_read_or_written(kind: type[Any], names: str) -> None:
    missing = set(names.split()) - set(_fields(kind))
    assert not missing, f"vLLM's {kind.__name__} has no {missing} any more"


def _fields(kind: type[Any]) -> Iterable[str]:
    if is_dataclass(kind):
        return [item.name for item in fields(kind)]
    if hasattr(kind, "__required_keys__"):  # a TypedDict
        return get_type_hints(kind)
    return inspect.signature(kind).parameters


def test_the_weight_transfer_interface_is_the_one_that_is_implemented() -> None:
    abstract = base.WeightTransferEngine.__abstractmethods__
    assert abstract == {
        "init_transfer_engine",
        "start_weight_update",
        "receive_weights",
        "finish_weight_update",
        "shutdown",
    }, "the backend must implement what vLLM demands"
    assert not VerifiedTransfer.__abstractmethods__
    assert WeightTransferEngineFactory._registry[BACKEND]
    config = SimpleNamespace(parallel_config=None, model_config="model config")
    engine = VerifiedTransfer(WeightTransferConfig(backend=BACKEND), config, torch.device("cpu"), torch.nn.Linear(1, 1))
    assert (engine.device.type, engine.model_config, type(engine.model)) == ("cpu", "model config", torch.nn.Linear)
    assert engine.parse_update_info({"version": 3}).version == 3


def test_our_classes_are_found_by_the_names_that_vllm_is_given() -> None:
    for name, kind in ((WORKER_EXTENSION, WorkerExtension), (SCHEDULER, ImageKeepingScheduler)):
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute) is kind
    clashes = {name for name in vars(WorkerExtension) if not name.startswith("_") and hasattr(Worker, name)}
    assert not clashes, f"vLLM's worker has its own {clashes} now"


def test_a_pause_that_keeps_requests_exists_and_clears_every_cache() -> None:
    assert "keep" in get_args(PauseMode)
    cleared: dict[str, Any] = {}

    def reset_prefix_cache(**options: Any) -> bool:
        cleared["prefix"] = options["reset_running_requests"]
        return True

    core = SimpleNamespace(
        model_executor=SimpleNamespace(collective_rpc=lambda method: None),
        reset_prefix_cache=reset_prefix_cache,
        reset_mm_cache=lambda: cleared.setdefault("images", True),
        reset_encoder_cache=lambda: cleared.setdefault("encoder", True),
    )
    core._reset_caches = lambda: EngineCore._reset_caches(core)  # type: ignore[arg-type]
    EngineCore._finish_pause(core, clear_cache=True)  # type: ignore[arg-type]
    assert cleared == {"prefix": True, "images": True, "encoder": True}, "a pause leaves something stale now"


def test_outputs_are_stamped_with_the_version_that_is_set() -> None:
    core = SimpleNamespace()
    EngineCore.set_weight_version(core, "7")  # type: ignore[arg-type]
    outputs = {0: SimpleNamespace(weight_version=None)}
    EngineCore._attach_weight_version(core, outputs)  # type: ignore[arg-type]
    assert outputs[0].weight_version == "7"


def test_sampling_takes_what_it_is_given() -> None:
    params = SamplingParams(
        n=4,
        seed=2**31 - 1,
        logprobs=0,
        flat_logprobs=True,
        stop_token_ids=[2],
        logit_bias={5: FORBIDDEN_LOGIT_BIAS},
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    assert params.logit_bias == {5: FORBIDDEN_LOGIT_BIAS}
    with pytest.raises(VLLMValidationError):
        SamplingParams(temperature=-1.0)


def test_errors_and_statistics_are_what_they_were() -> None:
    assert issubclass(EngineDeadError, Exception)
    assert EngineDeadError()  # made without arguments
    assert callable(current_platform.is_cpu)
    stats = IterationStats()
    assert (stats.prompt_token_stats.total, stats.prompt_token_stats.computed) == (0, 0)


def test_the_engine_core_processes_are_where_they_are_looked_for() -> None:
    from vllm.v1.engine.core_client import BackgroundResources
    from vllm.v1.engine.utils import CoreEngineProcManager

    assert "engine_manager" in _fields(BackgroundResources)
    assert "self.processes" in inspect.getsource(CoreEngineProcManager.__init__)
