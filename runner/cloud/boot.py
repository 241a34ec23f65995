"""The start command of a pod: the image's own, and beside it what ends the pod if nobody ever comes.

Between the moment a pod is rented and the moment its agent is armed lie minutes in which the launcher may die. From
its first second, therefore, a pod runs these lines: they end it when no agent has been sent in time, and start the
agent again when the container was restarted, for a restart takes every process with it.
"""

from __future__ import annotations

import shlex

START = "/start.sh"
"""Of RunPod's images: sets up SSH, then waits. Replacing the start command replaces it, so it is called."""

MAIN = """\
python3 -c "$1" "$2" "$3" &
[ -e "$4" ] || set -- "$1" "$2" "$3" "${EMULATED_ROOT:-}$4"
[ -x "$4" ] && exec "$4"
[ -f "$4" ] && exec bash "$4"
exec sleep infinity"""
# Every line counts: it is an argument of the pod, and read by whoever looks at it. No secret is in it.
WATCH = """\
import fcntl,json,os,subprocess,sys,time,urllib.request
run,left=sys.argv[1],float(sys.argv[2])
e=os.environ.get
d=os.path.join(e("RUNNER_WORKSPACE","/workspace"),"runs",run)
pod,base=e("RUNPOD_POD_ID",""),e("RUNPOD_API_BASE_URL","https://api.runpod.io")
end=time.monotonic()+left
while True:
    try: mine=json.load(open(d+"/agent.json"))["pod_id"]==pod
    except Exception: mine=False
    if mine:
        try:
            with open("/dev/shm/runner-"+run+".lock","w") as f: fcntl.flock(f,fcntl.LOCK_EX|fcntl.LOCK_NB)
            subprocess.call([sys.executable,d+"/agent.py","start",d],stdout=subprocess.DEVNULL)
        except OSError: pass
    elif time.monotonic()>end:
        r=urllib.request.Request(base+"/v2/pods/"+pod,method="DELETE",
            headers={"Authorization":"Bearer "+e("RUNPOD_API_KEY",""),"User-Agent":"runner"})
        try: urllib.request.urlopen(r,timeout=15)
        except Exception as x: print("runner: could not end this pod:",x,flush=True)
    time.sleep(5)
"""


def arguments(run_id: str, minutes: float, start: str = START) -> list[str]:
    """What to give a pod as its command: ends it after so many minutes without an agent."""
    seconds = str(round(60 * minutes))
    return ["bash", "-c", MAIN, "runner", WATCH, run_id, seconds, start]


def as_text(run_id: str, minutes: float, start: str = START) -> str:
    """The same where the API takes one string, quoted as for a shell."""
    return shlex.join(arguments(run_id, minutes, start))
