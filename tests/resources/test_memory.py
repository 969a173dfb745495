"""Estimates against what DeepSpeed holds, what autograd keeps and what torch allocates, for small real models."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from resource_models import hf_config
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen2_5_VLForConditionalGeneration

from sif_ray.config import EngineConfig, LearnerConfig, LoraConfig
from sif_ray.learner import process_group
from sif_ray.policy import branches
from sif_ray.policy.adapter import add_adapter
from sif_ray.policy.model import freeze_vision
from sif_ray.resources import memory
from sif_ray.resources.memory import GIB, engine_memory, learner_memory
from sif_ray.resources.shapes import KNOWN, PolicyShape

SMALL = PolicyShape(128, 3, 4, 2, 192, 320, False, 48, 2, 3, 80)


def model_of(shape: PolicyShape, dtype: str = "float32") -> Qwen2_5_VLForConditionalGeneration:
    config = hf_config(shape)
    config.text_config.rope_parameters |= {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 1e4}
    return Qwen2_5_VLForConditionalGeneration._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).train()


# --- states of the training ------------------------------------------------------------------------------------------

CASES = [
    *(LearnerConfig(num_ranks=2, zero_stage=stage) for stage in (0, 2)),
    *(LearnerConfig(num_ranks=2, zero_stage=stage, dtype="bfloat16") for stage in (0, 1, 2, 3)),
    LearnerConfig(num_ranks=2, zero_stage=3, dtype="bfloat16", freeze_vision=True),
    LearnerConfig(num_ranks=2, zero_stage=2, dtype="bfloat16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}),
    LearnerConfig(num_ranks=2, zero_stage=2, dtype="bfloat16", lora=LoraConfig(rank=8)),
]


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure_states(rank: int, port: int, output: str) -> None:
    """What DeepSpeed holds while it accumulates gradients, for every case, with two ranks."""
    from sif_ray.learner.engine import _choose_trained, _optimizer, deepspeed_config

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    process_group.join(rank, 2, store)
    deepspeed = process_group.load_deepspeed()
    found, kept = [], []  # what is kept is the same before and after
    for case in CASES:
        before = live_bytes()
        model = model_of(SMALL, case.dtype)
        _choose_trained(model, case)
        config = deepspeed_config(case)
        # Buffers are counted apart, and every weight is divided, however small.
        config["zero_optimization"] |= {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model, case), config=config)
        for last in (False, True, False):
            engine.set_gradient_accumulation_boundary(last)
            loss = engine(
                input_ids=torch.tensor([[5] * 4 + list(range(6, 300))]),
                position_ids=torch.arange(298).expand(3, 1, 298),
                pixel_values=torch.ones(16, 3 * 2 * 14 * 14, dtype=getattr(torch, case.dtype)),
                image_grid_thw=torch.tensor([[1, 4, 4]]),
                use_cache=False,
            ).logits.sum()
            engine.backward(loss, scale_wrt_gas=False)
            del loss
            if last:
                engine.step()
        found.append(live_bytes() - before)
        kept.append(engine)
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[int]:
    output = tmp_path_factory.mktemp("states") / "bytes.json"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    processes.spawn(measure_states, (port, str(output)), nprocs=2)
    return json.loads(output.read_text())


def name_of(case: LearnerConfig) -> str:
    extra = " lora" * bool(case.lora.rank) + " frozen vision" * case.freeze_vision + " fp32 sums" * bool(case.deepspeed)
    return f"zero {case.zero_stage} {case.dtype}{extra}"


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_of_the_zero_paper(stage, gigabytes):
    """Figure 1 of arXiv 1910.02054: 7.5 B parameters on 64 ranks, 16 bytes a parameter in all."""
    config, parameters = LearnerConfig(num_ranks=64, zero_stage=stage, dtype="bfloat16"), 7_500_000_000
    states = (memory.weight_bytes, memory.gradient_bytes, memory.optimiser_bytes)
    assert sum(part(parameters, config) for part in states) / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_weights_gradients_and_optimiser_are_what_deepspeed_holds(measured, index):
    estimate = learner_memory(SMALL, CASES[index], holds_reference=False)
    held = estimate.weights + estimate.gradients + estimate.optimiser
    assert measured[index] == pytest.approx(held, rel=0.02)


def test_adapters_are_as_many_as_peft_adds():
    for targets in ("language", "all"):
        for tied in (False, True):
            shape = PolicyShape(128, 3, 4, 2, 192, 320, tied, 48, 2, 3, 80)
            config = LearnerConfig(lora=LoraConfig(rank=8, targets=targets))
            model = model_of(shape)
            add_adapter(model, config.lora)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            assert memory.trained_parameters(shape, config) == trained


def test_a_reference_is_one_more_policy_unless_adapters_can_be_switched_off():
    full, lora = LearnerConfig(num_ranks=4, zero_stage=3), LearnerConfig(lora=LoraConfig(rank=8))
    assert learner_memory(SMALL, full, holds_reference=True).reference == 4 * SMALL.num_parameters // 4
    assert learner_memory(SMALL, lora, holds_reference=True).reference == 0


def test_offloaded_states_move_to_the_machine():
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    config = LearnerConfig(num_ranks=4, zero_stage=3, dtype="bfloat16")
    here = learner_memory(SMALL, config, holds_reference=False)
    config.deepspeed = {"zero_optimization": zero}
    there = learner_memory(SMALL, config, holds_reference=False)
    assert (there.weights, there.optimiser, there.host) == (0, 0, here.weights + here.optimiser)


# --- what passes keep ------------------------------------------------------------------------------------------------


def kept_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of the language model, weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(
            input_ids=torch.arange(6, 6 + tokens)[None],
            attention_mask=mask,
            position_ids=torch.arange(tokens).expand(3, 1, tokens),
            use_cache=False,
        )
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_keeps_what_autograd_keeps_of_it(dtype, checkpointing):
    """The difference of two depths is that of two blocks to the byte."""
    config = LearnerConfig(
        dtype=dtype, micro_batch_tokens=128, freeze_vision=True, gradient_checkpointing=checkpointing
    )
    kept, estimated = [], []
    for layers in (2, 4):
        shape = PolicyShape(128, layers, 4, 2, 192, 320, False, 48, 2, 3, 80)
        model = model_of(shape, dtype)
        freeze_vision(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept.append(kept_bytes(model, 128))
        estimated.append(memory.activation_bytes(shape, config))
    assert kept[1] - kept[0] == estimated[1] - estimated[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vision_block_keeps_what_autograd_keeps_of_it(dtype):
    config = LearnerConfig(dtype=dtype, micro_batch_tokens=32)
    kept, estimated = [], []
    for layers in (2, 4):
        shape = PolicyShape(128, 1, 4, 2, 192, 320, False, 96, layers, 3, 80)
        model = model_of(shape, dtype).model.visual
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found = {}

        def keep(tensor: torch.Tensor, found: dict[int, torch.Tensor] = found) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        patches = torch.ones(128, 3 * 2 * 14 * 14, dtype=getattr(torch, dtype))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(patches, grid_thw=torch.tensor([[1, 8, 8]] * 2))
        kept.append(sum(t.untyped_storage().nbytes() for pointer, t in found.items() if pointer not in own))
        estimated.append(memory.activation_bytes(shape, config))
    assert kept[1] - kept[0] == estimated[1] - estimated[0]


class Head(torch.nn.Module):
    """The output layer behind hidden states that are there already."""

    config = SimpleNamespace(image_token_id=3)

    def __init__(self, states: torch.Tensor, vocabulary: int, checkpointing: bool) -> None:
        super().__init__()
        self.states = torch.nn.Parameter(states)
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, states.shape[-1], dtype=states.dtype))
        self.is_gradient_checkpointing = checkpointing

    def lm_head(self, states: torch.Tensor) -> torch.Tensor:  # no module: the tracker follows a module once only
        return states @ self.weight.T

    def model(self, **inputs) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.states[None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_take_what_torch_allocates_at_the_peak(dtype, checkpointing):
    tokens, vocabulary = 512, 20_000
    policy = Head(torch.randn(tokens, 16, dtype=getattr(torch, dtype)), vocabulary, checkpointing)
    every = torch.arange(tokens)
    batch = branches.BranchedBatch(every[None], every, every, every, every, every, every, every, 1)
    tracker = MemTracker()
    tracker.track_external(policy)
    with tracker:
        logprobs, _ = branches.branch_logprobs(policy, batch, 0.9)
        logprobs.sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    held = sum(parameter.nbytes for parameter in policy.parameters())
    shape = PolicyShape(16, 1, 1, 1, 16, vocabulary, False, 48, 2, 3, 80)
    config = LearnerConfig(dtype=dtype, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
    assert memory.HEAD_CHUNKS == branches.HEAD_CHUNKS
    assert peak - 2 * held == pytest.approx(memory.logit_bytes(shape, config), rel=0.02)


# --- engine ----------------------------------------------------------------------------------------------------------


def test_an_engine_keeps_what_weights_and_work_leave():
    """By hand for Qwen2.5-VL-7B: 56 KiB of keys and values a token, 16.6 GB of weights."""
    config = EngineConfig(max_model_len=4096, max_num_seqs=64, gpu_memory_utilization=0.9)
    found = engine_memory(KNOWN["qwen2.5-vl-7b"], config, 80 * GIB)
    assert found.weights == 2 * 8_292_166_656
    assert found.sequences == found.kv_cache // (56 * 1024 * 4096)
    assert found.total == pytest.approx(0.9 * 80 * GIB)


@pytest.mark.parametrize(("ranks", "kib"), [(1, 36), (2, 18), (4, 18)])
def test_key_value_heads_are_divided_as_far_as_they_go(ranks, kib):
    """Qwen2.5-VL-3B has two: 2 x 36 layers x 2 heads x 128 x 2 bytes = 36 KiB a token, half on two GPUs or four."""
    config = EngineConfig(tensor_parallel_size=ranks)
    found = engine_memory(KNOWN["qwen2.5-vl-3b"], config, 80 * GIB)
    assert found.sequences == found.kv_cache // (kib * 1024 * config.max_model_len)


def test_an_engine_without_room_holds_no_sequence():
    assert engine_memory(KNOWN["qwen2.5-vl-72b"], EngineConfig(), 80 * GIB).sequences == 0
