"""Account balance, through GraphQL: REST v2 has none, and RunPod serves GraphQL until early 2027."""

from __future__ import annotations

import math

from runner.cloud.runpod.account import api_key
from runner.cloud.runpod.transport import bounded

QUERY = "query { myself { clientBalance } }"
SECONDS = 10.0


def balance() -> float | None:
    """US$; None where RunPod does not say it, for whatever reason: no run waits for that."""
    from runpod.api.graphql import run_graphql_query

    try:
        answer = bounded(lambda: run_graphql_query(QUERY, api_key=api_key()), SECONDS)
        found = float(answer["data"]["myself"]["clientBalance"])
    except Exception:  # of the SDK, requests and json; a key that REST accepts may not be allowed here
        return None
    return found if math.isfinite(found) else None
