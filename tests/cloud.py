"""A gcloud that records its calls and plays what Google would do, for the tests of scripts/tpu.sh."""

import json
import os
from pathlib import Path
import subprocess
import sys

SCRIPT = Path(__file__).parents[1] / "scripts/tpu.sh"

# Each `create` begins the next of its `lives`: states to answer with, the last for ever, and how the run ends. There is
# one worker, whose home is a folder; what is sent to it is done there, but for the installation.
GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys
here = pathlib.Path(os.environ["FAKE"])
lives, file = json.loads((here / "lives.json").read_text()), here / "state.json"
state = json.loads(file.read_text()) if file.exists() else dict(life=0)
argv, home = sys.argv[1:], here / "worker"
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(argv) + "\\n")
if (here / "broken").exists():
    sys.exit("ERROR: could not reach the metadata server")
verb, life = argv[2:4], lives[min(state["life"], len(lives) - 1)]
if verb[1] == "describe":
    found = ["MISSING"] if state.get("deleted") else life[verb[0]]
    at = state.get(verb[0], 0)
    state[verb[0]] = at + 1
    said = found[min(at, len(found) - 1)]
    if said == "MISSING":
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    print(said)
elif verb[1] == "delete":
    if (home / "jaxlm.pid").exists():
        try:
            os.killpg(int((home / "jaxlm.pid").read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(home, ignore_errors=True)
    state["deleted"] = True
elif verb[1] == "create" and (here / "full").exists():
    (here / "full").unlink()
    sys.exit("ERROR: (gcloud) 503: there is no capacity now")
elif verb[1] == "create":
    state = dict(life=state.get("created", 0), created=state.get("created", 0) + 1)
    home.mkdir(exist_ok=True)
elif verb[1] == "scp":
    shutil.copy(argv[4], home / argv[5].partition(":")[2])
elif verb[1] == "ssh":
    command = next((a.partition("=")[2] for a in argv if a.startswith("--command=")), "true")
    environment = dict(os.environ, HOME=str(home), END=life.get("end", "exit 0"))
    installs = "scripts/setup.sh tpu" in command
    done = subprocess.run(["bash", "-c", command.replace("scripts/setup.sh tpu", "true")], env=environment)
    if installs:
        program = home / "jaxlm/.venv/bin/jaxlm"
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "jaxlm", program)
    code = done.returncode
    file.write_text(json.dumps(state))
    sys.exit(code)
file.write_text(json.dumps(state))
"""
JAXLM = """
import json, os, pathlib, sys
with (pathlib.Path(os.environ["FAKE"]) / "runs.jsonl").open("a") as runs:
    runs.write(json.dumps(sys.argv[1:]) + "\\n")
print("step 1", os.getcwd())
end = os.environ["END"]
if end == "for ever":
    os.execvp("sleep", ["sleep", "60"])
if end == "stopped":
    print("stopped by a signal; saved at step 1. The same command goes on from there")
sys.exit(int(end.removeprefix("exit ")) if end != "stopped" else 0)
"""
ALIVE = {"queued-resources": ["ACTIVE"], "tpu-vm": ["READY"]}


class Cloud:
    """A machine with a fake gcloud: what was called, what ran on the worker."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for path, text in ((folder / "bin/gcloud", GCLOUD), (folder / "jaxlm", JAXLM)):
            path.write_text(f"#!{sys.executable} -IS\n{text}")
            path.chmod(0o755)
        self.lives(ALIVE)

    def lives(self, *lives: dict) -> None:
        (self.folder / "lives.json").write_text(json.dumps(lives))

    def __call__(self, *arguments: str, code: int = 0, answer: str = "", **environment: str) -> str:
        keep = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
        path = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "FAKE": str(self.folder), "TPU_POLL": "0"}
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=keep | path | {"TPU_ZONE": "us-east1-d", "TPU_TYPE": "v5litepod-16"} | environment,
            input=answer, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def calls(self, verb: str = "") -> list[list[str]]:
        """The arguments of each call after `compute tpus`, of one verb if given."""
        path = self.folder / "calls.jsonl"
        every = [json.loads(line)[2:] for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in every if not verb or call[1] == verb]

    def commands(self) -> list[str]:
        return [flag.partition("=")[2] for call in self.calls("ssh") for flag in call if flag.startswith("--command=")]

    def runs(self) -> list[list[str]]:
        path = self.folder / "runs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def made(self) -> "Cloud":
        """The TPU exists and is set up."""
        self("create")
        self("setup")
        return self
