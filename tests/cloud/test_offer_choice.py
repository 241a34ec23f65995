"""Which machines are asked for, against a catalogue in memory: each price, limit, place and word of a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from runner.cloud.provider import Offer
from runner.cloud.runpod import offers
from runner.cloud.runpod.json_types import CpuType, DataCenter, GpuType, Volume
from runner.cloud.runpod.offers import candidates, cpu_candidates, find_template, gpus_there, volume_of, wanted_gpus
from runner.errors import RunnerError
from tests.cloud.test_offers import A100, GPUS, H100, gpu
from tests.support.rented import A6000, PLAN, RTX4090, rented_spec, state

__all__ = ["state"]
pytestmark = pytest.mark.usefixtures("state")
EU = Volume("v1", "data", 100, "EU-RO-1", "STANDARD")
US = Volume("v2", "more", 100, "US-KS-2", "STANDARD")
KNOWN = {one.id: one for one in GPUS}


class Catalogue:
    """RunPod's, with two GPU types in five data centres, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.there = {RTX4090: ["EU-RO-1", "US-KS-2", "US-TX-3"], A6000: ["EUR-IS-1", "CA-MTL-3"]}
        self.listed: list[Volume] = []
        self.own: list[dict[str, Any]] = []
        self.public: dict[str, list[dict[str, Any]]] = {"official": [], "verified": [], "community": []}

    def gpus(
        self, *, count: int = 1, cloud: str | None = None, stock: bool = False, countries: Sequence[str] = ()
    ) -> list[GpuType]:
        self.asked.append({"count": count, "cloud": cloud, "stock": stock, "countries": list(countries)})
        if not stock and not countries:
            return GPUS
        return [
            replace(
                KNOWN[i],
                data_centers={c: "LOW" for c in at if not countries or offers._country(self._center(c)) in countries},
            )
            for i, at in self.there.items()
            if count <= (2 if i == RTX4090 else 1)
        ]

    @staticmethod
    def _center(center: str) -> DataCenter:
        return DataCenter(center, center, "", ())

    def data_centers(self) -> list[DataCenter]:
        return [self._center(one) for at in self.there.values() for one in at]

    def cpus(self) -> list[CpuType]:
        return [CpuType("cpu3c", "Compute", 2, 32, 0.03, 2.0), CpuType("cpu5c", "Compute", 4, 16, 0.05, 2.0)]

    def volumes(self) -> list[Volume]:
        return self.listed

    def templates(self) -> list[dict[str, Any]]:
        return self.own

    def public_templates(self, source: str) -> list[dict[str, Any]]:
        return self.public[source]

    def template(self, template_id: str) -> dict[str, Any] | None:
        every = [*self.own, *(one for found in self.public.values() for one in found)]
        return next((one for one in every if one["id"] == template_id), None)


@pytest.fixture
def api() -> Any:
    return Catalogue()


def refusal(call: Callable[[], object]) -> tuple[int, str, str | None, str | None]:
    with pytest.raises(RunnerError) as error:
        call()
    (problem,) = error.value.problems
    return error.value.exit_code, problem.what, problem.source, problem.remedy


# ── GPUs ───────────────────────────────────────────────────────────────────────────────────────


def test_an_offer_is_for_all_gpus_of_the_run_in_its_cloud() -> None:
    for words, expected in (
        ((), Offer("secure", 0.74, RTX4090, 1)),
        (("where.cloud=community",), Offer("community", 0.34, RTX4090, 1)),
        (("hw.num_gpus=3", "where.max_usd=9"), Offer("secure", pytest.approx(2.22), RTX4090, 3)),  # type: ignore[arg-type]  # approx
        (("where.spot=true", "where.bid_usd=0.2", "hw.num_gpus=2"), Offer("secure", 0.4, RTX4090, 2)),
    ):
        assert candidates(rented_spec(*words), PLAN, GPUS, None)[0] == expected


def test_a_bid_needs_no_price_and_an_offer_does() -> None:
    free = [replace(KNOWN[RTX4090], secure_usd=None)]
    bid = rented_spec("where.spot=true", "where.bid_usd=0.2")
    assert [one.usd_per_hour for one in candidates(bid, PLAN, free, None)] == [0.2]
    assert refusal(lambda: candidates(rented_spec(), PLAN, free, None)) == (
        3, f"{RTX4090} is not in the secure cloud", "where=runpod",
        "take other GPUs or the other cloud (where.gpu_types, where.cloud): python -m runner gpus",
    )  # fmt: skip


