"""The web page: a run is composed, planned, started and watched in a browser (docs/ui.md). Extra `ui`."""
