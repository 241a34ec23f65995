"""Every open value of a request decided: hardware, place, plan, each `auto`."""
