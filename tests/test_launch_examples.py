"""Without tpu.sh: scripts/launch for SkyPilot, Kubernetes and Slurm is well formed, and jaxlm takes its commands."""

import os
from pathlib import Path
import re
import subprocess

import pytest
import yaml

from jaxlm import axes, config, lookup
from jaxlm.__main__ import PROGRAMS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts/launch"
SKYPILOT = {  # the keys that a task and its resources may have, by the schemas of SkyPilot 0.14
    "task": "name workdir num_nodes resources file_mounts volumes service pool setup run envs secrets config",
    "resources": "cloud region zone infra cpus memory accelerators accelerator_args instance_type use_spot "
    "job_recovery disk_size disk_tier network_tier max_hourly_cost ports labels autostop any_of ordered image_id "
    "priority volumes",
    "accelerator_args": "runtime_version tpu_name tpu_vm gcp_queued_resource",
}


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A folder with an installed jaxlm, and Slurm's programs, which note how they are called."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in (".venv/bin/jaxlm", "srun", "scontrol"):
        then = 'exec "$@"' if name == "srun" else ""
        note = f'(basename "$0"; printf "%s\\n" "$@") >>"$LOG.{Path(name).name}"'
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{note}\n{then}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "called"))
    return tmp_path


def called(node: Path, name: str) -> list[str]:
    return (node / f"called.{name}").read_text().splitlines() if (node / f"called.{name}").exists() else []


def understood(command: list[str], monkeypatch) -> dict:
    """The settings that a `jaxlm train` of the repository's root takes from this command line."""
    monkeypatch.chdir(ROOT)
    program, verb, *argv = command
    assert (program, verb) == ("jaxlm", "train")
    args = config.parse("", argv)
    settings = args.config.to_dict()
    assert settings["distributed"] is True
    lookup.known("config.mesh", settings.get("mesh", {}), lookup.keywords(axes.mesh))
    return settings | dict(workdir=args.workdir)


def test_the_skypilot_task_has_the_keys_of_its_schema_and_its_command_is_understood(node, monkeypatch):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    resources = task["resources"]
    for name, keys in {"task": task, "resources": resources, "accelerator_args": resources["accelerator_args"]}.items():
        lookup.known(name, keys, SKYPILOT[name].split())
    assert resources["use_spot"] is True and isinstance(task["num_nodes"], int)
    for step in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[step]], check=True)
    assert "scripts/setup.sh tpu" in task["setup"]
    subprocess.run(["bash", "-euc", task["run"]], check=True)
    assert understood(called(node, "jaxlm"), monkeypatch)["workdir"].startswith("gs://")


def test_the_jobset_is_one_of_slices_whose_hosts_all_run_the_command(monkeypatch):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    settings = understood(container["command"] + container["args"], monkeypatch)
    assert settings["mesh"]["slices"] == slices["replicas"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert settings["batch"] % (chips * slices["replicas"]) == 0 and settings["workdir"].startswith("gs://")
    assert container["image"] in (LAUNCH / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["slurm_gpu", "slurm_cpu"])
def test_a_slurm_job_runs_its_command_and_queues_again_until_the_run_is_complete(node, monkeypatch, name):
    script = LAUNCH / f"{name}.sbatch"
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    assert script.read_text().count("#SBATCH") == len(options) == len(dict(options))
    asked = dict(options)
    assert {"requeue", "nodes", "ntasks-per-node", "time"} < set(asked) and asked["signal"].startswith("TERM@")
    assert asked["gpus-per-node"] == asked["ntasks-per-node"] if name == "slurm_gpu" else "gpus-per-node" not in asked
    assert script.read_text().index("#SBATCH") < script.read_text().index("set -euo pipefail"), "sbatch stops there"

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    subprocess.run(["bash", script], check=True)
    assert called(node, "scontrol") == ["scontrol", "requeue", "7"]
    command = called(node, "jaxlm")
    workdir = Path(next(flag.partition("=")[2] for flag in command if flag.startswith("--workdir=")))
    workdir.mkdir(parents=True)
    (workdir / "summary.json").touch()
    subprocess.run(["bash", script], check=True)
    assert called(node, "scontrol") == ["scontrol", "requeue", "7"], "complete: not queued again"
    settings = understood(command, monkeypatch)
    processes = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert settings["batch"] % processes == 0


def test_a_slurm_job_whose_run_fails_is_not_queued_again(node, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (node / ".venv/bin/jaxlm").write_text("#!/bin/sh\nexit 2\n")
    assert subprocess.run(["bash", LAUNCH / "slurm_cpu.sbatch"]).returncode == 2
    assert not called(node, "scontrol")


def test_the_page_on_tpus_names_verbs_flags_and_programs_that_there_are():
    page = (ROOT / "docs/tpu.md").read_text()
    said = subprocess.run([ROOT / "scripts/tpu.sh", "--help"], capture_output=True, text=True, check=True).stdout
    verbs = set(re.findall(r"^  ([a-z]+) ", said, re.MULTILINE)) - {"flag"}
    assert set(re.findall(r"scripts/tpu\.sh ([a-z]+)", page)) == verbs
    assert all(name in said for name in re.findall(r"\bTPU_[A-Z]+", page))
    assert set(re.findall(r"^(?:scripts/tpu.sh ssh -- )?jaxlm ([a-z]+)", page, re.MULTILINE)) <= set(PROGRAMS)
    assert "(docs/tpu.md)" in (ROOT / "README.md").read_text()
