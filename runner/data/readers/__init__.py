"""Rows from files, streams, URLs and the Hub."""
