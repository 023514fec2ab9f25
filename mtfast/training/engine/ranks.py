"""The processes of a run: who this one is, and the few collectives the stages need."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mtfast.config import ConfigError
from mtfast.launcher import is_main as is_main
from mtfast.launcher import rank as rank
from mtfast.launcher import whereabouts, world_size


class LaunchError(ConfigError):
    """What a launcher tells this process makes no sense."""


def prepare_environment() -> None:
    """Complete what a launcher would have set, so that plain `python -m mtfast` is a run of one rank.

    On a CPU the cores are shared out among the ranks of this machine unless OMP_NUM_THREADS says otherwise,
    and gloo uses the network through which rank 0 is reached unless GLOO_SOCKET_IFNAME does: by itself it
    tells others the address that this machine's name has here, which in Debian's /etc/hosts is 127.0.1.1.

    Raises:
        LaunchError: RANK is set and what belongs to it is not, or is no number.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    rendezvous = ("MASTER_ADDR", "MASTER_PORT") if world_size() > 1 else ()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *rendezvous):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            found = f"{name} is {value!r}" if name in os.environ else f"{name} is not set"
            raise LaunchError(
                f"RANK is set, as a launcher sets it, but {found}: start the run with deepspeed or torchrun, "
                "or give each process RANK, WORLD_SIZE, LOCAL_RANK (its number on its machine), MASTER_ADDR "
                "and MASTER_PORT"
            )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        if local > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
        if world_size() > 1 and (name := _interface_to(os.environ["MASTER_ADDR"])):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches `host`, which may be itself."""
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unsent:
            unsent.connect(there)
            mine = unsent.getsockname()[0]
    except OSError:  # told where the ranks meet
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if mine in (x.address for x in addresses)), None)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def store() -> Any:
    """The store through which the run's processes met; None for a single one and before they have."""
    if world_size() == 1 or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise mean of `values` over the ranks, as float64 on the host."""
    values = values.detach().double()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values.cpu()


def sum_over_ranks(values: torch.Tensor) -> None:
    """Add up `values` over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (anything that pickles), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(make: Callable[..., Any], *arguments: Any) -> Any:
    """Call `make(*arguments)` on rank 0 alone; its result there, None on the others, which wait for it.

    A failure on rank 0 is raised on every rank instead of leaving the others waiting.
    """
    result, failure = None, None
    if is_main():
        try:
            result = make(*arguments)
        except Exception as error:  # re-raised below, on every rank
            failure = error
    failure = broadcast(failure)
    if failure is not None:
        failure.of_main = True  # for who tells of it
        raise failure
    return result


def seen_by_main(look: Callable[[], Any]) -> Any:
    """What `look()` returns on rank 0, on every rank: what files there are is for one to say, since another
    host may see an older state of them."""
    return broadcast(on_main(look))


def main_first(make: Callable[[], Any]) -> Any:
    """Call `make()` on rank 0 as `on_main` does and then on the others, so that one process fills a cache.

    Raises:
        ConfigError: on every rank, where it failed on one of the others; the message names that.
    """
    result, failure = on_main(make), None
    if not is_main():
        try:
            result = make()
        except Exception as error:
            failure = f"{whereabouts()}: {error or type(error).__name__}"
    if (first := next(filter(None, gather(failure)), None)) is not None:
        raise ConfigError(first)
    return result


def agree(what: str, mine: Any) -> None:
    """Raises ConfigError on every rank where `mine` is not the same on all; `what` says what that is."""
    found = gather((whereabouts(), mine))
    others = [where for where, value in found if value != found[0][1]]
    if others:
        raise ConfigError(f"{what} is not the same on {', '.join(others)} as on {found[0][0]}")
