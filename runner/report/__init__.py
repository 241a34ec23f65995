"""Output for people: tables, bars, plots, error texts, and lines that survive a closed terminal."""