def test_what_one_gpu_type_is_refused_for_does_not_hide_the_next() -> None:
    types = [replace(KNOWN[RTX4090], secure_usd=None), KNOWN[A6000]]
    assert [one.gpu_id for one in candidates(rented_spec(), PLAN, types, None)] == [A6000]
    one, two = (replace(KNOWN[i], max_secure=n) for i, n in ((RTX4090, 1), (A6000, 2)))
    spec = rented_spec("hw.num_gpus=2", "where.max_usd=9")
    assert [offer.gpu_id for offer in candidates(spec, PLAN, [one, two], None)] == [A6000]
    code, what, _, _ = refusal(lambda: candidates(spec, PLAN, [one, replace(two, max_secure=1)], None))
    assert code == 3 and what == "; ".join(
        f"a pod has at most 1 × {gpu_id} in the secure cloud" for gpu_id in (RTX4090, A6000)
    )
    unlimited = replace(one, max_secure=0)  # RunPod does not say
    assert candidates(spec, PLAN, [unlimited], None)[0].gpu_count == 2


def test_a_price_over_the_cap_is_refused_for_the_plans_hours_too() -> None:
    spec = rented_spec("where.max_usd=1")
    assert [one.gpu_id for one in candidates(spec, {**PLAN, "hours": 1.35}, GPUS, None)] == [RTX4090, A6000]
    assert [one.gpu_id for one in candidates(spec, {**PLAN, "hours": 1.36}, GPUS, None)] == [A6000]  # $1.01
    _, what, _, remedy = refusal(lambda: candidates(spec, {**PLAN, "hours": 9.0}, GPUS, None))
    assert what.startswith(f"{RTX4090}: $0.74 an hour for 9.00 hours is more than where.max_usd=1; {A6000}: $0.49")
    assert remedy == "raise where.max_usd, or take cheaper hardware: python -m runner gpus"


def test_a_machine_that_was_named_may_cost_more_than_the_plan_and_a_stand_in_half_more() -> None:
    cheap = {**PLAN, "usd_per_hour": 0.1}
    assert [one.gpu_id for one in candidates(rented_spec(), cheap, GPUS, None)] == [RTX4090]  # of `hw`
    named = rented_spec(f"where.gpu_types=[{A6000}]")
    assert [one.gpu_id for one in candidates(named, cheap, GPUS, None)] == [A6000]
    for planned, taken in ((0.49 / 1.5 + 1e-6, True), (0.49 / 1.5 - 1e-6, False)):
        found = candidates(rented_spec(), {**PLAN, "usd_per_hour": planned}, GPUS, None)
        assert (A6000 in [one.gpu_id for one in found]) is taken


def test_stand_ins_have_the_memory_of_what_they_stand_in_for() -> None:
    assert wanted_gpus(rented_spec(), KNOWN) == [RTX4090, A6000, A100]
    assert wanted_gpus(rented_spec(), {RTX4090: KNOWN[RTX4090], A100: KNOWN[A100]}) == [RTX4090, A100]
    more = {**KNOWN, A6000: gpu(A6000, 23, 0.49)}
    assert wanted_gpus(rented_spec(), more) == [RTX4090, A100]
    assert wanted_gpus(rented_spec(), {**KNOWN, A6000: gpu(A6000, 24, 0.49)}) == [RTX4090, A6000, A100]
    assert wanted_gpus(rented_spec(f"where.gpu_types=[{H100},{RTX4090}]"), KNOWN) == [H100, RTX4090]


