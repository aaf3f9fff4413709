"""`sparsek doctor`: can these processes, started this way on these hosts, train together? One table, one verdict.

Every rank runs it; rank 0 prints. The ranks first speak through a store, not through the process group, so that rank 0
can still say who is missing, or what differs, where the group never forms.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsek_dist.commands.doctor_checks import Facts, Finding, inspect, judge
from sparsek_dist.commands.doctor_links import judge_links, time_links
from sparsek_dist.errors import ConfigError, PeerError
from sparsek_dist.parallel.meeting import Meeting
from sparsek_dist.parallel.rendezvous import Ranks, discover

LARGE_SKEW = 1.0
"""Seconds between clocks from which logs and file times of two hosts cannot be compared."""

SLOW_FOLDER_SECONDS = 5.0
"""How long a network file system may take to show a new file to the other hosts."""

COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def doctor(folder: Path, *, timeout: float) -> int:
    """Looks, compares, times the links, and prints on rank 0; returns the exit code, the same on all ranks.

    Args:
        folder: where runs go, `run.root`.
        timeout: seconds to wait for other ranks, in each step.

    Raises:
        ConfigError: if a launcher set only some of its variables.
        PeerError: if this rank cannot reach rank 0.
    """
    ranks = discover()
    facts = inspect(ranks, folder)
    meeting = Meeting(ranks, timeout=timeout)
    meeting.publish("facts", asdict(facts))
    # Apart, because gloo and NCCL may wait far longer than they are told to.
    links = threading.Thread(target=time_links, args=(meeting, ranks), daemon=True)
    code = _lead(meeting, ranks, folder, links) if ranks.rank == 0 else _follow(meeting, ranks, folder, links)
    if links.ident is not None:
        links.join(1.0)
    if links.is_alive():
        # It would keep this process from ending.
        sys.stdout.flush()
        os._exit(code)
    return code


def _lead(meeting: Meeting, ranks: Ranks, folder: Path, links: threading.Thread) -> int:
    """Rank 0: asks for one thing after the other, judges, prints, and lets the others go."""
    came = {rank: Facts(**told) for rank, told in meeting.collect("facts").items()}
    everyone = list(came.values())
    findings = judge(everyone, ranks.world_size)
    if len(came) == ranks.world_size:
        leaders = [facts.rank for facts in everyone if facts.local_rank == 0]
        plan = {"leaders": leaders, "nonce": uuid.uuid4().hex[:12]}
        meeting.tell("plan", plan)
        findings += [_compare_clocks(meeting, came, leaders), _lead_folder(meeting, folder, plan, came)]
        # NCCL's words about a GPU that is missing or taken would only bury those above.
        can_try = not any(finding.exit_code for finding in findings if finding.check == "devices")
        meeting.tell("links", can_try)
        if can_try:
            links.start()
            findings += judge_links(meeting, came)
    else:
        meeting.tell("plan", None)
    code = max((finding.exit_code for finding in findings), default=0)
    _print(findings, everyone)
    meeting.tell("verdict", code)
    # The store lives in this process: the others must have read it.
    meeting.publish("left", True)
    meeting.collect("left", senders=[rank for rank in came if rank != 0], patience=0.2)
    return code


def _follow(meeting: Meeting, ranks: Ranks, folder: Path, links: threading.Thread) -> int:
    """Every other rank: does what rank 0 asks for, and leaves with its verdict."""
    # Rank 0 may have waited its whole time for others.
    plan = meeting.hear("plan", patience=2)
    if plan is not None:
        if ranks.rank in plan["leaders"]:
            meeting.publish("clock", _clock_offset(meeting))
            _use_folder(meeting, ranks.rank, folder, plan)
        if meeting.hear("links", patience=4):
            links.start()
    code = meeting.hear("verdict", patience=4)
    meeting.publish("left", True)
    return code


# --- clocks ---


def _clock_offset(meeting: Meeting) -> float:
    """Seconds by which rank 0's clock is ahead: its answer lies in the middle of the fastest round trip."""
    rank = meeting.ranks.rank
    trips = []
    for index in range(5):
        sent = time.time()
        meeting.publish(f"ping-{index}", True)
        told = meeting.hear(f"pong-{rank}-{index}", patience=4)
        received = time.time()
        trips.append((received - sent, told - (sent + received) / 2))
    return min(trips)[1]


