"""All pods of this project: the ledger's entries beside the provider's."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from runner.cloud import clock, termination
from runner.cloud.budget import Meter, paid_until, stopped_usd_per_day
from runner.cloud.ledger import ARMED, PREFIX, Entry, Ledger, LedgerError
from runner.cloud.provider import OVER, Pod, Provider
from runner.cloud.provider_errors import CloudError, NoKeyError, StillThereError, unseen_pod
from runner.cloud.providers import DEFAULT, connect
from runner.cloud.reconcile import overdue, reconcile, rented_at
from runner.config.did_you_mean import nearest
from runner.errors import Problem, RequestError, RunnerError
from runner.rundir.directory import run_id_of


@dataclass(frozen=True, slots=True)
class PodRow:
    """One pod, as `pods --json` prints it."""

    run_id: str
    pod_id: str | None
    name: str
    state: str
    """Of the ledger; `ELSEWHERE` for a pod that another machine has rented, `NOT OURS` for one of no runner."""
    status: str | None
    """The provider's word; null where it has no such pod."""
    gpu: str | None
    cloud: str
    data_center: str | None
    usd_per_hour: float
    usd: float
    """So far, by time and price, disks included."""
    usd_per_day_stopped: float
    age_hours: float
    deadline: float | None
    """When it ends itself, epoch."""
    held: bool
    """A living launcher holds it."""
    detail: str
    page: str | None


NOT_OURS: dict[str, Any] = {"run_id": "", "state": "NOT OURS", "detail": "not of this project: no verb touches it"}


def pod_rows(api: Provider, ledger: Ledger, *, everything: bool = False) -> list[PodRow]:
    """Every pod of this project, oldest first; with `everything` the account's other pods as well."""
    now = clock.now()
    listed = [pod for pod in api.pods() if pod.status not in OVER]
    pods = {pod.id: pod for pod in listed if pod.name.startswith(PREFIX)}
    found: list[PodRow] = []
    known: set[str] = set()
    for entry in ledger.entries():
        pod = pods.get(entry.pod_id or "") or next((p for p in pods.values() if p.name == entry.name), None)
        if pod is not None:
            known.add(pod.id)
        found.append(_row(api, entry, pod, now))
    found += [_elsewhere(api, pod, now) for pod in pods.values() if pod.id not in known]
    others = (pod for pod in listed if pod.id not in pods and pod.id not in known)
    found += [replace(_elsewhere(api, pod, now), **NOT_OURS) for pod in others if everything]
    return sorted(found, key=lambda row: -row.age_hours)


def rows_of_all(apis: Sequence[Provider], ledger: Ledger, *, everything: bool = False) -> list[PodRow]:
    """The rows of several accounts: an entry of the ledger once, by the account that has its pod."""
    found: dict[str, PodRow] = {}
    for row in (row for api in apis for row in pod_rows(api, ledger, everything=everything)):
        if row.name not in found or row.status is not None or not row.name:
            found[row.name or str(row.pod_id)] = row
    return sorted(found.values(), key=lambda row: -row.age_hours)


def _row(api: Provider, entry: Entry, pod: Pod | None, now: float) -> PodRow:
    meter = Meter(entry.usd_per_hour, entry.created, entry.disk_gb)
    pod_id = pod.id if pod else entry.pod_id
    return PodRow(
        run_id=entry.run_id, pod_id=pod_id, name=entry.name, state=entry.state, status=pod.status if pod else None,
        gpu=entry.gpu, cloud=entry.cloud, data_center=pod.data_center if pod else None,
        usd_per_hour=pod.usd_per_hour if pod else entry.usd_per_hour, usd=round(meter.usd(paid_until(entry, now)), 4),
        usd_per_day_stopped=round(stopped_usd_per_day(entry.disk_gb), 4), age_hours=(now - entry.created) / 3600,
        deadline=entry.deadline, held=entry.owned, detail=entry.detail, page=api.page(pod_id) if pod_id else None,
    )  # fmt: skip


def _elsewhere(api: Provider, pod: Pod, now: float) -> PodRow:
    """A pod of this project that this machine's ledger does not know: its variables tell run and deadline."""
    began = pod.created or now
    return PodRow(
        run_id=run_of(pod), pod_id=pod.id, name=pod.name, state="ELSEWHERE", status=pod.status, gpu=pod.gpu_id,
        cloud=pod.cloud, data_center=pod.data_center, usd_per_hour=pod.usd_per_hour,
        usd=round(Meter(pod.usd_per_hour, began).usd(now), 4), usd_per_day_stopped=0.0,
        age_hours=max(0.0, now - began) / 3600, deadline=pod_deadline(pod), held=False,
        detail="rented from another machine", page=api.page(pod.id),
    )  # fmt: skip