def test_gpus_that_runpod_does_not_have_are_told_each_with_the_nearest() -> None:
    with pytest.raises(RunnerError) as error:
        wanted_gpus(rented_spec("where.gpu_types=[NVIDIA RTX 4090,NVIDIA RTX A600,quantum]"), KNOWN)
    assert [(p.what, p.source, p.remedy) for p in error.value.problems] == [
        ("RunPod has no GPU 'NVIDIA RTX 4090'", "where.gpu_types", f"did you mean {RTX4090!r}?"),
        ("RunPod has no GPU 'NVIDIA RTX A600'", "where.gpu_types", f"did you mean {A6000!r}?"),
        ("RunPod has no GPU 'quantum'", "where.gpu_types", "python -m runner gpus lists RunPod's ids"),
    ]
    for named, meant in (("NVIDIA GeForce A600", A6000), ("nvidia geforce rtx 4090", RTX4090)):  # by name, and by id
        said = refusal(lambda named=named: wanted_gpus(rented_spec(f"where.gpu_types=[{named}]"), KNOWN))
        assert said == (2, f"RunPod has no GPU {named!r}", "where.gpu_types", f"did you mean {meant!r}?")
    assert refusal(lambda: wanted_gpus(rented_spec(), {A100: KNOWN[A100]})) == (
        2, f"RunPod has no GPU {RTX4090!r}", "hw=rtx4090", "python -m runner gpus lists RunPod's ids"
    )  # fmt: skip
    code, what, source, remedy = refusal(lambda: wanted_gpus(rented_spec("hw=t4"), KNOWN))
    assert (code, what, source) == (2, "hw=t4: RunPod has no such GPU that this project knows", "where=runpod")
    assert remedy == 'name some: where.gpu_types=["NVIDIA GeForce RTX 4090"]; python -m runner gpus lists them'


# ── CPUs ───────────────────────────────────────────────────────────────────────────────────────


def test_a_cpu_pod_costs_by_its_cores(api: Any) -> None:
    for cores, got, usd in ((None, 2, 0.06), (3, 4, 0.12), (99, 32, 0.96)):
        words = () if cores is None else (f"hw.num_cpus={cores}",)
        (found,) = cpu_candidates(rented_spec("hw=cpu", "hw.num_cpus=null", *words), api.cpus(), None)
        assert found == Offer("secure", pytest.approx(usd), cpu_id="cpu3c", num_vcpus=got)  # type: ignore[arg-type]  # approx
    (found,) = cpu_candidates(rented_spec("hw=cpu", "hw.num_cpus=1", "where.cpu_type=cpu5c"), api.cpus(), US, ["X"])
    assert (found.num_vcpus, found.data_centers) == (4, ("US-KS-2",))
    capped = rented_spec("hw=cpu", "hw.num_cpus=99", "where.max_usd=0.95")
    assert refusal(lambda: cpu_candidates(capped, api.cpus(), None)) == (
        3, "cpu3c: the first hour costs $0.96, more than where.max_usd=0.95", "where.max_usd",
        "raise where.max_usd, or take cheaper hardware: python -m runner gpus",
    )  # fmt: skip


@pytest.mark.parametrize(("named", "remedy"), [("cpu3", "did you mean cpu3c?"), ("x", "one of cpu3c, cpu5c")])
def test_a_flavour_that_runpod_does_not_have(api: Any, named: str, remedy: str) -> None:
    spec = rented_spec("hw=cpu", f"where.cpu_type={named}")
    expected = (2, f"RunPod has no CPU flavour {named}", "where.cpu_type", remedy)
    assert refusal(lambda: cpu_candidates(spec, api.cpus(), None)) == expected


# ── places ─────────────────────────────────────────────────────────────────────────────────────

ONE = f"where.gpu_types=[{RTX4090}]"


def places(api: Any, *words: str) -> list[tuple[str, ...]]:
    return [one.data_centers for one in offers.offers(api, rented_spec(ONE, *words), PLAN)]


def test_where_a_machine_may_be(api: Any) -> None:
    api.listed = [EU, US]
    assert places(api) == [()]
    assert places(api, "where.data_centers=[US-TX-3,EU-RO-1]") == [("US-TX-3",), ("EU-RO-1",)]
    assert places(api, "where.volume=data") == [("EU-RO-1",)]
    assert places(api, "where.data_centers=[US-TX-3,EU-RO-1]", "where.volume=v1") == [("EU-RO-1",)]
    assert places(api, "where.country=[RO,US]") == [("EU-RO-1", "US-KS-2", "US-TX-3")]
    assert places(api, "where.country=[RO,US]", "where.data_centers=[US-TX-3]") == [("US-TX-3",)]
    assert places(api, "where.country=US", "where.volume=more") == [("US-KS-2",)]
    bid = ("where.spot=true", "where.bid_usd=0.5")
    assert places(api, *bid) == [()] and places(api, *bid, "where.country=US") == [("US-KS-2",), ("US-TX-3",)]
    api.asked.clear()
    places(api, "where.country=US", "where.cloud=community", "hw.num_gpus=2")
    assert {"count": 2, "cloud": "community", "stock": False, "countries": ["US"]} in api.asked
    assert {"count": 1, "cloud": "community", "stock": False, "countries": ["US"]} in api.asked


