"""Requests and answers held against RunPod's own description of REST v2 (tests/support/data/openapi-v2.json)."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from openapi_schema_validator import OAS31Validator

FILE = Path(__file__).parent / "data" / "openapi-v2.json"


@cache
def document() -> dict[str, Any]:
    """The whole description."""
    content: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return content


def request_errors(method: str, path: str, query: str, body: Any) -> list[str]:
    """What is wrong with a request: an unknown path or parameter, a body that the schema refuses."""
    operation = operation_of(method, path)
    if operation is None:
        return [f"{method} {path} is not described"]
    known = {parameter["name"] for parameter in _parameters(operation) if parameter["in"] == "query"}
    errors = [f"unknown query parameter {name}" for name, _ in parse_qsl(query) if name not in known | {"cursor"}]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return errors + ([f"{method} {path} takes no body"] if body else [])
    return errors + _errors(content["schema"], body)


def answer_errors(method: str, path: str, status: int, answer: Any, media_type: str) -> list[str]:
    """What is wrong with an answer: a status, media type or content that is not described."""
    operation = operation_of(method, path)
    if operation is None:
        return [f"{method} {path} is not described"]
    responses = operation["responses"]
    response = responses.get(str(status)) or (responses.get("default") if status >= 400 else None)
    if response is None:
        return [f"{method} {path} does not answer {status}"]
    if "$ref" in response:
        response = _followed(response["$ref"])
    content = response.get("content", {})
    if not content:
        return ["an answer where none is described"] if answer else []
    if media_type not in content:
        return [f"{status} comes as {', '.join(content)}, not as {media_type}"]
    return _errors(content[media_type]["schema"], answer)


def operation_of(method: str, path: str) -> dict[str, Any] | None:
    """The description of an operation: a path without a placeholder goes first."""
    for template, item in sorted(document()["paths"].items(), key=lambda pair: pair[0].count("{")):
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method.lower() in item:
            found: dict[str, Any] = item[method.lower()]
            return found
    return None


def _parameters(operation: dict[str, Any]) -> list[dict[str, Any]]:
    return [_followed(p["$ref"]) if "$ref" in p else p for p in operation.get("parameters", [])]


def _followed(reference: str) -> Any:
    found: Any = document()
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def _errors(schema: dict[str, Any], value: Any) -> list[str]:
    validator = OAS31Validator({**schema, "components": document()["components"]})
    validator.format_checker = OAS31Validator.FORMAT_CHECKER
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
