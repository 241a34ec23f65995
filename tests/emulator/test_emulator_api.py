"""The emulated API beside its pods; the fixture holds every answer against RunPod's own description."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import requests
import runpod
from runpod.error import QueryError

from runner.emulator import contract
from tests.support.emulated import IMAGE, Emulator, needs_sshd, pod_body, rest, undescribed, until
from tests.support.openapi import FILE, answer_errors, document, request_errors


def raw(emulator: Emulator, method: str, path: str, **options: Any) -> requests.Response:
    """A request as any client makes it, with the account's key unless `headers` say otherwise."""
    options.setdefault("headers", {"Authorization": f"Bearer {emulator.key}"})
    return requests.request(method, emulator.url + path, timeout=10, **options)


def status_of(method: str, path: str, body: Any = None, params: Any = None) -> int | None:
    """The status that the SDK was refused with."""
    with pytest.raises(QueryError) as caught:
        rest(method, path, body, params)
    code: int | None = caught.value.status_code
    return code


def test_the_contract_is_what_runpods_description_gives() -> None:
    written = json.loads(contract.FILE.read_text("utf-8"))
    assert written == contract.reduced(document()), f"python -m runner.emulator.contract {FILE}"


def test_every_operation_is_answered(emulator: Emulator) -> None:
    """With something other than the framework's own 404 or 405, and with what is described."""
    for operation in contract.operations():
        path = operation.pattern.pattern.removesuffix("/?")
        for name in ("id", "workerId"):
            path = path.replace(f"(?P<{name}>[^/]+)", "none")
        answer = raw(emulator, operation.method, path, json={} if operation.body else None)
        assert answer.status_code in (200, 404, 422), (operation.name, answer.text)
        assert answer.status_code != 404 or "not found" in answer.json()["detail"]
        assert answer.json().get("detail") not in ("Not Found", "Method Not Allowed", "resource not found")


def test_the_validator_of_these_tests_finds_what_is_wrong() -> None:
    assert request_errors("POST", "/v2/pods", "", pod_body(bogus=1)) and not request_errors(
        "POST", "/v2/pods", "", pod_body()
    )
    assert request_errors("GET", "/v2/pods", "limit=3", None) == ["unknown query parameter limit"]
    assert request_errors("GET", "/v2/nothing", "", None) and request_errors("GET", "/v2/pods", "", {"a": 1})
    assert answer_errors("GET", "/v2/pods", 200, {"pods": [{}]}, "application/json")
    assert answer_errors("GET", "/v2/pods", 200, {"pods": []}, "text/html")
    assert answer_errors("GET", "/v2/pods", 201, {"pods": []}, "application/json")
    assert not answer_errors("GET", "/v2/pods", 200, {"pods": []}, "application/json")


def test_refusals_have_a_problem_for_a_body(emulator: Emulator) -> None:
    for headers, detail in (
        ({}, "missing bearer token"),
        ({"Authorization": "Basic x"}, "missing bearer token"),
        ({"Authorization": "Bearer wrong"}, "invalid api key"),
    ):
        answer = raw(emulator, "GET", "/v2/pods", headers=headers)
        assert (answer.status_code, answer.json()["detail"]) == (401, detail)
        assert answer.headers["Content-Type"] == "application/problem+json" and "RateLimit" not in answer.headers
    assert "RateLimit" in raw(emulator, "GET", "/v2/pods").headers
    assert raw(emulator, "GET", "/v2/pods/none").json() == {
        "title": "Not Found",
        "status": 404,
        "detail": "pod not found",
    }
    assert raw(emulator, "GET", "/v1/pods").status_code == 404
    assert raw(emulator, "PUT", "/v2/pods").status_code == 405
    assert raw(emulator, "POST", "/v2/pods", data="{nonsense").status_code == 400
    assert raw(emulator, "POST", "/v2/pods").json()["errors"] == ["$: a request body is required"]
    emulator.exchanges.clear()  # 405 and other versions are not described


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"bogus": 1}, "$: additional properties 'bogus' not allowed"),
        ({"gpu": {"id": "NVIDIA L4", "memory": 1}}, "$.gpu: additional properties 'memory' not allowed"),
        ({"disk": "10"}, "$.disk: '10' is not of type 'integer'"),
        ({"cloud": "ALL"}, "$.cloud: 'ALL' is not one of ['SECURE', 'COMMUNITY']"),
        (
            {"mounts": {"persistent": {"size": 5, "path": "/w"}}},
            "$.mounts.persistent.size: 5 is less than the minimum of 10",
        ),
        ({"env": {"A": 1}}, "$.env.A: 1 is not of type 'string'"),
    ],
)
def test_what_the_contract_refuses_is_a_422(emulator: Emulator, more: dict[str, Any], error: str) -> None:
    answer = raw(emulator, "POST", "/v2/pods", json=pod_body(**more) | more)
    assert answer.status_code == 422 and answer.json()["errors"] == [error]


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"cpu": {"id": "cpu3c", "vcpuCount": 2}}, 400),  # and a GPU
        ({"gpu": {"id": "NVIDIA RTX 9090"}}, 400),
        ({"gpu": {"id": "NVIDIA L4", "count": 64}}, 400),
        ({"gpu": {"id": "NVIDIA L4"}, "cloud": "COMMUNITY"}, 400),
        ({"gpu": {"id": "NVIDIA L4", "allowedCudaVersions": ["9.0"]}}, 400),
        ({"gpu": {"id": "NVIDIA L4", "allowedCudaVersions": ["12.8"], "minCudaVersion": "12.1"}}, 400),
        ({"dataCenterIds": ["XX-YY-1"]}, 400),
        ({"ports": ["22"]}, 400),
        ({"env": {f"V{n}": "" for n in range(51)}}, 400),
        ({"mounts": {"network": [{"volumeId": "none", "path": "/workspace"}]}}, 404),
        ({"templateId": "none"}, 404),
        ({"templateId": "runpod-vllm"}, 422),  # a serverless one
    ],
)
def test_what_no_schema_can_say_is_refused_too(emulator: Emulator, more: dict[str, Any], status: int) -> None:
    assert status_of("POST", "/v2/pods", pod_body() | more) == status
    assert emulator.pods() == {}


