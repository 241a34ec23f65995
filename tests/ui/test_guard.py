"""The page answers nobody but the browser that was given its token, and reads nothing outside the working directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runner.ui.guard import LARGEST_UPLOAD, POLICY, Access
from runner.ui.safe_json import HIDDEN, without_secrets
from tests.ui.conftest import ORIGIN, TOKEN

PATHS = ("/", "/api/catalogue", "/api/runs", "/static/main.js", "/vendor/htm/preact-standalone.module.js", "/nothing")


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_answered(stranger: TestClient, path: str) -> None:
    assert stranger.get(path).status_code == 401
    assert stranger.get(path, headers={"cookie": "runner_ui_8900=guessed"}).status_code == 401
    assert stranger.get("/", params={"token": "wrong"}).status_code == 401


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_can_use(stranger: TestClient) -> None:
    answer = stranger.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert stranger.get("/").status_code == 200


def test_another_host_is_refused_as_dns_rebinding_would_send_it(page: TestClient) -> None:
    for host in ("evil.example", "evil.example:8900", "127.0.0.1.evil.example", "", "10.0.0.1:8900"):
        assert page.get("/api/runs", headers={"host": host}).status_code == 421, host
    for host in ("localhost:9000", "127.0.0.1:8900", "[::1]:8900"):  # a tunnel has another port
        assert page.get("/api/runs", headers={"host": host, "origin": f"http://{host}"}).status_code == 200, host


def test_open_to_the_network_it_is_known_by_addresses_and_its_own_names() -> None:
    access = Access(TOKEN, 8900, "0.0.0.0", ("box", "box.lan"))
    assert all(map(access.knows_host, ("192.168.1.7:8900", "[fe80::1]:8900", "box:8900", "BOX.lan", "localhost:1")))
    assert not any(map(access.knows_host, ("evil.example", "box.evil.example:8900", "")))


def test_a_foreign_origin_changes_and_reads_nothing(page: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1"):
        assert page.post("/api/check", json={}, headers={"origin": origin}).status_code == 403, origin
        assert page.get("/api/runs", headers={"origin": origin}).status_code == 403, origin
    del page.headers["origin"]
    assert page.post("/api/check", json={}).status_code == 403
    assert page.get("/api/runs", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_every_answer_forbids_inline_scripts_and_frames(page: TestClient) -> None:
    for path in PATHS:
        headers = page.get(path).headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    assert "unsafe" not in POLICY and "frame-ancestors 'none'" in POLICY


def test_a_large_request_is_refused_before_it_is_read(page: TestClient) -> None:
    answer = page.post("/api/upload", content=b"x", headers={"content-length": str(1 << 30)})
    assert answer.status_code == 413 and f"{LARGEST_UPLOAD >> 20} MiB" in answer.text

    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b"x" * (1 << 20)

    assert page.post("/api/check", content=body()).status_code == 413  # no length is stated


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.jsonl", "~/.ssh/id_rsa", "a/../../x.jsonl", "[/etc/passwd]"]
)
def test_a_path_outside_the_working_directory_is_refused(page: TestClient, path: str) -> None:
    found = page.post("/api/check", json={"values": {"data.path": path}}).json()
    assert found["plan"] is None
    assert any("outside the working directory" in problem["what"] for problem in found["problems"])
    assert page.post("/api/runs", json={"values": {"data.path": path}}).status_code == 400


def test_a_link_out_of_the_working_directory_is_a_path_outside(page: TestClient, here: Path) -> None:
    secret = here.parent / "outside.jsonl"
    secret.write_text('{"prompt": "a", "completion": "b"}\n')
    (here / "link.jsonl").symlink_to(secret)
    found = page.post("/api/check", json={"values": {"data.path": "link.jsonl"}}).json()
    assert found["plan"] is None and "outside the working directory" in found["problems"][0]["what"]
    assert page.post("/api/recipe", json={"values": {"data.path": "link.jsonl"}}).status_code == 400


@pytest.mark.parametrize("name", ["..", "..%2f..%2fetc", "%2e%2e", "a%00b", ".trash%2fx"])
def test_an_id_of_a_run_is_a_name_and_no_path(page: TestClient, name: str) -> None:
    for path in (f"/api/runs/{name}", f"/api/runs/{name}/events"):
        assert page.get(path).status_code in (400, 404)
    assert page.get("/static/../server.py").status_code == 404
    assert page.get("/static/%2e%2e/server.py").status_code == 404


def test_no_secret_of_the_environment_reaches_the_browser(
    page: TestClient, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = 'hf_Zq"9\\secret-of-the-environment'
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_0123456789ABCDEF")
    run = here / "runs" / "one"
    (run / "logs").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "done", "error": f"bad key {secret}", "model": secret}))
    (run / "logs" / "run.log").write_text(f"said {secret} and rpa_0123456789ABCDEF\n")
    (run / "training.yaml").write_text(f"token: rpa_0123456789ABCDEF\nother: {secret}\n")
    read = {"values": {"run.name": "${oc.env:HF_TOKEN}"}}
    answers = [
        page.get("/api/runs"), page.get("/api/runs/one"), page.get("/api/runs/one/events"), page.get("/api/catalogue"),
        page.get("/api/runs/one/report"),
        page.post("/api/check", json=read), page.post("/api/recipe", json=read), page.post("/api/fit", json=read),
        page.post("/api/runs", json=read),
    ]  # fmt: skip
    for answer in answers:
        assert "rpa_0123456789ABCDEF" not in answer.text and "secret-of-the-environment" not in answer.text
    assert HIDDEN in answers[2].text
    assert without_secrets("a rpa_0123456789ABCDEF b") == f"a {HIDDEN} b"


def test_markup_from_a_run_is_sent_as_data_and_never_as_a_page(page: TestClient, here: Path) -> None:
    markup = "<script>alert(1)</script>"
    run = here / "runs" / "one"
    (run / "logs").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "done", "model": markup, "error": markup}))
    (run / "logs" / "run.log").write_text(markup + "\n")
    (run / "spec.json").write_text("{}")
    report = page.get("/api/runs/one/report")
    assert report.status_code == 200 and markup not in report.text
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    for path in ("/api/runs", "/api/runs/one", "/api/runs/one/events"):
        answer = page.get(path)
        assert markup in answer.text and not answer.headers["content-type"].startswith("text/html")
    static = Path(__file__).parents[2] / "runner" / "ui" / "static"
    for file in static.glob("*.js"):
        text = file.read_text("utf-8")
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("))
    assert ORIGIN.startswith("http://127.0.0.1")
