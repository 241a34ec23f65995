"""Renting over a `Provider`: ledger, lifecycle, budget, termination, transfer, session, and the agent in the pod."""
