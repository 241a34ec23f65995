"""The launchers of `chaos_cloud`, and the commands after them: a run's steps with a pod, without training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.harm import set_clock


def launch(spec: Any, folder: Path, words: int, alone: float | None) -> None:
    """What a run does with a pod, without training. What it says goes to a pipe: files may be what is harmed."""
    import traceback

    from runner.cloud.rent_pod import acquire
    from runner.errors import RunnerError
    from runner.rundir.directory import RunDir

    def say(line: str) -> None:
        os.write(words, f"{line}\n".encode())

    try:
        plan: dict[str, object] = {"hours": 0.2, "usd_per_hour": 0.74}
        rented = acquire(RunDir(folder), spec, plan, "ssh-ed25519 AAAA chaos", say, alone_minutes=alone)
        rented.mark("SYNCED", "sent")
        rented.mark("RUNNING", "armed")
        for _ in range(10):
            if rented.refresh() is None:
                if alone is not None:
                    say("ROBBED")
                break
            time.sleep(0.1)
        rented.mark("COLLECTING", "done")
        time.sleep(0.2)
        rented.release()
    except RunnerError as error:
        say(str(error))
    except BaseException:
        say(traceback.format_exc())


def listing(seconds: float) -> None:
    """Another command, whose clock is so much ahead: it reconciles, lists, and reaps what is past its deadline."""
    from runner.cloud import fleet
    from runner.cloud.ledger import Ledger
    from runner.cloud.providers import connect
    from runner.cloud.reconcile import reconcile

    set_clock(seconds, from_start=True)
    api, ledger = connect(), Ledger()
    reconcile(api, ledger)
    fleet.pod_rows(api, ledger)
    fleet.reap(api, ledger, fleet.unowned_pods(api, ledger))


def next_command() -> None:
    """Any: it reconciles first. Deadlines have passed meanwhile, and answers that never came are old."""
    from runner.cloud import fleet
    from runner.cloud.ledger import Ledger
    from runner.cloud.providers import connect
    from runner.cloud.reconcile import reconcile

    ledger = Ledger()
    for entry in ledger.entries():
        if entry.state in ("RUNNING", "COLLECTING", "STOPPED"):
            ledger.set(entry.name, deadline=entry.created - 3600)
            if entry.state == "STOPPED":  # stopped by being taken away: a person would end it
                fleet.terminate(connect(), ledger, entry.name)
    reconcile(connect(), ledger)


def settled() -> bool:
    """Nothing in the ledger, but for creates that came to nothing and are looked for during a quarter of an hour."""
    from runner.cloud.ledger import Ledger

    return all(entry.state == "CREATE_UNKNOWN" for entry in Ledger().entries())


def states() -> str:
    """Of the case's own pods; what can still be read of them."""
    from runner.cloud.ledger import Ledger

    return "+".join(sorted({entry.state for entry in Ledger.or_copy()[0].entries(gone=False)})) or "none"
