"""JSON for the browser, without the values of secrets in the environment."""

from __future__ import annotations

import html
import json
import math
import os
import re
from typing import Any

from starlette.responses import Response

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|WEBHOOK|NOTIFY", re.IGNORECASE)
"""Names of variables whose value is nobody's business: `HF_TOKEN`, `RUNPOD_API_KEY`, `AWS_SECRET_ACCESS_KEY`."""
SHORTEST = 8
"""Characters: a shorter value would be found in ordinary words."""
HIDDEN = "•••"


def secrets_here() -> list[str]:
    """Values of secrets in the environment, the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def without_secrets(text: str) -> str:
    """The text with every secret of the environment replaced: a log or a recipe may repeat one."""
    for secret in secrets_here():
        in_json = (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
        for spelt in {form for one in (secret, *in_json) for form in (one, html.escape(one), html.escape(one, False))}:
            text = text.replace(spelt, HIDDEN)
    return text


def to_json(content: object) -> str:
    """One line of JSON as browsers read it: NaN and infinities become null."""
    return without_secrets(json.dumps(_finite(content), ensure_ascii=False, separators=(",", ":"), default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class SafeJson(Response):
    """A JSON answer without secrets."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """As UTF-8; half characters, which UTF-8 cannot hold, become question marks."""
        return to_json(content).encode("utf-8", errors="replace")
