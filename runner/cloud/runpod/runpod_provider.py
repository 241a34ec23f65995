"""RunPod as a `Provider`: `api.py` with the choice of machines, the start command and the pages that people need.

Between the moment a pod is rented and the moment its agent is armed lie minutes in which the launcher may die. From
its first second, therefore, a pod runs the watch of its start command: it ends the pod when no agent has been sent in
time, and starts the agent again when the container was restarted, for a restart takes every process with it.

An agent says twice a second, through a socket and thus whatever the disks do, until when it will have ended the pod.
Where it falls silent, because it hangs, or died and cannot be started again, the watch ends the pod then.
"""

from __future__ import annotations

import shlex

from runner.cloud.agent import agent
from runner.cloud.provider import Offer, Provider, place_of
from runner.cloud.provider_errors import WrongKeyError
from runner.cloud.runpod import account_key, graphql, offers
from runner.cloud.runpod.account_key import BILLING_PAGE, CONSOLE, KEY, api_key
from runner.cloud.runpod.api import Api
from runner.spec import RunSpec


class RunPod(Api):
    """One account of RunPod. NoKeyError without RUNPOD_API_KEY; RUNPOD_API_BASE_URL names another address."""

    title = "RunPod"
    calls = agent.CALLS
    key_variable = KEY
    billing_page = BILLING_PAGE

    @property
    def secret(self) -> str:
        """The API key."""
        return api_key()

    def check_key(self, spec: RunSpec) -> None:
        """Check that the key can read pods and, for a bid, use GraphQL."""
        self.pods()
        if place_of(spec).spot and self.balance() is None:
            raise WrongKeyError(account_key.no_graphql_problem("it gets no answer"))

    def offers(self, spec: RunSpec, plan: dict[str, object]) -> list[Offer]:
        """GPU types, data centres and the network volume of `where`, held against the catalogue."""
        return offers.offers(self, spec, plan)

    def start_command(self, run_id: str, minutes: float) -> str:
        """The watch, then the image's own start command."""
        return shlex.join(start_arguments(run_id, minutes))

    def balance(self) -> float | None:
        """Through GraphQL."""
        return graphql.balance()

    def page(self, pod_id: str | None = None) -> str:
        """Return the pod's page in RunPod's console."""
        return f"{CONSOLE}/pods" + (f"?id={pod_id}" if pod_id else "")


_: type[Provider] = RunPod  # held by mypy: providers.py names it as text
START = "/start.sh"
"""Of RunPod's images: sets up SSH, then waits. Replacing the start command replaces it, so it is called where it is."""

SSHD = r"""e="${EMULATED_ROOT:-}/etc" c="-f ${EMULATED_ROOT:-}/etc/ssh/sshd_config -oPermitRootLogin=prohibit-password"
export -p | sed "s/^declare -x /export /" >"$e/rp_environment"
mkdir -p ~/.ssh /run/sshd && echo "$PUBLIC_KEY" >>~/.ssh/authorized_keys && chmod -R go= ~/.ssh
[ -x /usr/sbin/sshd ] || { export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update && apt-get -qq install -y --no-install-recommends openssh-server; }
ssh-keygen -A -f "${EMULATED_ROOT:-/}" >/dev/null
/usr/sbin/sshd -t $c -oPerSourcePenalties=no 2>/dev/null && c="$c -oPerSourcePenalties=no"
v="PATH=$PATH RUNNER_RP_ENVIRONMENT=$e/rp_environment RUNNER_AUTHORIZED_KEYS=$HOME/.ssh/authorized_keys"
/usr/sbin/sshd $c -o "SetEnv $v" ||
  echo "runner: no $4 in this image, and no ssh server can be started: take another where.image"
exec sleep infinity"""
"""For an image without START, such as pytorch/pytorch: what START does for SSH, a server being installed first. OpenSSH
9.8 and later shut out who asks often, and waiting for a pod is asking often. sshd hands its own PATH to nobody."""

MAIN = (
    """\
python3 -c "$1" "$2" "$3" &
[ -e "$4" ] || set -- "$1" "$2" "$3" "${EMULATED_ROOT:-}$4"
[ -x "$4" ] && exec "$4"
[ -f "$4" ] && exec bash "$4"
[ -n "${PUBLIC_KEY:-}" ] || exec sleep infinity
"""
    + SSHD
)
# Every line counts: it is an argument of the pod, and read by whoever looks at it. No secret is in it.
WATCH = """\
import fcntl,json,os,signal,socket,subprocess,sys,threading,time,urllib.request
run,left=sys.argv[1],float(sys.argv[2])
e=os.environ.get
d=os.path.join(e("RUNNER_WORKSPACE","/workspace"),"runs",run)
pod,base=e("RUNPOD_POD_ID",""),e("RUNPOD_API_BASE_URL","https://api.runpod.io").rstrip("/")
now=lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
end,how,told,busy=now()+left,"terminate",[None],[0]
def say(*x):
    if x!=told[0]:
        told[0]=x
        try: print("runner:",*x,flush=True)
        except Exception: pass
def late(*_): raise TimeoutError("no whole answer in 20 s")
signal.signal(signal.SIGALRM,late)
def ask(method,path="",body=None):
    r=urllib.request.Request(base+"/v2/pods/"+pod+path,body,method=method,headers={"User-Agent":"runner",
        "Authorization":"Bearer "+e("RUNPOD_API_KEY",""),"Content-Type":"application/json"})
    signal.alarm(20)
    try: return urllib.request.urlopen(r,timeout=15).status<300
    except Exception as x: say("could not end this pod:",x)
    finally: signal.alarm(0)
def keep():
    p=None
    while True:
        try:
            if p: p.poll()
            if json.load(open(d+"/agent.json"))["pod_id"]==pod:
                with open("/dev/shm/runner-"+run+".lock","w") as f: fcntl.flock(f,fcntl.LOCK_EX|fcntl.LOCK_NB)
                if not p or p.poll() is not None:
                    p=subprocess.Popen([sys.executable,d+"/agent.py","start",d],stdout=subprocess.DEVNULL)
        except BlockingIOError: busy[0]=now()
        except Exception: pass
        time.sleep(5)
threading.Thread(target=keep,daemon=True).start()
s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM)
s.settimeout(5)
bound,wait=False,1
while True:
    try:
        if not bound: s.bind(("\\0runner-"+pod+" "+base)[:100]); bound=True
        due,how=s.recv(99).decode().split(); end=float(due)
    except socket.timeout: pass
    except Exception as x: say(x); time.sleep(5)
    if now()>end and (bound or now()-busy[0]>30):
        if how!="stop" or not ask("POST","/action",b'{"action":"stop"}'): ask("DELETE")
        time.sleep(wait); s.settimeout(.5); wait=min(9,wait*1.5)
"""


def start_arguments(run_id: str, minutes: float, start: str = START) -> list[str]:
    """Return the pod's command, which ends the pod after so many minutes without an agent."""
    seconds = str(round(60 * minutes))
    return ["bash", "-c", MAIN, "runner", WATCH, run_id, seconds, start]
