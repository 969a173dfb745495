"""Variables of NCCL and gloo that are known to break or slow what goes between GPUs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from sif_ray.doctor.finding import Finding, fault, note, ok

_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of one machine exchange data through its memory",
    "NCCL_SHM_DISABLE": "processes of one machine exchange data through the network",
    "NCCL_IB_DISABLE": "nodes exchange data over TCP even where InfiniBand or RoCE is there",
}
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def variable_findings(environ: Mapping[str, str], interfaces: Collection[str]) -> Iterator[Finding]:
    """`interfaces`: names of the machine's network interfaces."""
    found = [*_interface_findings(environ, interfaces), *_speed_findings(environ)]
    yield from found or [ok("NCCL variables", "none that bites")]


def _interface_findings(environ: Mapping[str, str], interfaces: Collection[str]) -> Iterator[Finding]:
    for name in _INTERFACES:
        if (wanted := environ.get(name)) and not any(_chosen(name, wanted, found) for found in interfaces):
            yield fault(
                "NCCL variables",
                f"{name}={wanted} names no interface of this machine ({', '.join(sorted(interfaces))})",
                f"set {name} to the one between the nodes, or unset it",
            )


def _chosen(name: str, wanted: str, interface: str) -> bool:
    """As NCCL reads it: a list of prefixes, after `=` of whole names, after `^` of those to leave out. gloo: names."""
    exclude, wanted = wanted.startswith("^"), wanted.removeprefix("^")
    exact, wanted = wanted.startswith("=") or name.startswith("GLOO"), wanted.removeprefix("=")
    items = [item for item in wanted.split(",") if item]
    listed = any(interface == item if exact else interface.startswith(item) for item in items)
    return listed != exclude


def _speed_findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name, meaning in _SLOW.items():
        if environ.get(name, "0") not in ("", "0"):
            yield note("NCCL variables", f"{name}={environ[name]}: {meaning}", f"unset {name} unless it is needed")
    if environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        yield note("NCCL variables", f"NCCL_DEBUG={environ['NCCL_DEBUG']} floods the logs", "set it to WARN")