def _compare_clocks(meeting: Meeting, came: dict[int, Facts], leaders: list[int]) -> Finding:
    offsets: dict[int, float] = {}
    for rank in leaders:
        if rank == 0:
            continue
        for index in range(5):
            if meeting.collect(f"ping-{index}", senders=[rank]):
                meeting.tell(f"pong-{rank}-{index}", time.time())
        offsets |= meeting.collect("clock", senders=[rank])
    if not offsets:
        return Finding("clocks", "one host")
    worst = max(offsets, key=lambda rank: abs(offsets[rank]))
    found = f"{abs(offsets[worst]) * 1000:.0f} ms apart at most ({came[0].host}, {came[worst].host})"
    late = abs(offsets[worst]) > LARGE_SKEW
    return Finding("clocks", found, "start a time service (chrony, systemd-timesyncd) on all hosts" if late else "")


# --- the folder of runs ---


def _use_folder(meeting: Meeting, rank: int, folder: Path, plan: dict[str, Any]) -> None:
    """The first process of each host leaves a file and looks for those of the other hosts."""
    place = folder / f".doctor-{plan['nonce']}"
    mine = place / f"rank-{rank}"
    problem, unseen = None, []
    try:
        place.mkdir(parents=True, exist_ok=True)
        mine.write_text("sparsek doctor")
    except OSError as error:
        problem = str(error)
    meeting.publish("wrote", problem)
    if rank == 0:
        meeting.tell("look", sorted(meeting.collect("wrote", senders=plan["leaders"])))
    expected = [place / f"rank-{other}" for other in meeting.hear("look", patience=2)] if problem is None else []
    deadline = time.monotonic() + SLOW_FOLDER_SECONDS
    while unseen := [path.name for path in expected if not path.exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    meeting.publish("seen", {"problem": problem, "unseen": unseen})
    # Only when all have looked may it go again.
    if rank == 0:
        meeting.tell("looked", sorted(meeting.collect("seen", senders=plan["leaders"])))
    meeting.hear("looked", patience=2)
    with contextlib.suppress(OSError):
        mine.unlink()
        place.rmdir()


def _lead_folder(meeting: Meeting, folder: Path, plan: dict[str, Any], came: dict[int, Facts]) -> Finding:
    _use_folder(meeting, 0, folder, plan)
    told = meeting.collect("seen", senders=plan["leaders"])
    for rank, seen in told.items():
        if seen["problem"] is not None:
            found = f"{came[rank].host} cannot write to {folder}: {seen['problem']}"
            return Finding(
                "run folder", found, "make it writable there, or use another run.root", ConfigError.exit_code
            )
    for rank, seen in told.items():
        if seen["unseen"]:
            found = f"{came[rank].host} does not see in {folder} what other hosts wrote there"
            cure = "mount one shared folder at the same path on every host"
            return Finding("run folder", found, cure, PeerError.exit_code)
    hosts = f", seen by all {len(told)} hosts" if len(told) > 1 else ""
    return Finding("run folder", f"{folder}: writable{hosts}")


# --- the table ---


def _print(findings: list[Finding], everyone: list[Facts]) -> None:
    # A log file has no width of its own, and launchers show too small a one.
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    table = Table("check", "found", "", title="sparsek doctor", title_justify="left", show_lines=False)
    for finding in findings:
        found = Text(finding.found)
        if finding.cure:
            found.append(f"\n-> {finding.cure}", style="bold")
        table.add_row(finding.check, found, Text(finding.verdict, style=COLOURS[finding.verdict]))
    console.print(table)
    failed = [finding.check for finding in findings if finding.exit_code]
    warned = [finding.check for finding in findings if finding.cure and not finding.exit_code]
    hosts = len({facts.host for facts in everyone})
    place = f"{len(everyone)} process{'es' * (len(everyone) > 1)} on {hosts} host{'s' * (hosts > 1)}"
    if failed:
        console.print(f"verdict: not ready ({', '.join(failed)})", style="bold red")
    else:
        besides = f", but see: {', '.join(warned)}" if warned else ""
        console.print(f"verdict: ready to train, {place}{besides}", style="yellow" if warned else "green")