def test_lists_have_pages(emulator: Emulator) -> None:
    emulator.world.settings.page_size = 2
    made = [rest("POST", "/v2/pods", pod_body(name=str(n)))["id"] for n in range(5)]
    assert [pod["id"] for pod in runpod.get_pods()] == made[:2]  # the SDK's own reads the first page only
    found, params = [], {}
    while True:
        answer = rest("GET", "/v2/pods", params=params)
        found += [pod["id"] for pod in answer["pods"]]
        if not answer["pagination"]["hasNextPage"]:
            break
        params = {"cursor": answer["pagination"]["nextCursor"]}
    assert found == made
    assert status_of("GET", "/v2/pods", params={"cursor": "nonsense"}) == 400


def test_the_sdks_own_walk_over_pages_works(emulator: Emulator) -> None:
    import asyncio

    from runpod.api.rest import run_rest_paginated_request_async

    emulator.world.settings.page_size = 1
    for name in "abc":
        rest("POST", "/v2/network-volumes", {"name": name, "size": 10, "dataCenter": "EU-RO-1"})
    found = asyncio.run(run_rest_paginated_request_async("/v2/network-volumes", "networkVolumes"))
    assert [volume["name"] for volume in found] == ["a", "b", "c"]


def test_actions_depend_on_the_status(emulator: Emulator) -> None:
    emulator.world.settings.provision_s = 60.0
    pod = rest("POST", "/v2/pods", pod_body())
    path = f"/v2/pods/{pod['id']}/action"
    assert pod["actions"] == ["stop", "terminate"]
    assert status_of("POST", path, {"action": "restart"}) == status_of("POST", path, {"action": "start"}) == 409
    assert rest("POST", path, {"action": "stop"})["actions"] == ["start", "terminate"]
    assert status_of("POST", path, {"action": "stop"}) == 409
    assert status_of("POST", path, {"action": "explode"}) == 422
    assert rest("POST", path, {"action": "terminate"}) is None
    assert status_of("POST", path, {"action": "terminate"}) == 404


def test_a_pod_is_changed_within_its_limits(emulator: Emulator) -> None:
    pod = rest("POST", "/v2/pods", pod_body())
    path = f"/v2/pods/{pod['id']}"
    changed = rest("PATCH", path, {"name": "b", "env": {"X": "y"}, "locked": True, "ports": []})
    assert (changed["name"], changed["env"], changed["locked"], changed["ports"]) == ("b", {"X": "y"}, True, [])
    assert status_of("POST", f"{path}/action", {"action": "stop"}) == 409  # locked
    assert status_of("PATCH", path, {"mounts": {"persistent": {"size": 10, "path": "/w"}}}) == 400
    assert status_of("PATCH", path, {"cost": 0}) == 422


