"""RunPod as a `Provider`: `api.py` with the choice of machines, the start command and the pages that people need."""

from __future__ import annotations

from typing import Any

from runner.cloud.agent import agent
from runner.cloud.provider import Offer, Provider
from runner.cloud.runpod import graphql, offers, start_command
from runner.cloud.runpod.account import BILLING_PAGE, CONSOLE, KEY, api_key
from runner.cloud.runpod.api import Api
from runner.spec import RunSpec


class RunPod(Api):
    """One account of RunPod. NoKeyError without RUNPOD_API_KEY; RUNPOD_API_BASE_URL names another address."""

    title = "RunPod"
    calls = agent.CALLS
    key_variable = KEY
    billing_page = BILLING_PAGE

    @property
    def secret(self) -> str:
        """The API key."""
        return api_key()

    def offers(self, spec: RunSpec, plan: dict[str, Any]) -> list[Offer]:
        """GPU types, data centres and the network volume of `where`, held against the catalogue."""
        return offers.offers(self, spec, plan)

    def start_command(self, run_id: str, minutes: float) -> str:
        """The watch of `start_command.py`, then the image's own start command."""
        return start_command.as_text(run_id, minutes)

    def balance(self) -> float | None:
        """Through GraphQL."""
        return graphql.balance()

    def page(self, pod_id: str | None = None) -> str:
        """In RunPod's console."""
        return f"{CONSOLE}/pods" + (f"?id={pod_id}" if pod_id else "")


_: type[Provider] = RunPod  # held by mypy: providers.py names it as text
