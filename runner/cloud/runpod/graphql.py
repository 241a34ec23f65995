"""Requests that REST v2 lacks, over GraphQL, which RunPod serves until early 2027: bids for pods, the balance."""

from __future__ import annotations

import math
from typing import Any

from runner.cloud.provider import PodRequest
from runner.cloud.provider_errors import NoBalanceError, NoCapacityError, RefusedError, UnclearError, WrongKeyError
from runner.cloud.runpod import account_key, json_types, transport
from runner.cloud.runpod.account_key import api_key
from runner.cloud.runpod.json_types import WORKSPACE
from runner.cloud.runpod.transport import FULL, POOR
from runner.errors import Problem
from runner.hub.bounded import bounded

FORBIDDEN = 403
DENIED = ("access denied", "forbidden", "unauthorized", "not authorized", "permission")
"""What GraphQL says to a key that has no access, or that may only read."""
MUTATION = """
mutation ($input: PodRentInterruptableInput!) {
  podRentInterruptable(input: $input) { id imageName machineId costPerHr machine { podHostId } }
}
"""


def rent_spot(wanted: PodRequest) -> str:
    """Ask once, as `Api.create_pod` does; the id of the pod, which is then read over REST."""
    import requests
    from runpod.api.graphql import run_graphql_query
    from runpod.error import AuthenticationError, QueryError

    try:
        variables = {"input": _input(wanted)}
        answer = bounded(lambda: run_graphql_query(MUTATION, api_key=api_key(), variables=variables), transport.TOTAL_S)
        if "data" not in answer and answer.get("status") == FORBIDDEN:
            raise WrongKeyError(account_key.no_graphql_problem(str(answer.get("detail"))))
        return str(answer["data"]["podRentInterruptable"]["id"])
    except AuthenticationError as error:
        raise WrongKeyError(account_key.wrong_key_problem(str(error))) from None
    except QueryError as error:
        said = str(error)
        if any(word in said.lower() for word in DENIED):
            raise WrongKeyError(account_key.no_graphql_problem(said)) from None
        if any(word in said.lower() for word in FULL):
            raise NoCapacityError(Problem(f"RunPod: {said}", None, "raise where.bid_usd, or leave spot out")) from None
        if any(word in said.lower() for word in POOR):
            raise NoBalanceError(account_key.no_balance_problem(said)) from None
        raise RefusedError(Problem(f"RunPod refuses the bid: {said}", None, "leave where.spot out")) from None
    except (requests.RequestException, OSError, KeyError, TypeError, ValueError, AttributeError):
        raise UnclearError(Problem("RunPod: the answer to a bid was lost", None, None)) from None


def _input(wanted: PodRequest) -> dict[str, object]:
    found: dict[str, Any] = {
        "name": wanted.name,
        "imageName": wanted.image,
        "templateId": wanted.template,
        "cloudType": wanted.cloud.upper(),
        "gpuTypeId": wanted.gpu_id,
        "gpuCount": wanted.gpu_count,
        "bidPerGpu": wanted.bid_usd,
        "containerDiskInGb": wanted.container_disk_gb,
        "volumeInGb": 0 if wanted.volume_id else wanted.volume_gb,
        "volumeMountPath": WORKSPACE,
        "networkVolumeId": wanted.volume_id,
        "dataCenterId": wanted.data_centers[0] if wanted.data_centers else None,
        "dockerArgs": wanted.args,
        "ports": ",".join(wanted.ports),
        "env": [{"key": key, "value": value} for key, value in wanted.env.items()],
        "startSsh": True,
        "allowedCudaVersions": json_types.allowed_cuda(wanted) or None,  # its input type has no minCudaVersion
    }
    return {key: value for key, value in found.items() if value is not None}


QUERY = "query { myself { clientBalance } }"
BALANCE_SECONDS = 10.0


def balance() -> float | None:
    """US$; None where RunPod does not say it, for whatever reason: no run waits for that."""
    from runpod.api.graphql import run_graphql_query

    try:
        answer = bounded(lambda: run_graphql_query(QUERY, api_key=api_key()), BALANCE_SECONDS)
        found = float(answer["data"]["myself"]["clientBalance"])
    except Exception:  # of the SDK, requests and json; a key that REST accepts may not be allowed here
        return None
    return found if math.isfinite(found) else None
