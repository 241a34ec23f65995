"""Several processes: one does what fills a cache, and the others wait for as long as it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Three processes on two machines; the main one works for 5 s. A collective would end after its timeout: there is none.
PROCESS = """
import json, sys, time
import torch.distributed as dist
from runner.train.distributed import Ranks

rank, machine, local, path = *map(int, sys.argv[1:4]), sys.argv[4]
store = dist.FileStore(f"{path}/store", 3)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
dist.all_reduce = None
ranks, beats = Ranks(rank, 3, local), []
found = []
for talks in (True, False):
    beats.clear()
    with ranks.main_first(lambda: beats.append(time.time())) as working:
        began = time.time()
        for _ in range(10 if ranks.main else 0):
            time.sleep(0.5)
            if talks:
                working()
        ended = time.time()
    found.append({"began": began, "ended": ended, "beats": len(beats)})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_others_wait_for_as_long_as_it_takes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(machine), str(local), str(tmp_path)], text=True,
            env={**environment, "GROUP_RANK": str(machine)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, machine, local in ((0, 0, 0), (1, 1, 0), (2, 1, 1))
    ]  # fmt: skip
    told = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        told.append(json.loads(out.splitlines()[-1]))
    for turn in range(2):
        main, first_there, second_there = (process[turn] for process in told)
        assert main["ended"] - main["began"] >= 5
        assert main["ended"] <= first_there["began"] and first_there["ended"] <= second_there["began"]
    for waiting in told[1:]:
        assert waiting[0]["beats"] >= 3  # the main one got on, and so did they
        assert waiting[1]["beats"] == 0  # it may hang, and nobody hides that