def test_a_cpu_pod_is_where_it_may_be(api: Any) -> None:
    assert [one.data_centers for one in offers.offers(api, rented_spec("hw=cpu"), PLAN)] == [()]
    there = offers.offers(api, rented_spec("hw=cpu", "where.country=US"), PLAN)
    assert [(one.cpu_id, one.data_centers) for one in there] == [("cpu3c", ("US-KS-2", "US-TX-3"))]
    api.listed = [US]
    (kept,) = offers.offers(api, rented_spec("hw=cpu", "where.country=US", "where.volume=more"), PLAN)
    assert (kept.data_centers, kept.volume_id) == (("US-KS-2",), "v2")
    named = offers.offers(api, rented_spec("hw=cpu", ONE), PLAN)
    assert [(one.gpu_id, one.gpu_count) for one in named] == [(RTX4090, 1)]


def test_an_offer_has_an_image_or_a_template_and_its_volume(api: Any) -> None:
    api.listed, api.own = [EU], [{"id": "t1", "name": "mine"}]
    plain, *_ = offers.offers(api, rented_spec("where.image=my/own:1"), PLAN)
    assert (plain.image, plain.template, plain.volume_id) == ("my/own:1", None, None)
    made, *_ = offers.offers(api, rented_spec("where.template=mine", "where.volume=v1"), PLAN)
    assert (made.image, made.template, made.volume_id) == (None, "t1", "v1")


def test_places_that_have_no_such_machine(api: Any) -> None:
    assert refusal(lambda: places(api, "where.country=[IS,CA]")) == (
        3, f"no data centre in IS or CA has 1 × {RTX4090}", "where=runpod",
        "take what is there (hw=…, where.gpu_types), or another country: python -m runner gpus "
        "--country IS --country CA",
    )  # fmt: skip
    assert refusal(lambda: places(api, "where.country=[US,DE]")) == (
        2, "RunPod has no GPU in DE in its secure cloud", "where.country=[US,DE]",
        "it has data centres in CA, IS, RO, US",
    )  # fmt: skip
    what, source = refusal(lambda: offers.centers_in(api, "DE", None, "--country"))[1:3]
    assert (what, source) == ("RunPod has no GPU in DE", "--country")
    assert offers.centers_in(api, "US", None, "") == ["US-KS-2", "US-TX-3"]
    assert refusal(lambda: places(api, "where.country=US", "where.data_centers=[EU-RO-1,US-TX-3,CA-MTL-3]")) == (
        2, "EU-RO-1, CA-MTL-3: not in US, where RunPod has US-KS-2, US-TX-3", "where.data_centers",
        "leave out where.data_centers, or where.country",
    )  # fmt: skip
    api.listed = [EU]
    assert refusal(lambda: places(api, "where.country=[US,CA]", "where.volume=data")) == (
        2, "network volume data is in EU-RO-1, which is not in US or CA", "where.country=[US,CA]",
        "leave out where.country: the pod is where its volume is",
    )  # fmt: skip


def test_a_data_centre_is_known_by_its_id(api: Any) -> None:
    for named, remedy in (
        ("EU-RO-9", "did you mean EU-RO-1?"),
        ("moon", "one of CA-MTL-3, EU-RO-1, EUR-IS-1, US-KS-2, US-TX-3"),
    ):
        expected = (2, f"RunPod has no data centre {named}", "where.data_centers", remedy)
        assert refusal(lambda: places(api, f"where.data_centers=[US-KS-2,{named}]")) == expected  # noqa: B023  # called at once
    countries = {"EU-RO-1": "RO", "EUR-IS-1": "IS", "US-KS-2": "US", "SEA-SG-1": "SG", "AP-JP-1": "JP", "OC-AU-1": "AU"}
    assert {one: offers._country(DataCenter(one, "", "", ())) for one in countries} == countries


