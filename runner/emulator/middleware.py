"""Middleware of every request: key, contract, injected faults."""

from __future__ import annotations

import asyncio
import json
import secrets
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runner.emulator import contract
from runner.emulator.answers import MEDIA_TYPE, ApiProblem, Json
from runner.emulator.contract import Operation
from runner.emulator.faults import Fault
from runner.emulator.state import Exchange, World

SHORT = {
    "createPod": "create", "listPods": "list", "getPod": "get", "deletePod": "terminate", "updatePod": "update",
    "getPodLogs": "logs",
}  # fmt: skip
QUOTA = {
    "RateLimit": '"minute";r=59;t=60, "hour";r=2999;t=3600',
    "RateLimit-Policy": '"minute";q=60;w=60, "hour";q=3000;w=3600',
}
HTML_502 = "<html>\r\n<head><title>502</title></head>\r\n<body><h1>502 Bad Gateway</h1></body>\r\n</html>\r\n"
SAID = {
    401: "invalid api key", 402: "Insufficient balance. Please add funds to your account.", 403: "access denied",
    404: "resource not found", 409: "action is not valid for the current status",
    422: "Request validation failed.", 429: "rate limit exceeded for the minute window",
    503: "service unavailable",
}  # fmt: skip
POD_MAY = ("getPod", "deletePod", "podAction", "getPodLogs")
"""What a pod's own key is good for, with its own pod."""


class Front:
    """ASGI application around the one with the routes."""

    def __init__(self, app: ASGIApp, world: World) -> None:
        self.app, self.world = app, world

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith("/_emulator"):
            await self.app(scope, receive, send)
            return
        call = Call(self.world, scope, await _body(receive), send)
        try:
            await self._checked(call, receive)
        except ApiProblem as problem:
            await call.say(problem)
        call.record()

    async def _checked(self, call: Call, receive: Receive) -> None:
        call.find()
        caller = call.authenticate()
        call.read()
        faults = self.world.faults
        if fault := faults.take("answer", **call.facts()):
            await call.fail(fault)
            return
        call.check(caller)
        late = faults.take("lost", "timeout", **call.facts())
        if late and not late.commit:
            await call.be_late(late)
            return
        await self.app(call.scope, call.replay(receive), call.hold if late else call.pass_on)
        if late:
            await call.be_late(late)


