"""Decisions on every open value of a request: hardware, place, plan, each `auto`."""
