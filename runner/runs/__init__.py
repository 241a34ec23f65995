"""The life of a run on this side: checked, launched, resumed, swept, and used when it is over."""