class Call:
    """One request and its answer."""

    def __init__(self, world: World, scope: Scope, content: bytes, send: Send) -> None:
        self.world, self.scope, self.content, self.send = world, scope, content, send
        self.method, self.path = scope["method"], unquote(scope["path"])
        self.query = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        self.operation: Operation | None = None
        self.identity: str | None = None
        self.body: Any = None
        self.known = False
        """Whether the key was right: only then are quotas told."""
        self.restricted = ""
        """The kind of a key that may do less."""
        self.status, self.media_type, self.faulty = 0, "", False
        self._held: list[Message] = []
        self._sent = bytearray()

    def find(self) -> None:
        """Set the operation and the id in its path; ApiProblem 404 or 405 if there is none."""
        raw = self.scope.get("raw_path", self.path.encode()).decode()
        methods = []
        for operation in contract.operations():
            match = operation.pattern.fullmatch(raw)
            if match and operation.method == self.method:
                self.operation, self.identity = operation, unquote(match.groupdict().get("id") or "") or None
                return
            methods += [operation.method] if match else []
        if self.path == "/graphql" and self.method == "POST":
            return
        if methods:
            raise ApiProblem(405, "The requested method is not allowed for this path.")
        raise ApiProblem(404, "resource not found")

    def authenticate(self) -> str | None:
        """The id of the pod that calls with its own key; None for the account."""
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in self.scope["headers"]}
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise ApiProblem(401, "missing bearer token")
        if secrets.compare_digest(key.encode(), self.world.settings.key.encode()):
            self.known = True
            return None
        if kind := self.world.settings.restricted.get(key):
            self.known, self.restricted = True, kind
            return None
        pod = self.world.pod_of_key(key)
        if pod is None:
            raise ApiProblem(401, "invalid api key")
        self.known = True
        return pod.id

    def read(self) -> None:
        """The body as JSON."""
        if self.content:
            try:
                self.body = json.loads(self.content)
            except ValueError:
                raise ApiProblem(400, "request body is not valid JSON") from None

    def names(self) -> set[str]:
        """Names of the operation in a fault's `on`."""
        if self.operation is None:
            return {"any", "graphql"}
        short = SHORT.get(self.operation.name, self.operation.name)
        if self.operation.name == "podAction" and isinstance(self.body, dict):
            short = str(self.body.get("action"))
        return {"any", self.operation.name, short, "reads" if self.method == "GET" else "writes"}

    def facts(self) -> Json:
        """Facts of the request that a fault can match."""
        body = self.body if isinstance(self.body, dict) else {}
        gpu = body.get("gpu")
        pod = self.world.engine.pods.get(self.identity or "")
        return {
            "on": self.names(),
            "pod": pod.names if pod else {self.identity, body.get("name")},
            "gpu": {gpu.get("id")} if isinstance(gpu, dict) else set(),
            "cloud": {body.get("cloud", "SECURE")},
            "data_center": set(body.get("dataCenterIds") or []),
        }

    def check(self, caller: str | None) -> None:
        """403 for what the key does not allow, 422 for what the contract does not."""
        operation = self.operation
        if caller is not None:
            self._check_right(caller)
        if self.restricted and not self._is_allowed():
            raise ApiProblem(403, "access denied")
        if operation is None:
            return
        errors = contract.query_errors(operation, self.query)
        if operation.body is not None and self.body is None:
            errors.append("$: a request body is required")
        elif operation.body is not None:
            errors += contract.body_errors(operation, self.body)
        if errors:
            raise ApiProblem(422, "Request validation failed.", errors)

    def _check_right(self, caller: str) -> None:
        own = self.operation is not None and self.operation.name in POD_MAY and self.identity == caller
        ends = self.method in ("DELETE", "POST")
        if not own or (ends and self.world.faults.take("no_right", **self.facts())):
            raise ApiProblem(403, "access denied")

    def _is_allowed(self) -> bool:
        """By the kind of key (`settings.RESTRICTED`)."""
        graphql = self.path == "/graphql"
        if self.restricted == "no_graphql":
            return not graphql
        if self.restricted == "no_pods":
            return self.path.startswith("/v2/catalog/")
        text = str(self.body.get("query", "")) if isinstance(self.body, dict) else ""
        return "mutation" not in text if graphql else self.method == "GET"

    def replay(self, receive: Receive) -> Receive:
        """The body once more, for the application, then what the client does next."""
        messages = [{"type": "http.request", "body": self.content, "more_body": False}]

        async def next_message() -> Message:
            return messages.pop() if messages else await receive()

        return next_message

    async def pass_on(self, message: Message) -> None:
        """A part of the answer, with the headers that all answers have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            told = dict(message.get("headers", []))
            self.media_type = told.get(b"content-type", b"").decode().partition(";")[0]
            message = {**message, "headers": [*message.get("headers", []), *self._headers()]}
        elif self.media_type != "text/event-stream":
            self._sent += message.get("body", b"")
        await self.send(message)

    async def hold(self, message: Message) -> None:
        """A part of an answer that is to come late or never."""
        self._held.append(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        found = {"Date": formatdate(self.world.clock.now(), usegmt=True), **(QUOTA if self.known else {})}
        return [(name.lower().encode(), value.encode()) for name, value in found.items()]

    async def say(self, problem: ApiProblem) -> None:
        """An error answer."""
        await self._answer(problem.status, json.dumps(problem.content()), MEDIA_TYPE, problem.headers())

    async def fail(self, fault: Fault) -> None:
        """The error that was ordered."""
        self.faulty = True
        if fault.status == 502:
            await self._answer(502, HTML_502, "text/html", {})
            return
        detail = fault.detail or SAID.get(fault.status, "internal server error")
        wait = (fault.retry_after or 1) if fault.status == 429 else fault.retry_after
        await self.say(ApiProblem(fault.status, detail, retry_after=wait))

    async def _answer(self, status: int, text: str, media_type: str, headers: dict[str, str]) -> None:
        content = text.encode()
        found = {"content-type": media_type, "content-length": str(len(content)), **headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in found.items()]
        await self.pass_on({"type": "http.response.start", "status": status, "headers": pairs})
        await self.pass_on({"type": "http.response.body", "body": content})

    async def be_late(self, fault: Fault) -> None:
        """Close the connection without an answer; or give the one that is held, or 504, after a time."""
        if fault.kind == "lost":
            # uvicorn has no other way to close a connection: its `send` is a method of the request's own object.
            self.send.__self__.transport.abort()  # type: ignore[attr-defined]  # as said
            return
        await asyncio.sleep(fault.seconds)
        if not self._held:
            await self.say(ApiProblem(504, "upstream timeout"))
        for message in self._held:
            await self.pass_on(message)

    def record(self) -> None:
        """Keep the exchange for tests to look at."""
        try:
            answer = json.loads(self._sent) if self._sent else None
        except ValueError:
            answer = self._sent.decode("utf-8", "replace")
        query = self.scope["query_string"].decode()
        exchange = Exchange(
            self.method, self.path, query, self.body, self.status, answer, self.media_type, self.faulty
        )  # fmt: skip
        self.world.exchanges.append(exchange)


async def _body(receive: Receive) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        content += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return bytes(content)
