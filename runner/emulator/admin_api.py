"""/_emulator: what has no counterpart at RunPod. Faults, the clock, and a look behind the curtain, without a key."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Response

from runner.emulator.answers import ApiProblem, Json
from runner.emulator.faults import KINDS, Fault
from runner.emulator.state import World


def router(world: World) -> APIRouter:
    """The routes."""
    api, engine = APIRouter(prefix="/_emulator"), world.engine

    @api.get("/faults")
    def faults() -> Json:
        return {"faults": world.faults.listed(), "kinds": KINDS}

    @api.post("/faults", status_code=201)
    def inject(body: Json) -> Json:
        try:
            fault = Fault(**{name: value for name, value in body.items() if name not in ("id", "used")})
        except (TypeError, ValueError) as error:
            raise ApiProblem(422, str(error)) from None
        return {"struck": world.inject(fault), **asdict(fault)}

    @api.delete("/faults", status_code=204)
    def clear() -> Response:
        world.faults.clear()
        world.clock.skew_s = 0.0
        return Response(status_code=204)

    @api.delete("/faults/{number}", status_code=204)
    def clear_one(number: int) -> Response:
        world.faults.clear(number)
        return Response(status_code=204)

    @api.post("/clock")
    def clock(body: Json) -> Json:
        """speed, advance_s, skew_s."""
        if "speed" in body:
            world.clock.set_speed(float(body["speed"]))
        world.clock.advance(float(body.get("advance_s", 0.0)))
        world.clock.skew_s = float(body.get("skew_s", world.clock.skew_s))
        return {"speed": world.clock.speed, "billed_s": world.clock.billed(), "skew_s": world.clock.skew_s}

    @api.post("/balance")
    def balance(body: Json) -> Json:
        """Set the total of the account's deposits; it may be less than what is billed already."""
        world.settings.balance_usd = float(body["usd"])
        return {"usd": world.settings.balance_usd, "billed_usd": world.billed()}

    @api.get("/pods")
    def pods() -> Json:
        """Dead and alive, with what each has cost."""
        with engine.lock:
            found = [*engine.past, *engine.pods.values()]
        names = ("id", "name", "status", "data_center", "restarts", "created")
        return {"pods": [{**{n: getattr(p, n) for n in names}, "gpu": p.gpu_id, "usd": p.usd()} for p in found]}

    @api.get("/exchanges")
    def exchanges() -> Json:
        return {"exchanges": [asdict(exchange) for exchange in list(world.exchanges)]}

    return api
