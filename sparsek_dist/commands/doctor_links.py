"""The links in `sparsek doctor`: one row per size of message, or what keeps the process group from forming."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict
from typing import Any

from sparsek_dist.commands.doctor_checks import Facts, Finding
from sparsek_dist.errors import ConfigError, PeerError
from sparsek_dist.parallel.links import measure_links
from sparsek_dist.parallel.meeting import Meeting
from sparsek_dist.parallel.rendezvous import Ranks, initialize, shutdown

STRAGGLER = 4.0
"""A link this many times slower than the median link holds everyone up."""


def time_links(meeting: Meeting, ranks: Ranks) -> None:
    """Makes the process group and times its links; publishes the timings, or why there are none."""
    if ranks.world_size == 1:
        meeting.publish("timings", {"timings": []})
        return
    # So that NCCL raises when time is up, instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        device = initialize(ranks, timeout=meeting.limit)
        meeting.publish("timings", {"timings": [asdict(timing) for timing in measure_links(device)]})
    except (PeerError, ConfigError, RuntimeError) as error:
        meeting.publish("timings", {"problem": " ".join(str(error).split())[:300]})
        return
    shutdown()


def judge_links(meeting: Meeting, came: dict[int, Facts]) -> list[Finding]:
    told = meeting.collect("timings", patience=1.5, enough=lambda told: bool(_problems(told)))
    problems = _problems(told) or {rank: "no answer in time" for rank in came if rank not in told}
    if problems:
        rank, problem = next(iter(problems.items()))
        cure = (
            "let the hosts reach each other on all ports, not only that of rank 0; name the interface they share in "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (launch/env.sh); NCCL_DEBUG=INFO tells more"
        )
        return [Finding("links", f"rank {rank} on {came[rank].host}: {problem}", cure, PeerError.exit_code)]
    if len(came) == 1:
        return [Finding("links", "one process")]
    return [_judge_size([told[rank]["timings"][index] for rank in came], came) for index in range(3)]


def _problems(told: dict[int, Any]) -> dict[int, str]:
    return {rank: value["problem"] for rank, value in told.items() if "problem" in value}


def _judge_size(timings: list[dict[str, Any]], came: dict[int, Facts]) -> Finding:
    """One row: the slowest rank's all-gather, and the slowest pair of neighbours."""
    size = timings[0]["num_bytes"]
    gather = max(timing["all_gather"] for timing in timings)
    pairs = {
        (rank, int(other)): seconds
        for rank, timing in enumerate(timings)
        for other, seconds in timing["exchange"].items()
        if rank < int(other)
    }
    worst = max(pairs, key=lambda pair: pairs[pair])
    hosts = " - ".join(dict.fromkeys(came[rank].host for rank in worst))
    found = (
        f"all-gather {_seconds(gather)}, {_rate(size, gather)}; "
        f"neighbours {_seconds(pairs[worst])}, {_rate(size, pairs[worst])} (ranks {worst[0]} - {worst[1]}, {hosts})"
    )
    # Links inside a host and between hosts differ by nature: each is compared with its like.
    inside = [came[first].host == came[second].host for first, second in pairs]
    alike = [time for time, same in zip(pairs.values(), inside, strict=True) if same == (len(hosts.split(" - ")) == 1)]
    slow = len(alike) > 2 and pairs[worst] > STRAGGLER * statistics.median(alike)
    return Finding(
        f"links, {_size(size)}", found, "see cables, switch ports and NCCL_IB_HCA of that pair" if slow else ""
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _rate(num_bytes: int, seconds: float) -> str:
    rate = num_bytes / seconds
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.0f} MB/s"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >> 20 else f"{num_bytes >> 10} KiB"