@needs_sshd
def test_logs_are_streamed_and_resumed(emulator: Emulator) -> None:
    words = "bash -c 'for n in 1 2 3 4 5; do echo line $n; sleep 0.1; done; sleep 60'"
    pod = rest("POST", "/v2/pods", pod_body(args=words))

    def read(count: int, **options: Any) -> list[tuple[str, dict[str, Any]]]:
        headers = {"Authorization": f"Bearer {emulator.key}", **options.pop("headers", {})}
        found: list[tuple[str, dict[str, Any]]] = []
        with raw(emulator, "GET", f"/v2/pods/{pod['id']}/logs", headers=headers, stream=True, **options) as stream:
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            lines = iter(stream.iter_lines(chunk_size=1, decode_unicode=True))
            while len(found) < count:
                event = next(lines).removeprefix("id: ")
                found.append((event, json.loads(next(lines).removeprefix("data: "))))
                assert next(lines) == ""
        return found

    first = read(5, params={"source": "container"})
    assert [data["line"] for _, data in first] == [f"line {n}" for n in range(1, 6)]
    rest_of = read(3, headers={"Last-Event-ID": first[1][0]}, params={"source": "container"})
    assert [data["line"] for _, data in rest_of] == ["line 3", "line 4", "line 5"]
    assert read(1, params={"tail": 1})[0][1]["line"] == "line 5"
    assert any("Pulling" in data["line"] for _, data in read(3, params={"source": "system"}))
    assert raw(emulator, "GET", f"/v2/pods/{pod['id']}/logs", params={"tail": 9999}).status_code == 422


@needs_sshd
def test_a_stream_of_logs_ends_with_the_pod(emulator: Emulator) -> None:
    pod = rest("POST", "/v2/pods", pod_body())
    done: list[int] = []

    def follow() -> None:
        with raw(emulator, "GET", f"/v2/pods/{pod['id']}/logs", stream=True) as stream:
            done.append(len(list(stream.iter_lines())))

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: emulator.pods()[pod["id"]].status == "RUNNING")
    rest("DELETE", f"/v2/pods/{pod['id']}")
    thread.join(10)
    assert done and done[0] > 0


def test_the_catalogue(emulator: Emulator) -> None:
    gpus = {gpu["id"]: gpu for gpu in runpod.get_gpus()}
    assert gpus["NVIDIA L4"]["memory"] == 24 and "availability" not in gpus["NVIDIA L4"]
    with_stock = rest(
        "GET", "/v2/catalog/gpus", params={"include": "AVAILABILITY", "product": "POD", "countryCodes": "SE"}
    )
    assert {center["id"] for gpu in with_stock["gpus"] for center in gpu["dataCenters"]} == {"EU-SE-1"}
    with pytest.raises(ValueError, match="No GPU found"):
        runpod.get_gpu("NVIDIA RTX 9090")
    assert runpod.get_gpu("NVIDIA L4", gpu_quantity=64)["availability"] == "NONE"
    for params in ({"include": "AVAILABILITY"}, {"product": "POD"}):
        assert status_of("GET", "/v2/catalog/gpus", params=params) == 400
    assert status_of("GET", "/v2/catalog/gpus", params={"include": "PRICES"}) == 422
    params = {
        "regions": "EUROPE",
        "networkVolumeTypes": "HIGH_PERFORMANCE",
        "include": "GPU_AVAILABILITY,CPU_AVAILABILITY",
    }
    (center,) = rest("GET", "/v2/catalog/datacenters", params=params)["dataCenters"]
    assert center["id"] == "EU-RO-1" and center["gpuAvailability"] and center["cpuAvailability"]
    assert rest("GET", "/v2/catalog/datacenters/US-TX-3")["region"] == "NORTH_AMERICA"
    assert rest("GET", "/v2/catalog/cpus/cpu3c")["ramGbPerVcpu"] == 2
    assert {t["id"] for t in rest("GET", "/v2/catalog/templates")["templates"]} == {"runpod-torch-v280", "runpod-vllm"}
    assert rest("GET", "/v2/catalog/templates", params={"source": "community"})["templates"] == []


def test_pods_of_cpus(emulator: Emulator) -> None:
    body = {k: v for k, v in pod_body().items() if k != "gpu"}
    pod = rest("POST", "/v2/pods", body | {"cpu": {"id": "cpu3g", "vcpuCount": 4}})
    assert pod["cpu"] == {"id": "cpu3g", "vcpuCount": 4, "memory": 16} and "gpu" not in pod
    assert pod["cost"] == pytest.approx(0.16)
    assert status_of("POST", "/v2/pods", body | {"cpu": {"id": "cpu3g", "vcpuCount": 6}}) == 400


