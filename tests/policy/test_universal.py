"""An optimiser that DeepSpeed left with one counter of steps for all groups counts as before."""

from __future__ import annotations

import torch

from sif_ray.policy.universal import mend_optimizer


def test_every_group_of_weights_counts_its_own_steps_and_has_its_own_decay():
    def made() -> tuple[torch.optim.AdamW, list[torch.nn.Parameter]]:
        weights = [torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(2)]
        groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(weights, (0.5, 0.0), strict=True)]
        return torch.optim.AdamW(groups, lr=0.1), weights

    def steps(optimizer, weights, count):
        for number in range(count):
            for weight in weights:
                weight.grad = torch.tensor([1.0, -0.5 - number])
            optimizer.step()

    expected, kept = made()
    steps(expected, kept, 2)
    loaded, weights = made()
    steps(loaded, weights, 2)
    shared = loaded.state[weights[0]]["step"]
    for weight, group in zip(weights, loaded.param_groups, strict=True):
        loaded.state[weight]["step"] = shared
        group["weight_decay"] = 0.5
    mend_optimizer(loaded, [0.5, 0.0])
    steps(expected, kept, 1)
    steps(loaded, weights, 1)
    assert [weight.tolist() for weight in weights] == [weight.tolist() for weight in kept]
