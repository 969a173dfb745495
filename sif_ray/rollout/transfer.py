"""The vLLM side of a weight update: a weight transfer backend of our own and the worker extension that reports on it.

Importing this module registers the backend; vLLM imports it in every worker, because `WorkerExtension` is the engine's
`worker_extension_cls`. The order of an update is

    verify (nothing changed, generation goes on) -> pause -> start -> update -> finish -> receipt -> resume

so that a damaged update is refused while the old weights are still in place. vLLM by itself only logs a warning for a
layer that received nothing; here coverage is checked by name before loading and again on what was loaded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.utils.nccl import unpinned_nccl_env

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.orphans import end_with_owner
from sif_ray.rollout.staging import Manifest, open_staged
from sif_ray.rollout.weights import check_coverage, read_tensors, specs_from_rows, update_checksum
from sif_ray.rollout.wire import receive_buckets

BACKEND = "verified"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"


def policy_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a checkpoint's Hugging Face model by name, without reading a weight."""
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = transformers.AutoModelForImageTextToText.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


@dataclass
class VerifiedInit(WeightTransferInitInfo):
    """Nothing to agree on: the worker knows its model."""


@dataclass
class VerifiedUpdate(WeightTransferUpdateInfo):
    version: int  # of the update that `verify` has accepted


@dataclass(frozen=True)
class _Verified:
    version: int
    checksum: int
    num_bytes: int
    tensors: list[tuple[str, torch.Tensor]]


class VerifiedTransfer(WeightTransferEngine[VerifiedInit, VerifiedUpdate]):
    """Loads updates that were staged in a file by the engine's actor, or that the learner sends to the workers."""

    init_info_cls = VerifiedInit
    update_info_cls = VerifiedUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: VerifiedInit) -> None:
        self._expected = policy_shapes(self.model_config.model)
        self._verified: _Verified | None = None
        self._images = _count_images(self.model)
        if self.device.type == "cpu":
            _pack_no_input_embedding(self.model)

    def verify(self, manifest: Manifest) -> None:
        """Check every tensor of an update against its spec and the policy, and keep the bytes for loading.

        Raises `WeightSyncError`; the model has not been touched then.
        """
        self._verified = None
        if "path" in manifest:
            specs, buckets = open_staged(manifest)
        else:
            specs = specs_from_rows(manifest["tensors"])
            with unpinned_nccl_env():  # else NCCL would differ from the learner's here, and both would hang
                buckets = receive_buckets(manifest, self.parallel_config.rank, self.parallel_config.world_size)
        check_coverage(specs, self._expected)
        tensors = list(read_tensors(specs, buckets))
        num_bytes = sum(spec.num_bytes for spec in specs)
        self._verified = _Verified(manifest["version"], update_checksum(specs), num_bytes, tensors)

    def start_weight_update(self) -> None:
        if self._verified is None:
            raise WeightSyncError("a weight update starts without verified tensors; call verify_weights first")
        if self.device.type == "cpu":
            for module in self.model.modules():
                _drop_packed(module)  # or the old copy would lie beside the new one
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class asks an accelerator that a CPU engine does not have
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: VerifiedUpdate) -> None:
        verified = self._verified
        if verified is None or verified.version != update_info.version:
            raise WeightSyncError(f"version {update_info.version} is not the one that was verified")
        wanted = {name for name, _ in self.model.named_parameters()}
        loaded = self.model.load_weights(iter(verified.tensors))
        for name in sorted(wanted - set(loaded)):
            raise WeightSyncError(f"{name}: vLLM's parameter received no weights from the update")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def receipt(self) -> tuple[int, int, int, int, int]:
        """(version, tensors, bytes, checksum) of the update just loaded, whose bytes are let go, and the images that
        were encoded since the one before."""
        verified, self._verified = self._verified, None
        if verified is None:
            raise WeightSyncError("no weight update was loaded")
        images, self._images.total = self._images.total, 0
        return verified.version, len(verified.tensors), verified.num_bytes, verified.checksum, images

    def shutdown(self) -> None:
        self._verified = None


@dataclass
class _Images:
    """Images that the vision tower has encoded."""

    total: int = 0


def _count_images(model: Any) -> _Images:
    """Count what the model encodes from now on."""
    images, encode = _Images(), model.embed_multimodal

    def counted(**inputs: Any) -> Any:
        encoded = encode(**inputs)
        images.total += len(encoded)  # one embedding per image
        return encoded

    model.embed_multimodal = counted
    return images


def _pack_no_input_embedding(model: torch.nn.Module) -> None:
    """Keep vLLM from packing the input embedding for products that nobody computes: on a CPU a copy of its size."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading = lambda layer: None
            _drop_packed(module)


def _drop_packed(module: torch.nn.Module) -> None:
    """Forget the copy of a layer's weights that vLLM packs for products on a CPU when it has loaded them."""
    vars(module).pop("cpu_linear", None)


class WorkerExtension:
    """Methods that vLLM adds to its worker class, called through `collective_rpc`."""

    weight_transfer_engine: VerifiedTransfer

    def verify_weights(self, manifest: Manifest) -> str:
        """Why an update is refused, "" when it is not: a refusal is an answer, not a worker's failure."""
        try:
            self.weight_transfer_engine.verify(manifest)
        except WeightSyncError as error:
            return str(error)
        return ""

    def weight_receipt(self) -> tuple[int, int, int, int, int]:
        """See `VerifiedTransfer.receipt`."""
        return self.weight_transfer_engine.receipt()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, VerifiedTransfer)
end_with_owner()
# Rotary layers have no weights and are reported as "failed to load" on every update; coverage is checked above.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