def test_a_volume_is_named_by_its_id_or_its_name(api: Any) -> None:
    api.listed = [EU, US, replace(US, id="v3"), replace(EU, id="data", name="odd")]

    def found(*words: str) -> Volume | None:
        return volume_of(api, rented_spec(*words))

    assert found() is None and found("where.volume=v2") == US
    assert found("where.volume=data") == api.listed[3]  # an id before a name
    assert refusal(lambda: found("where.volume=more")) == (
        2, "2 network volumes have that name", "where.volume=more", "name one by its id: v2 (US-KS-2) or v3 (US-KS-2)",
    )  # fmt: skip
    assert refusal(lambda: found("where.volume=v2", "where.data_centers=[EU-RO-1]")) == (
        2, "network volume more is in US-KS-2, and a pod elsewhere cannot have it", "where.data_centers",
        "write where.data_centers=[US-KS-2]",
    )  # fmt: skip
    assert found("where.volume=v2", "where.data_centers=[EU-RO-1,US-KS-2]") == US
    for listed, has in (([EU, US], "data (v1, EU-RO-1), more (v2, US-KS-2)"), ([], "there is none yet")):
        api.listed = listed
        remedy = f"python -m runner volumes create NAME --size 100 --data-center EU-RO-1; this account has: {has}"
        expected = (2, "there is no network volume x", "where.volume=x", remedy)
        assert refusal(lambda: found("where.volume=x")) == expected


def test_which_gpus_a_place_has(api: Any) -> None:
    api.listed = [EU]

    def there(*words: str, counts: tuple[int, ...] = (1, 2, 1)) -> Any:
        api.asked.clear()
        return gpus_there(api, rented_spec(*words), counts)

    assert there() is None and api.asked == []
    assert there("where.country=[US,IS]") == ("US or IS", {1: {RTX4090, A6000}, 2: {RTX4090}})
    assert [one for one in api.asked if one["stock"]] == [
        {"count": count, "cloud": "secure", "stock": True, "countries": ["US", "IS"]} for count in (1, 2)
    ]
    both = {1: {RTX4090, A6000}, 2: {RTX4090}}
    assert there("where.data_centers=[CA-MTL-3,US-KS-2]") == ("CA-MTL-3 or US-KS-2", both)
    assert api.asked[0] == {"count": 1, "cloud": "secure", "stock": True, "countries": []}
    assert there("where.volume=data", counts=(1,)) == ("EU-RO-1", {1: {RTX4090}})
    assert there("where.country=IS", "where.data_centers=[EUR-IS-1]", counts=(2,)) == ("IS", {2: set()})


# ── templates ──────────────────────────────────────────────────────────────────────────────────


def template(template_id: str, name: str, **facts: Any) -> dict[str, Any]:
    return {"id": template_id, "name": name, "image": "org/image", "category": None, **facts}


def test_templates_are_searched_by_all_words_the_accounts_own_first(api: Any) -> None:
    api.own = [template("t1", "Mine"), template("t2", "Served", serverless=True)]
    api.public["official"] = [template("t3", "PyTorch 2.8", image="runpod/pytorch"), template("t1", "Again")]
    api.public["community"] = [template("t4", "torch for all", category="NVIDIA")]
    rows = offers.search_templates(api)
    assert [(row["id"], row["name"], row["source"]) for row in rows] == [
        ("t1", "Mine", "own"), ("t3", "PyTorch 2.8", "official"), ("t4", "torch for all", "community"),
    ]  # fmt: skip
    assert rows[2] == {
        "id": "t4", "name": "torch for all", "image": "org/image", "category": "NVIDIA", "source": "community",
    }  # fmt: skip
    assert rows[0]["category"] == ""
    for text, found in (("TORCH", ["t3", "t4"]), ("torch org", ["t4"]), ("T3", ["t3"]), ("torch x", [])):
        assert [row["id"] for row in offers.search_templates(api, text)] == found


def test_a_template_is_found_by_its_id_or_its_whole_name(api: Any) -> None:
    api.own = [template("t1", "Mine"), template("t2", "Served", serverless=True), template("t5", "Twice")]
    api.public["verified"] = [template("t6", "twice"), template("t7", "PyTorch 2.8")]
    assert find_template(api, "t1") == find_template(api, "mine") == "t1" and find_template(api, "t7") == "t7"
    assert refusal(lambda: find_template(api, "t2")) == (
        2, "template t2 (Served) is for serverless workers, and no pod can be made of it", "where.template=t2",
        "python -m runner pods templates lists those for pods",
    )  # fmt: skip
    assert refusal(lambda: find_template(api, "TWICE")) == (
        2, "2 templates have the name TWICE", "where.template=TWICE", "name one by its id: t5 or t6",
    )  # fmt: skip
    for word, remedy in (
        ("pytorch 2.9", "did you mean t7?"), ("zzz", "python -m runner pods templates TEXT searches them"),
    ):  # fmt: skip
        expected = (2, f"RunPod has no template {word} that this key may use", f"where.template={word}", remedy)
        assert refusal(lambda: find_template(api, word)) == expected  # noqa: B023  # called at once
