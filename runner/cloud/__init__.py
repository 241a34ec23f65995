"""Renting, whoever rents out: ledger, lifecycle, termination, transfer, session, and the agent in the pod."""