def run_of(pod: Pod) -> str:
    """The run that a pod belongs to: its variable, or its name without prefix and number."""
    return pod.env.get("RUNNER_RUN_ID") or pod.name.removeprefix(PREFIX).rpartition("-")[0]


def pod_deadline(pod: Pod) -> float | None:
    """Deadline of a pod by its own variable, and by the clock of whoever rented it.

    One that was kept and started again has as long as before, for its variables stay.
    """
    deadline, started = pod_time_variable(pod, "RUNNER_DEADLINE"), pod.started
    if deadline is None or started is None or pod.created is None:
        return deadline
    return deadline + max(0.0, started - pod.created)


def pod_time_variable(pod: Pod, name: str) -> float | None:
    """A time among the pod's variables."""
    try:
        return float(pod.env[name])
    except (KeyError, ValueError):
        return None


def find_pod(api: Provider, ledger: Ledger, word: str) -> tuple[str, str, str]:
    """Name, pod id and run id of the pod that a word means: a pod's id or name, a run's id or folder.

    RequestError where there is none, or more than one.
    """
    asked = run_id_of(word)
    alive = [row for row in pod_rows(api, ledger) if row.pod_id is not None and row.status is not None]
    exact = [row for row in alive if asked in (row.pod_id, row.name, row.run_id)]
    found = exact or [row for row in alive if len(asked) > 3 and row.run_id.startswith(asked)]
    if len(found) == 1:
        (row,) = found
        return row.name, str(row.pod_id), row.run_id
    if found:
        ids = " or ".join(str(row.pod_id) for row in found)
        raise RequestError(Problem(f"{word} has {len(found)} pods", "command line", f"name one by its id: {ids}"))
    meant = {str(row.pod_id): str(row.pod_id) for row in alive} | {row.run_id: row.run_id for row in alive}
    near = nearest(asked, meant)
    remedy = f"did you mean {near}?" if near else "python -m runner pods lists them"
    raise RequestError(Problem(f"this project has no pod {word}", "command line", remedy))


def machine_of(word: str, provider: str = DEFAULT) -> tuple[str | None, int, int]:
    """GPU type, number of GPUs and of vCPUs of the pod that a word means. RequestError where there is none."""
    api, (ledger, _) = connect(provider), Ledger.or_copy()
    name, pod_id, _ = find_pod(api, ledger, word)
    pod, entry = api.pod(pod_id), ledger.entry(name)
    if pod is not None and pod.num_vcpus is not None:
        return None, 0, pod.num_vcpus
    gpu_id = (pod.gpu_id if pod else None) or (entry.gpu if entry else None)
    if pod is None or gpu_id is None:
        raise RequestError(Problem(f"{api.title} does not say what pod {pod_id} has", "where.pod", "write hw=NAME"))
    return gpu_id, pod.gpu_count, 0


def _silent(line: str) -> None:
    pass


def terminate(
    api: Provider, ledger: Ledger, word: str, why: str = "requested by the user", say: Callable[[str], None] = _silent
) -> list[str]:
    """End every pod that a word means, whoever holds it, and confirm it; their ids. StillThereError where that fails.

    By the ledger alone where the provider's list cannot be had, and by the list alone where the ledger cannot. A pod's
    id that is in neither is asked to end as well, for such a command stands in messages; one of a name that is not this
    project's is refused.
    """
    found = _meant(api, ledger, word, say)
    for _, pod_id, _ in found:
        with suppress(RunnerError):  # all of them first: confirming one can take minutes
            api.terminate(pod_id)
    failures: list[Problem] = []
    for name, pod_id, run_id in found:
        try:
            if _unknown(ledger, name):
                with suppress(RunnerError):  # it was listed when it was looked for
                    adopt(api, ledger, pod_id, run_id)
            termination.terminate(api, ledger, name, pod_id, why)
        except RunnerError as error:
            failures += error.problems
    if failures:
        raise StillThereError(*failures)
    return [pod_id for _, pod_id, _ in found]


