"""How many GPUs a GRPO run should have, and how fast it would be: the loop simulated on a virtual clock.

    configuration, GPU type ─► rates ──┐
    a finished run's folder ─► measured┴─► scenario ─► simulation (the real ledger) ─► outcome ─► report
                                              ▲                                           │
                                              └──────────────── search ◄──────────────────┘

Not to be confused with `sif_ray.resources.plan`, the dry run's check that one configuration fits its machines: its
estimates of memory are used here.
"""
