"""Pods: what is rented, what it has cost, when it ends; and its end. By the functions of `pods`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Body

from runner.cloud import fleet
from runner.cloud.ledger import Ledger
from runner.cloud.provider_errors import NoKeyError
from runner.cloud.providers import accounts, cloud_of, connect
from runner.errors import Problem, RequestError
from runner.ui.remedies import for_form
from runner.ui.safe_json import SafeJson


def router() -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api")

    @api.get("/pods")
    def pods() -> SafeJson:
        ledger, _ = Ledger.or_copy()
        try:
            rows = fleet.rows_of_all(accounts(), ledger)
        except NoKeyError as error:
            return SafeJson({"account": False, "pods": [], "problems": for_form(error)})
        return SafeJson({"account": True, "pods": [asdict(row) for row in rows], "problems": []})

    @api.post("/pods/{pod_id}/terminate")
    def terminate(pod_id: str, asked: dict[str, Any] = Body()) -> SafeJson:  # noqa: B008  # FastAPI's way
        if asked.get("confirmed") != pod_id:
            raise RequestError(Problem("terminating a pod is to be confirmed: data only on its disk is lost", "page"))
        ledger, _ = Ledger.or_copy()
        account = connect(cloud_of(pod_id, ledger.entries()))
        if pod_id not in {row.pod_id for row in fleet.pod_rows(account, ledger)}:
            raise RequestError(Problem(f"there is no pod {pod_id[:60]!r} of this project", "page"))
        return SafeJson({"ended": fleet.terminate(account, ledger, pod_id, "requested in the page")})

    return api
