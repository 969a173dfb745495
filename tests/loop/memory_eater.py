"""A program: an actor is ended by Ray's memory monitor, on a cluster of its own whose limit is near. Prints what its
caller is told."""

from __future__ import annotations

import asyncio
import tempfile

import psutil
import ray

from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.workers import Remote

GIB = 2**30


@ray.remote
class Eater:
    async def eat(self, size: int) -> None:
        self.eaten = bytearray(size)
        self.eaten[::4096] = b"x" * len(self.eaten[::4096])
        await asyncio.sleep(60)


async def main() -> None:
    memory = psutil.virtual_memory()
    limit = {"memory_usage_threshold": (memory.used + 2 * GIB) / memory.total, "memory_monitor_refresh_ms": 100}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=1,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _system_config=limit,
        )
        try:
            await Remote(Eater.remote()).eat(3 * GIB)
        except WorkerDiedError as error:
            print(error)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
