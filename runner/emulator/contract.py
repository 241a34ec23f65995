"""Request validation against RunPod's OpenAPI description.

`contract.json` is written from the whole description, and a test fails when it is not what that gives:
    python -m runner.emulator.contract tests/support/data/openapi-v2.json
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from runner.emulator.answers import Json

FILE = Path(__file__).with_name("contract.json")
METHODS = ("get", "post", "put", "patch", "delete")
UNSERVED = re.compile(r"/v2/(clusters|registries|billing(?!/pods)|serverless/.*/(workers|releases))\b")
"""Paths that nothing here asks for."""
UNSERVED_METHODS = (("patch", "/v2/serverless/{id}"), ("patch", "/v2/templates/{id}"))
PROSE = ("description", "summary", "examples", "example", "x-enum-varnames", "x-codeSamples")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    name: str
    """RunPod's operationId, such as `createPod`."""
    pattern: re.Pattern[str]
    method: str
    body: Json | None
    """Schema of the request body, if there is one."""
    query: dict[str, Json]
    """Query parameter → its schema."""


def reduced(document: Json) -> Json:
    """Return the served part of an OpenAPI document: path → method → operation, body and query schemas, and their
    referenced schemas."""
    paths: Json = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if method not in item or UNSERVED.match(path) or (method, path) in UNSERVED_METHODS:
                continue
            operation = item[method]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            parameters = [_followed(p, document) for p in operation.get("parameters", [])]
            query = {p["name"]: _bare(p["schema"]) for p in parameters if p["in"] == "query"}
            entry = {"operation": operation["operationId"], "body": _bare(body) if body else None, "query": query}
            paths.setdefault(path, {})[method] = entry
    needed: Json = {}
    _collect(paths, document["components"]["schemas"], needed)
    return {"paths": paths, "components": {"schemas": dict(sorted(needed.items()))}}


def _followed(parameter: Json, document: Json) -> Json:
    reference = parameter.get("$ref")
    return document["components"]["parameters"][reference.rpartition("/")[2]] if reference else parameter


def _bare(schema: object, is_properties: bool = False) -> object:
    """A schema without its prose. Names of properties are no prose, whatever they are."""
    if isinstance(schema, dict):
        kept = schema if is_properties else {k: v for k, v in schema.items() if k not in PROSE}
        return {k: _bare(v, k == "properties" and not is_properties) for k, v in kept.items()}
    return [_bare(item) for item in schema] if isinstance(schema, list) else schema


def _collect(part: object, schemas: Json, needed: Json) -> None:
    if isinstance(part, dict):
        reference = part.get("$ref")
        name = reference.rpartition("/")[2] if isinstance(reference, str) else None
        if name and name not in needed:
            needed[name] = _bare(schemas[name])
            _collect(needed[name], schemas, needed)
        for value in part.values():
            _collect(value, schemas, needed)
    elif isinstance(part, list):
        for value in part:
            _collect(value, schemas, needed)


@cache
def operations() -> tuple[Operation, ...]:
    """All of them, those without a placeholder in their path first."""
    content = json.loads(FILE.read_text("utf-8"))
    found = []
    for path, item in sorted(content["paths"].items(), key=lambda pair: pair[0].count("{")):
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + "/?")
        for method, entry in item.items():
            found.append(Operation(entry["operation"], pattern, method.upper(), entry["body"], entry["query"]))
    return tuple(found)


@cache
def _components() -> Json:
    content: Json = json.loads(FILE.read_text("utf-8"))["components"]
    return content


def body_errors(operation: Operation, body: object) -> list[str]:
    """Return the errors of a body in RunPod's wording: `$: additional properties 'bogus' not allowed`."""
    return _errors(operation.body, body) if operation.body is not None else []


def query_errors(operation: Operation, query: dict[str, str]) -> list[str]:
    """Return the errors of known query parameters; unknown ones are ignored, as by RunPod."""
    return [
        f"{name}: {error}"
        for name, schema in operation.query.items()
        if name in query
        for error in _errors(schema, _typed(schema, query[name]))
    ]


def _typed(schema: Json, text: str) -> object:
    """A query parameter's text as the type that its schema asks for."""
    if schema.get("type") == "integer":
        return int(text) if re.fullmatch(r"-?\d+", text) else text
    if schema.get("type") == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return text.split(",") if schema.get("type") == "array" else text


def _errors(schema: Json, value: object) -> list[str]:
    validator = Draft202012Validator({**schema, "components": _components()})
    return sorted({worded for error in validator.iter_errors(value) if (worded := _worded(error))})


def _worded(error: Any) -> str | None:
    """An error in RunPod's words. None for a property called unknown only because its value is wrong, which is an error
    of its own: that is how JSON Schema counts what it has not evaluated."""
    where = "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path)
    if error.validator not in ("additionalProperties", "unevaluatedProperties"):
        return f"{where}: {error.message}"
    known = _known(error.schema)
    unknown = [f"'{name}'" for name in error.instance if name not in known]
    return f"{where}: additional properties {', '.join(unknown)} not allowed" if unknown else None


def _known(schema: Json) -> set[str]:
    """Names of the properties of a schema, of all its parts."""
    if "$ref" in schema:
        return _known(_components()["schemas"][schema["$ref"].rpartition("/")[2]])
    return set(schema.get("properties", {})).union(*(_known(part) for part in schema.get("allOf", [])))


def main(source: str) -> None:
    """Write `contract.json` from RunPod's description."""
    content = reduced(json.loads(Path(source).read_text("utf-8")))
    FILE.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
