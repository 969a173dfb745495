"""What a process of ours writes on stderr."""

from __future__ import annotations

import logging
import sys


def configure_logging() -> None:
    """Our INFO and everybody's WARNING on stderr: coloured on a terminal, plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        logging.basicConfig(format="%(message)s", handlers=[handler], level=logging.WARNING)
    else:
        handler = logging.StreamHandler()
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler], level=logging.WARNING
        )
    logging.getLogger("sif_ray").setLevel(logging.INFO)
