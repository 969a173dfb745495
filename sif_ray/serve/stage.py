"""Serving as a job: deploy, answer until interrupted, leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator

from ray import serve

from sif_ray.config import ServeConfig
from sif_ray.depth.checkpoint import tell_licence
from sif_ray.ports import free_port
from sif_ray.runtime import ray_session
from sif_ray.serve.access import Keys
from sif_ray.serve.app import build_app

log = logging.getLogger(__name__)

APPLICATION = "sif"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(config: ServeConfig) -> None:
    """Serve until interrupted; the interrupt is raised again after everything has been stopped."""
    with serving(config) as base_url:
        log.info("%s is a page to try it, %s/docs describes the API; Ctrl-C stops it", base_url, base_url)
        threading.Event().wait()


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """The application for the body, as its base URL, e.g. "http://127.0.0.1:8000"; ready when it is entered."""
    tell_licence(config.depth_model)
    if not Keys.read(config) and config.host not in LOOPBACK:
        log.warning("host = %s, and no api_keys_file or api_keys_env: whoever reaches it may ask", config.host)
    port = config.port or free_port(config.host)
    config = dataclasses.replace(config, port=port)
    application = build_app(config)
    with ray_session(config.ray):
        try:
            serve.start(
                proxy_location="HeadOnly",  # where this base URL is; `serve deploy` puts one on every node
                http_options={"host": config.host, "port": port},
                logging_config={"log_level": "WARNING"},
            )
            serve.run(application, name=APPLICATION, route_prefix="/")
            yield f"http://{config.host}:{port}"
        finally:
            serve.shutdown()
