"""Arithmetic without files, clock or network: model shape, memory, time, cost, and the search over them."""
