"""A real S3 protocol server on loopback. The keys for it are in the environment (conftest.py)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pyarrow.fs as pafs

BUCKET = "bucket"


class ObjectStore:
    """A server with an empty bucket."""

    def __init__(self, endpoint: str) -> None:
        httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()  # every server of a process has the same contents
        self._query = f"endpoint_override={quote(endpoint, safe='')}&region=us-east-1"
        filesystem, _ = pafs.FileSystem.from_uri(f"s3://{BUCKET}?{self._query}&allow_bucket_creation=true")
        filesystem.create_dir(BUCKET)

    def url(self, key: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{key}?{self._query}"


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield ObjectStore(f"http://{host}:{port}")
    finally:
        server.stop()
