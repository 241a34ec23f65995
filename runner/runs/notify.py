"""Webhook of a run: told once how it ended (`run.notify`). It never delays a run by more than ten seconds or fails it.

The address is a secret: it is read from the environment here, and no message, file or command line has any of it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from runner.errors import Problem, RequestError
from runner.report.text import duration, without_control_sequences
from runner.rundir.directory import Outcome, RunDir
from runner.rundir.launch_options import LaunchOptions
from runner.spec import RunSpec

Event = Literal["end", "failure", "cap"]
SECONDS = 10.0
"""For one post, however slowly it is answered."""
LONGEST = 1500
"""Characters of a message; Discord takes 2,000."""
CAP = "where.max_usd"


def check_notify(spec: RunSpec, launch_options: LaunchOptions) -> None:
    """RequestError, before anything starts, where nobody could be told."""
    if spec.run.notify is None:
        return
    name = _variable(spec)
    if launch_options.detach:
        what = "run.notify is posted by the command that follows the run, and --detach leaves it"
        raise RequestError(Problem(what, "--detach", "leave out --detach, or write run.notify=null"))
    address = _address(name)
    if address is None:
        what = f"run.notify={spec.run.notify}: the variable {name} is not set"
        raise RequestError(Problem(what, "run.notify", f"export {name}=https://…, or write run.notify=null"))
    try:
        parts = urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or not address.isprintable() or " " in address:
        what = f"run.notify={spec.run.notify}: {name} holds no address of a webhook"
        raise RequestError(Problem(what, "run.notify", f"export {name}=https://…"))


@contextmanager
def notifying(run: RunDir, spec: RunSpec, say: Callable[[str], None]) -> Iterator[Callable[[Outcome], None]]:
    """Tell the webhook how the block ends: by the outcome that it hands over, or by its exception."""
    ended: list[Outcome] = []
    try:
        yield ended.append
    except BaseException as error:
        _tell(run, spec, "cap" if CAP in str(error) else "failure", str(error) or type(error).__name__, say)
        raise
    for outcome in ended:
        why = outcome.stopped_for or ""
        event: Event = "end" if outcome.exit_code == 0 else "cap" if CAP in why else "failure"
        _tell(run, spec, event, why, say)


def message_of(run: RunDir, event: Event, why: str) -> dict[str, Any]:
    """What is told: `text` for people, and the facts in it."""
    summary, status = run.summary, run.status
    seconds = summary.get("seconds") or run.spent()
    state = "done" if event == "end" else status.get("state", "failed")
    parts = [f"{run.id}: {'where.max_usd was reached' if event == 'cap' else state}"]
    parts += [f"after {duration(seconds)}"] if seconds else []
    measured: dict[str, Any] = dict(summary.get("eval", {}))
    before, after = (measured.get(when, {}).get("loss") for when in ("before", "after"))
    if isinstance(before, float) and isinstance(after, float):
        parts.append(f"held-out loss {before:.4f} → {after:.4f}")
    cost: Any = status.get("cost") or {}
    parts += [f"${cost['usd']:.2f}"] if cost else []
    if event != "end" and (reason := why or status.get("error")):
        parts.append(without_control_sequences(str(reason)))
    text = ", ".join(parts)[:LONGEST]
    return {"text": text, "event": event, "run_id": run.id, "state": state, "seconds": seconds, "usd": cost.get("usd")}


def body_of(address: str, message: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Body and headers that the server takes: `text` for Slack, `content` for Discord, text for ntfy, else all."""
    host = str(urlsplit(address).hostname)
    text = str(message["text"])
    if host.startswith("ntfy") or ".ntfy." in host:
        return text.encode(), {"Content-Type": "text/plain; charset=utf-8", "Title": f"runner: {message['event']}"}
    if host.endswith("slack.com"):
        content: dict[str, Any] = {"text": text}
    elif host.endswith(("discord.com", "discordapp.com")):
        content = {"content": text, "allowed_mentions": {"parse": []}}
    else:
        content = {**message, "content": text}
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def _tell(run: RunDir, spec: RunSpec, event: Event, why: str, say: Callable[[str], None]) -> None:
    if spec.run.notify is None or event not in spec.run.notify_on:
        return
    try:
        failed = _posted(_address(_variable(spec)), message_of(run, event, why))
    except Exception as error:  # whatever a run's files hold: it has ended, and its exit code stands
        failed = type(error).__name__
    if failed:
        say(f"Note    run.notify={spec.run.notify} was not told: {failed}")


def _posted(address: str | None, message: dict[str, Any]) -> str | None:
    """Post in a thread of its own, which is left alone after ten seconds; why it failed, without the address."""
    if address is None:
        return "the variable is not set any more"
    answers: list[str | None] = []
    work = threading.Thread(target=lambda: answers.append(_post(address, message)), daemon=True)
    work.start()
    work.join(SECONDS)
    return answers[0] if answers else f"no answer within {SECONDS:.0f} s"


def _post(address: str, message: dict[str, Any]) -> str | None:
    import urllib.error  # 50 ms, for whoever is notified
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any) -> None:
            """A redirect leads somewhere that nobody named."""

    try:
        body, headers = body_of(address, message)
        request = urllib.request.Request(address, body, {**headers, "User-Agent": "llm-finetuning-runner"})
        with urllib.request.build_opener(NoRedirect).open(request, timeout=SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"the server answered {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return getattr(reason, "strerror", None) or type(reason).__name__
    except Exception as error:  # its text may have the address
        return type(error).__name__


def _variable(spec: RunSpec) -> str:
    return str(spec.run.notify).removeprefix("env:")


def _address(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None
