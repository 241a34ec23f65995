"""What a run learns: rows, trainer and settings of each objective."""
