"""The page for tests: its application over an empty working directory, and a browser's session with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runner.ui.guard import Access
from runner.ui.server import application

TOKEN = "the-token-of-the-printed-url"
ORIGIN = "http://127.0.0.1:8900"


@pytest.fixture
def access() -> Access:
    """Who may ask."""
    return Access(TOKEN, 8900)


@pytest.fixture
def stranger(here: Path, access: Access) -> Iterator[TestClient]:
    """Somebody who has no cookie; the working directory is empty."""
    with TestClient(application(access, Path("runs")), base_url=ORIGIN, follow_redirects=False) as client:
        yield client


@pytest.fixture
def page(stranger: TestClient) -> TestClient:
    """The page in a browser that has opened the printed URL."""
    answer = stranger.get("/", params={"token": TOKEN})
    assert answer.status_code == 303
    stranger.headers["origin"] = ORIGIN
    return stranger