def _meant(api: Provider, ledger: Ledger, word: str, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """Name, id and run of every pod that a word means."""
    asked = run_id_of(word)
    entries = ledger.entries()
    own = [e for e in entries if asked in (e.pod_id, e.name, e.run_id)]
    found = {str(e.pod_id): (e.name, str(e.pod_id), e.run_id) for e in own if e.pod_id}
    try:
        listed = [pod for pod in api.pods() if pod.name.startswith(PREFIX) and pod.status not in OVER]
    except CloudError as error:
        if asked not in found:  # not the id of one pod
            again = f"python -m runner pods terminate {shlex.quote(word)}"
            others = f"pods of {asked} that this machine has not rented may still run"
            say(f"Warning: {api.title}'s list could not be had ({error}): {others}; later, once more: {again}")
        return list(found.values()) or [_by_id(api, asked, own, error)]
    known = {e.pod_id for e in entries}
    for pod in listed:  # also a second one of the same name: a request can be carried out twice
        named = asked in (pod.id, pod.name) or any(e.name == pod.name for e in own)
        if pod.id not in found and (named or (pod.id not in known and run_of(pod) == asked)):
            found[pod.id] = (pod.name, pod.id, run_of(pod))
    if not found and (lost := next((e for e in own if e.state == "CREATE_UNKNOWN"), None)):
        raise StillThereError(unseen_pod(api, lost.name, "no pod of that name is listed now"))
    return list(found.values()) or [find_pod(api, ledger, word)]


def _by_id(api: Provider, asked: str, own: list[Entry], error: CloudError) -> tuple[str, str, str]:
    """The pod of that id where there is no list; `error` where there is none."""
    if own:
        raise StillThereError(unseen_pod(api, own[0].name, str(error)))
    pod = api.pod(asked)
    if pod is None:
        raise error
    _check_ours(api, pod)
    return pod.name, pod.id, run_of(pod)


def _unknown(ledger: Ledger, name: str) -> bool:
    try:
        return ledger.entry(name) is None
    except LedgerError:
        return False


def stop(api: Provider, ledger: Ledger, word: str) -> str:
    """Stop a pod and keep its disk, confirmed; its id."""
    name, pod_id, run_id = find_pod(api, ledger, word)
    if ledger.entry(name) is None:
        adopt(api, ledger, pod_id, run_id)
    termination.stop(api, ledger, name, pod_id, "requested by the user")
    ledger.leave(name)
    return pod_id


def adopt(api: Provider, ledger: Ledger, pod_id: str, run_id: str, run_dir: str = "") -> Entry:
    """Write a pod that another machine has rented into this machine's ledger, held by this process."""
    pod = api.pod(pod_id)
    if pod is None:
        raise RequestError(Problem(f"pod {pod_id} is gone", "command line", "python -m runner pods lists them"))
    _check_ours(api, pod)
    ledger.plan(
        pod.name, run_id=run_id, run_dir=run_dir, gpu=pod.gpu_id, cloud=pod.cloud, usd_per_hour=pod.usd_per_hour,
        disk_gb=pod.disk_gb + pod.volume_gb, keep=False, volume=pod.volume_id, base=api.base, account=api.account,
        heartbeat_s=None,
    )  # fmt: skip
    deadline, rented = pod_deadline(pod), pod_time_variable(pod, "RUNNER_RENTED")
    if deadline is not None and rented is not None and pod.created is not None:
        deadline += pod.created - rented  # from the other machine's clock to the provider's
    facts = {"pod_id": pod.id, "deadline": deadline} | ({"created": pod.created} if pod.created else {})
    ledger.move(pod.name, "RUNNING", "rented from another machine", **facts)
    found = ledger.entry(pod.name)
    assert found is not None
    return found


def _check_ours(api: Provider, pod: Pod) -> None:
    if not pod.name.startswith(PREFIX):
        what = f"pod {pod.id} is {pod.name or 'without a name'}, which is not this project's"
        raise RequestError(Problem(what, "command line", f"end it by hand: {api.page(pod.id)}"))


def unowned_pods(
    api: Provider, ledger: Ledger, *, everything: bool = False, say: Callable[[str], None] = _silent
) -> list[tuple[str, str, str]]:
    """Pods that no run owns: name, id and why. With `everything` all that no living process of this machine holds.

    Without: those past their deadline, wherever they were rented, but for stopped ones; `reconcile` has ended before
    what crashed launchers left half-made. What cannot be judged, as the provider does not say what time it is, is said.
    """
    unsure: list[str] = []
    there = clock.ProviderClock(api.time)
    entries = {key: entry for entry in ledger.entries() for key in (entry.name, entry.pod_id)}
    found = []
    for pod in api.pods():
        if not pod.name.startswith(PREFIX) or pod.status in OVER:
            continue
        entry = entries.get(pod.id) or entries.get(pod.name)
        deadline = entry.deadline if entry else pod_deadline(pod)
        now = there.now(pod, rented_at(ledger, entry) if entry else pod_time_variable(pod, "RUNNER_RENTED"))
        if entry is not None and entry.owned:
            continue
        # Stopped: by a run that keeps its pod, or with a result that nobody has fetched. It costs its disk alone.
        if (entry.state == "STOPPED" if entry else pod.status == "EXITED") and not everything:
            continue
        if deadline is not None and now is not None and now > deadline:
            found.append((pod.name, pod.id, "past its deadline"))
        elif entry is not None and now is not None and overdue(entry, now):
            found.append((pod.name, pod.id, "its launcher is silent for too long"))
        elif everything:
            found.append((pod.name, pod.id, "no process here follows it" if entry else "rented from another machine"))
        elif deadline is not None and now is None:
            unsure.append(pod.id)
    if unsure:
        say(f"Warning: {api.title} does not say what time it is, and so not whether these are past their deadline: "
            f"{', '.join(unsure)}; python -m runner pods terminate POD ends one")  # fmt: skip
    return found


def stopped_pods_with_a_run(api: Provider, ledger: Ledger) -> list[tuple[str, str]]:
    """Pods that have stopped with a run that is not here, or that a run keeps: the pod's id and the run's.

    They cost their disk until somebody decides: `reap` ends none of them without `--all`.
    """
    runs = {entry.pod_id: entry.run_id for entry in ledger.entries() if entry.state == "STOPPED" and not entry.owned}
    return [(pod.id, runs[pod.id]) for pod in api.pods() if pod.id in runs and pod.status not in OVER]


def reap(api: Provider, ledger: Ledger, found: list[tuple[str, str, str]]) -> list[str]:
    """Terminate pods, all of them even if one cannot be; StillThereError with every one that could not be confirmed."""
    ended, failures = [], []
    for _, pod_id, why in found:
        try:
            ended += terminate(api, ledger, pod_id, why)
        except RunnerError as error:
            failures += error.problems
    if failures:
        raise StillThereError(*failures)
    return ended


def refuse_second_pod(run_id: str, provider: str | None) -> list[str]:
    """RequestError where a pod has the run already, by ledger or provider; else notes of what was settled.

    `provider`: where the run goes on in a pod, for which a stopped one is no obstacle; None where it goes on here.
    """
    ledger, _ = Ledger.or_copy()
    notes: list[str] = []
    listed: list[Pod] = []
    if provider is not None:
        try:
            api = connect(provider)
            notes = reconcile(api, ledger)
            listed = api.pods()
        except (NoKeyError, CloudError):  # said when the pod is rented
            pass
    entries = ledger.entries(run_id)
    problems = [problem for entry in entries if (problem := _busy(entry, provider is not None))]
    known = {entry.pod_id for entry in ledger.entries()}
    for pod in listed:
        mine = pod.name.startswith(PREFIX) and run_of(pod) == run_id
        if mine and pod.id not in known and pod.status not in OVER:
            problems.append(_has(run_id, pod.id, f"{pod.status}, rented elsewhere"))
    if problems:
        raise RequestError(*problems)
    return notes


def _busy(entry: Entry, rents: bool) -> Problem | None:
    if entry.owned and not entry.owned_here:
        what = f"{entry.run_id} is running in pod {entry.pod_id or entry.name}: process {entry.pid} follows it"
        remedy = f"python -m runner logs {entry.run_id} -f looks on; pods terminate {entry.run_id} ends the pod"
        return Problem(what, "command line", remedy)
    if entry.state in ARMED:
        return _has(entry.run_id, str(entry.pod_id), entry.state.lower())
    if entry.state == "STOPPED" and not rents and not entry.keep:
        what = f"pod {entry.pod_id} has stopped itself with what is newest of {entry.run_id}"
        return Problem(what, "command line", f"python -m runner fetch {entry.run_id}, then resume it")
    return None


def _has(run_id: str, pod_id: str, state: str) -> Problem:
    what = f"{run_id} is in pod {pod_id} ({state}): a second one would do the same again"
    return Problem(what, "command line", f"python -m runner attach {run_id}, or fetch {run_id}")
