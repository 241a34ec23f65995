"""Output for users: tables, bars, plots, error messages, and output that survives a closed terminal."""
