"""`sif-ray export`: a trained policy as others load it. Its arguments; the work is `sif_ray.policy.exporter`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from sif_ray.config import ConfigError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    parser.add_argument("checkpoint", help="policy folder, training checkpoint, or adapter folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to be written; must not exist yet")
    parser.add_argument("--base", default="", help="policy that the training began with, where it is not known here")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="write the adapter alone")
    form.add_argument(
        "--universal", action="store_true", help="write optimiser states too, for another number of ranks"
    )
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"), help="default: that of the base")
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="largest file of weights, in 10^9 bytes (default 4)"
    )
    parser.add_argument("--run", default="", metavar="FOLDER", help="run folder that the model card tells about")
    parser.add_argument("--license", default="", help="licence of the result, for its model card")


def run(options: argparse.Namespace) -> None:
    """Export as `options` say. Raises `ConfigError` for a request that cannot work, before anything is written."""
    output = Path(options.output)
    if output.exists():
        raise ConfigError(f"--output {output}: exists; name a folder that does not, or remove it")
    if options.shard_gb <= 0:
        raise ConfigError(f"--shard-gb {options.shard_gb:g}: must be positive")
    from sif_ray.policy import exporter  # takes seconds to import

    if options.universal:
        exporter.write_universal(Path(options.checkpoint), output)
    else:
        policy = exporter.open_trained(options.checkpoint, options.base, options.run)
        if options.adapter:
            exporter.write_adapter(policy, output, options.license)
        else:
            shard_bytes = int(options.shard_gb * 1e9)
            exporter.write_merged(policy, output, options.license, dtype=options.dtype, shard_bytes=shard_bytes)
    log.info("exported to %s", output)