def test_network_volumes_grow_and_go(emulator: Emulator) -> None:
    path = "/v2/network-volumes"
    volume = rest("POST", path, {"name": "v", "size": 20, "dataCenter": "EU-SE-1"})
    assert volume["type"] == "STANDARD"
    assert (
        status_of("POST", path, {"name": "v", "size": 20, "dataCenter": "EU-SE-1", "type": "HIGH_PERFORMANCE"}) == 400
    )
    assert status_of("POST", path, {"name": "v", "size": 20, "dataCenter": "XX"}) == 400
    assert status_of("PATCH", f"{path}/{volume['id']}", {"size": 10}) == 400
    assert rest("PATCH", f"{path}/{volume['id']}", {"size": 40, "name": "w"})["size"] == 40
    mount = {"network": [{"volumeId": volume["id"], "path": "/workspace"}]}
    assert status_of("POST", "/v2/pods", pod_body(mounts=mount, dataCenterIds=["US-TX-3"])) == 400
    assert status_of("POST", "/v2/pods", pod_body(mounts=mount, cloud="COMMUNITY")) == 400
    pod = rest("POST", "/v2/pods", pod_body(mounts=mount))
    assert status_of("DELETE", f"{path}/{volume['id']}") == 400  # in use
    rest("DELETE", f"/v2/pods/{pod['id']}")
    rest("DELETE", f"{path}/{volume['id']}")
    assert rest("GET", path)["networkVolumes"] == []


