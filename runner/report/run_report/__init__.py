"""The report of runs: one self-contained HTML page, Markdown or JSON, from the files of their directories."""