def test_network_volumes_are_buckets_too(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from botocore.exceptions import ClientError

    volume = rest("POST", "/v2/network-volumes", {"name": "v", "size": 20, "dataCenter": "EU-SE-1"})["id"]
    folder = emulator.world.root / "volumes" / volume
    (folder / "runs").mkdir()
    (folder / "runs" / "by-pod.txt").write_text("from the pod", "utf-8")
    for name, value in emulator.serve_s3().items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3", region_name="EU-SE-1")
    s3.put_object(Bucket=volume, Key="datasets/by-s3.txt", Body=b"from outside")
    assert (folder / "datasets" / "by-s3.txt").read_bytes() == b"from outside"
    listed = s3.list_objects_v2(Bucket=volume)["Contents"]
    assert {entry["Key"]: entry["Size"] for entry in listed} == {"runs/by-pod.txt": 12, "datasets/by-s3.txt": 12}
    (folder / "runs" / "by-pod.txt").write_text("changed by it", "utf-8")
    assert s3.get_object(Bucket=volume, Key="runs/by-pod.txt")["Body"].read() == b"changed by it"
    s3.delete_object(Bucket=volume, Key="datasets/by-s3.txt")
    assert not (folder / "datasets" / "by-s3.txt").exists()
    with pytest.raises(ClientError, match="NoSuchBucket"):
        s3.list_objects_v2(Bucket="of-nobody")
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        boto3.client("s3", region_name="EU-SE-1", aws_access_key_id="wrong", aws_secret_access_key="x").list_objects_v2(
            Bucket=volume
        )


def test_templates_are_a_pods_settings(emulator: Emulator) -> None:
    template = runpod.create_template(
        "mine", IMAGE, container_disk_in_gb=33, volume_in_gb=15, ports="22/tcp", env={"A": "1", "B": "2"}
    )
    body = {"name": "p", "gpu": {"id": "NVIDIA L4"}, "templateId": template["id"], "env": {"B": "3"}}
    pod = rest("POST", "/v2/pods", body)
    assert (pod["disk"], pod["ports"], pod["env"], pod["template"]) == (33, ["22/tcp"], {"A": "1", "B": "3"}, None)
    assert pod["mounts"] == {"persistent": {"size": 15, "path": "/workspace"}}
    path = f"/v2/templates/{template['id']}"
    assert rest("GET", path)["name"] == "mine"
    assert [t["id"] for t in rest("GET", "/v2/templates")["templates"]] == [template["id"]]
    assert status_of("POST", "/v2/templates", {"name": "mine", "image": "x"}) == 400
    assert status_of("DELETE", "/v2/templates/runpod-vllm") == 403  # RunPod's own
    rest("DELETE", path)
    assert status_of("GET", path) == 404


def test_serverless_endpoints_are_kept(emulator: Emulator) -> None:
    template = runpod.create_template(
        "worker", "runpod/worker-v1-vllm:v2.7.0", is_serverless=True, env={"MODEL_NAME": "m"}
    )
    endpoint = runpod.create_endpoint("e", template["id"], gpu_ids="ADA_24,AMPERE_24,-NVIDIA L4", workers_max=1)
    assert endpoint["gpu"]["excludedTypes"] == ["NVIDIA L4"] and endpoint["env"] == {"MODEL_NAME": "m"}
    assert endpoint["requestUrls"]["run"].endswith(f"/{endpoint['id']}/run")
    assert [e["id"] for e in runpod.get_endpoints()] == [endpoint["id"]]
    path = f"/v2/serverless/{endpoint['id']}"
    kept = rest("GET", path)
    assert kept["workers"]["max"] == 1 and kept["gpu"]["pools"] == ["ADA_24", "AMPERE_24"]
    assert status_of("DELETE", f"/v2/templates/{template['id']}") == 400  # in use
    scaling = {"type": "QUEUE_DELAY", "queueDelay": 4}
    bad = {"name": "e", "type": "QUEUE", "scaling": scaling, "image": "i"}
    assert status_of("POST", "/v2/serverless", bad) == 400  # neither gpu nor cpu
    assert status_of("POST", "/v2/serverless", bad | {"gpu": {"pools": ["NONE"]}}) == 400
    assert status_of("POST", "/v2/serverless", bad | {"gpu": {"pools": ["ADA_24"]}, "type": "LOAD_BALANCER"}) == 422
    rest("DELETE", path)
    assert runpod.get_endpoints() == []


def test_bills_add_up(emulator: Emulator) -> None:
    volume = rest("POST", "/v2/network-volumes", {"name": "v", "size": 100, "dataCenter": "EU-RO-1"})
    pods = [rest("POST", "/v2/pods", pod_body(name=name)) for name in "ab"]
    until(lambda: all(pod.segments for pod in emulator.pods().values()))
    emulator.clock.advance(2 * 3600)
    runpod.terminate_pod(pods[0]["id"])
    window = {"bucketSize": "hour", "lastN": 100}
    record = rest("GET", "/v2/billing/pods", params={**window, "podId": pods[0]["id"]})
    assert record["metadata"]["totals"]["gpuAmount"] == pytest.approx(2 * 0.49, abs=0.01)
    assert record["metadata"]["totals"]["totalAmount"] == pytest.approx(emulator.billed(pods[0]["id"]), abs=1e-4)
    both = rest("GET", "/v2/billing/pods", params=window)
    assert both["metadata"]["uniquePodCount"] == 2 and both["metadata"]["recordCount"] == len(both["records"]) >= 4
    stored = emulator.billed() - sum(emulator.billed(pod["id"]) for pod in pods)
    assert volume["size"] == 100 and stored == pytest.approx(2 * 100 * 0.07 / 730, abs=0.001)
    assert status_of("GET", "/v2/billing/pods", params={"lastN": 3, "startTime": "2026-01-01T00:00:00Z"}) == 400
    assert status_of("GET", "/v2/billing/pods", params={"bucketSize": "minute"}) == 422


def test_what_nothing_here_asks_for_is_not_served(emulator: Emulator) -> None:
    for path in ("/v2/clusters", "/v2/registries", "/v2/billing", "/v2/billing/endpoints"):
        assert raw(emulator, "GET", path).status_code == 404


def test_spot_by_graphql(emulator: Emulator) -> None:
    from runpod.api.graphql import run_graphql_query

    query = "mutation Rent($input: PodRentInterruptableInput!) { podRentInterruptable(input: $input) { id costPerHr } }"
    asked = {
        "name": "spot", "imageName": IMAGE, "gpuTypeId": "NVIDIA GeForce RTX 4090", "gpuCount": 2, "bidPerGpu": 0.25,
        "cloudType": "COMMUNITY", "ports": "22/tcp", "volumeInGb": 20, "env": [{"key": "A", "value": "b"}],
    }  # fmt: skip
    rented = run_graphql_query(query, variables={"input": asked})["data"]["podRentInterruptable"]
    pod = runpod.get_pod(rented["id"])
    assert pod["cost"] == rented["costPerHr"] == 0.5 and pod["env"] == {"A": "b"} and pod["cloud"] == "COMMUNITY"
    with pytest.raises(QueryError, match="instances available"):
        run_graphql_query(query, variables={"input": {**asked, "bidPerGpu": 0.01}})
    assert runpod.get_user()["id"] == "user_emulated"


def test_what_is_not_described_would_be_found(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    rest("GET", "/v2/account/ssh-keys")
    emulator.world.ssh_keys = None
    rest("GET", "/v2/account/ssh-keys")
    assert undescribed(emulator) == ["GET /v2/account/ssh-keys → 200: $.keys: None is not of type 'array'"]
    emulator.exchanges.clear()
