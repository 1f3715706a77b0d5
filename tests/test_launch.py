"""From a laptop to a TPU: scripts/tpu.sh against a gcloud that records its calls and plays what Google would do."""

import json
import os
from pathlib import Path
import re
import shlex
import subprocess
import tarfile

import pytest

from tests.cloud import ALIVE, SCRIPT, Cloud

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def ready(cloud):
    (cloud.folder / "worker/jaxlm/.venv/bin").mkdir(parents=True)
    program = cloud.folder / "worker/jaxlm/.venv/bin/jaxlm"
    program.write_bytes((cloud.folder / "jaxlm").read_bytes())
    program.chmod(0o755)
    return cloud


RUN = ("--config=configs/quickstart.py", "--workdir=gs://bucket/run")


# The request.


def test_create_asks_for_one_node_of_the_type_with_its_runtime_and_waits_until_it_is_there(cloud):
    cloud.lives(
        {"queued-resources": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "tpu-vm": ["CREATING", "READY"]}
    )
    said = cloud("create", "--name=first", "--project=mine")
    create, *looks = cloud.calls()
    assert create == [
        "queued-resources", "create", "first", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=first", "--zone=us-east1-d", "--project=mine",
    ]  # fmt: skip
    assert looks[0] == [
        "queued-resources", "describe", "first", "--format=value(state.state)", "--zone=us-east1-d", "--project=mine",
    ]  # fmt: skip
    assert looks[-1][:3] == ["tpu-vm", "describe", "first"]
    assert "WAITING_FOR_RESOURCES" in said and said.rstrip().endswith("first is READY")


@pytest.mark.parametrize(
    "type, runtime",
    {
        "v6e-8": "v2-alpha-tpuv6e", "v5p-128": "v2-alpha-tpuv5", "v5litepod-256": "v2-alpha-tpuv5-lite",
        "v4-8": "tpu-ubuntu2204-base",
    }.items(),
)  # fmt: skip
def test_each_generation_has_its_runtime(cloud, type, runtime):
    cloud("create", f"--type={type}")
    assert f"--runtime-version={runtime}" in cloud.calls("create")[0]


def test_slices_spot_runtime_and_further_flags_are_asked_for(cloud):
    cloud("create", "--slices=2", "--spot", "--version=own", TPU_NAME="big", TPU_FLAGS="--network=fast --reserved")
    create = cloud.calls("create")[0]
    assert {
        "--node-count=2",
        "--node-prefix=big",
        "--spot",
        "--runtime-version=own",
        "--network=fast",
        "--reserved",
    } < set(create)
    assert not any(flag.startswith("--node-id") for flag in create)
    assert [call[2] for call in cloud.calls("describe") if call[0] == "tpu-vm"] == ["big-0", "big-1"]


def test_spot_0_buys_no_spot_tpu(cloud):
    cloud("create", TPU_SPOT="0")
    assert "--spot" not in cloud.calls("create")[0]


def test_a_request_that_fails_is_said(cloud):
    cloud.lives({"queued-resources": ["PROVISIONING", "FAILED"]})
    assert "jaxlm was not made" in cloud("create", code=1)


# On the workers.


def test_setup_copies_the_commit_to_every_worker_of_every_slice_and_installs_the_tpu_lock(cloud):
    cloud("create")
    cloud("setup")
    every = {"--worker=all", "--node=all"}
    assert every < set(cloud.calls("scp")[0]) and every < set(cloud.calls("ssh")[0])
    assert cloud.commands()[0].rstrip().endswith("scripts/setup.sh tpu") and (ROOT / "requirements/tpu.txt").exists()
    assert "jaxlm.egg-info" not in os.listdir(cloud.folder / "worker/jaxlm")
    with tarfile.open(cloud.folder / "worker/jaxlm.tar.gz") as archive:
        assert {"jaxlm/train.py", "scripts/setup.sh", "requirements/core.txt"} < set(archive.getnames())


def test_setup_again_keeps_what_was_installed_and_nothing_else(cloud):
    cloud.made()
    (cloud.folder / "worker/jaxlm/stale.py").touch()
    cloud("setup")
    assert not (cloud.folder / "worker/jaxlm/stale.py").exists()
    assert (cloud.folder / "worker/jaxlm/.venv/bin/jaxlm").exists()


def test_train_runs_one_command_on_every_worker_and_ends_with_it(ready):
    said = ready("train", "--", *RUN)
    assert ready.runs() == [["train", *RUN, "--config.distributed=True"]]
    start = next(call for call in ready.calls("ssh") if any("setsid" in flag for flag in call))
    assert {"--worker=all", "--node=all"} < set(start)
    assert "the run is complete" in said
    assert (ready.folder / "worker/jaxlm.log").read_text().startswith(f"step 1 {ready.folder}/worker/jaxlm")


def test_overrides_arrive_as_they_were_written(ready):
    odd = [
        "--config.data.weights={'a b': [1, 2]}",
        '--config.x=it\'s $HOME `ls` "q" \\ * é',
        "--config.y=a\nb",
        "--config.z=",
    ]
    ready("train", "--", *RUN, *odd)
    assert ready.runs() == [["train", *RUN, *odd, "--config.distributed=True"]]


def test_what_libtpu_is_told_here_it_is_told_on_every_worker(ready):
    flags = "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_b='c d'"
    ready("train", "--", *RUN, LIBTPU_INIT_ARGS=flags)
    (start,) = [command for command in ready.commands() if "setsid" in command]
    (inner,) = shlex.split(re.findall(r"bash -c (.*) </dev/null", start)[0])
    assert shlex.split(inner)[:3] == ["env", f"LIBTPU_INIT_ARGS={flags}", "jaxlm"]
    assert ready.runs() == [["train", *RUN, "--config.distributed=True"]]


def test_several_slices_are_the_mesh_s_slices(ready):
    ready("train", "--slices=4", "--", *RUN)
    assert ready.runs()[0][-2:] == ["--config.distributed=True", "--config.mesh.slices=4"]
    ready("train", "--slices=4", "--", *RUN, "--config.mesh.slices=2", "--config.distributed=False")
    assert ready.runs()[1] == ["train", *RUN, "--config.mesh.slices=2", "--config.distributed=False"]


def test_a_run_that_fails_shows_its_last_words(ready):
    ready.lives(ALIVE | {"end": "exit 2"})
    said = ready("train", "--", *RUN, code=1)
    assert "step 1" in said and "the run failed (exit 2)" in said


def test_a_run_that_goes_on_is_watched_not_started_twice(ready):
    process = subprocess.Popen(["bash", "-c", "sleep 60; : jaxlm"], start_new_session=True)
    try:
        (ready.folder / "worker/jaxlm.pid").write_text(str(process.pid))
        ready.lives(ALIVE | {"queued-resources": ["ACTIVE", "ACTIVE", "MISSING"]})
        assert "jaxlm was deleted" in ready("train", "--", *RUN, code=1)
        assert ready.runs() == []
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_host_that_was_started_anew_gets_the_same_command_again(cloud):
    """Maintenance: the run was told to stop, saved, and the TPU is there again."""
    cloud.lives(ALIVE | {"end": "stopped"}, ALIVE)
    cloud.made()
    cloud.lives(ALIVE | {"end": "stopped", "queued-resources": ["ACTIVE"] * 3 + ["MISSING"]})
    (cloud.folder / "state.json").write_text(json.dumps(dict(life=0, created=1)))
    said = cloud("train", "--", *RUN, code=1)
    assert "goes on from its last checkpoint" in said
    assert len(cloud.runs()) > 1 and all(run == cloud.runs()[0] for run in cloud.runs())


def test_the_words_that_say_that_a_run_was_stopped_are_those_of_the_program():
    phrase = "stopped by a signal"
    assert phrase in SCRIPT.read_text() and phrase in (ROOT / "jaxlm/train.py").read_text()


# Taken away.

SPOT = ("train", "--spot", "--", *RUN)


@pytest.mark.parametrize("how", ["PREEMPTED", "SUSPENDED", "FAILED"])
def test_a_spot_tpu_that_is_taken_away_is_made_again_and_the_same_command_goes_on(cloud, how):
    lost = (
        {"queued-resources": ["ACTIVE"], "tpu-vm": ["READY"] * 4 + ["PREEMPTED"]}
        if how == "PREEMPTED"
        else {"queued-resources": ["ACTIVE"] * 4 + ["SUSPENDING", how], "tpu-vm": ["READY"]}
    )
    cloud.lives(lost | {"end": "for ever"}, {"queued-resources": ["PROVISIONING", "ACTIVE"], "tpu-vm": ["READY"]})
    cloud("create", "--spot")
    cloud("setup")
    said = cloud(*SPOT)
    assert [call[1] for call in cloud.calls() if call[1] in ("create", "delete", "scp")] == [
        "create", "scp", "delete", "create", "scp",
    ]  # fmt: skip
    first, second = cloud.calls("create")
    assert first == second and "--spot" in first
    assert {"--force", "--quiet"} < set(cloud.calls("delete")[0])
    assert cloud.runs() == [["train", *RUN, "--config.distributed=True"]] * 2
    assert f"jaxlm is {how}\n" in said and "making jaxlm again" in said and "the run is complete" in said


def test_a_spot_tpu_that_cannot_be_made_at_once_is_asked_for_again(cloud):
    """It is deleted by then, but not by its owner."""
    lost = {"queued-resources": ["ACTIVE"] * 4 + ["SUSPENDED"], "tpu-vm": ["READY"], "end": "for ever"}
    cloud.lives(lost, ALIVE)
    cloud("create", "--spot")
    cloud("setup")
    (cloud.folder / "full").touch()
    assert "the run is complete" in cloud(*SPOT)
    assert len(cloud.calls("create")) == 3 and len(cloud.calls("delete")) == 1


def test_a_tpu_that_is_not_spot_is_never_bought_again(ready):
    ready.lives({"queued-resources": ["ACTIVE", "SUSPENDED"], "tpu-vm": ["READY"], "end": "for ever"})
    said = ready("train", "--", *RUN, code=1)
    assert "go on from the last checkpoint" in said and not ready.calls("create") and not ready.calls("delete")
    os.killpg(int((ready.folder / "worker/jaxlm.pid").read_text()), 9)


def test_one_that_was_deleted_stays_deleted(ready):
    ready.lives({"queued-resources": ["ACTIVE", "MISSING"], "tpu-vm": ["READY"]})
    assert "jaxlm was deleted" in ready(*SPOT, code=1)
    assert not ready.calls("create")


def test_a_network_that_fails_is_no_preemption(ready):
    """Nothing may be deleted because this laptop went offline."""
    (ready.folder / "broken").touch()
    assert "jaxlm is UNKNOWN" in ready("status")
    assert not ready.calls("delete") and not ready.calls("create")


# Looking on, and the end.


def test_status_names_the_state_and_the_run(ready):
    assert "jaxlm is READY" in ready("status") and "the run: gone" in ready("status")
    ready.lives({"queued-resources": ["SUSPENDED"]})
    assert "jaxlm is SUSPENDED" in ready("status")


def test_logs_follow_worker_0_or_another(cloud):
    (cloud.folder / "bin/tail").write_text("#!/bin/sh\necho followed $*\n")
    (cloud.folder / "bin/tail").chmod(0o755)
    assert "followed -n 100 -F" in cloud("logs", "--worker=3")
    assert {"--worker=3", "--node=0"} < set(cloud.calls("ssh")[0])


def test_ssh_runs_a_command_with_the_installed_programs(ready):
    ready("ssh", "--", "jaxlm", "prepare", "--config.store=gs://bucket/a store")
    assert ready.runs() == [["prepare", "--config.store=gs://bucket/a store"]]
    ready("ssh")
    assert ready.calls("ssh")[-1] == [
        "queued-resources", "ssh", "jaxlm", "--worker=0", "--node=0", "--zone=us-east1-d",
    ]  # fmt: skip


def test_delete_asks_for_the_name_or_yes(cloud):
    for answer in ("", "y\n", "jax\n"):
        assert "nothing was deleted" in cloud("delete", code=1, answer=answer)
    assert not cloud.calls("delete")
    cloud("delete", answer="jaxlm\n")
    cloud("delete", "--yes")
    assert (
        cloud.calls("delete")
        == [["queued-resources", "delete", "jaxlm", "--force", "--quiet", "--zone=us-east1-d"]] * 2
    )


# Mistakes.


@pytest.mark.parametrize(
    "arguments, environment, names",
    [
        (["launch"], {}, "no verb 'launch'; choices: create, setup, train, logs, ssh, status, delete"),
        (["status"], {"TPU_ZONE": ""}, "--zone or TPU_ZONE is missing"),
        (["create"], {"TPU_TYPE": ""}, "--type or TPU_TYPE is missing"),
        (["create", "--slices=two"], {}, "--slices=two"),
        (["create", "--slices=99999999999999999999"], {}, "--slices=9999"),
        (["create", "--name="], {}, "--name or TPU_NAME is empty"),
        (["create"], {"TPU_SPOT": "false"}, "TPU_SPOT=false is neither 0 nor 1"),
        (["create", "--zones=x"], {}, "knows no '--zones=x'"),
        (["create", "v4-8"], {}, "knows no 'v4-8'"),
        (["logs", "--worker=first"], {}, "--worker=first"),
        (["status", "--poll=soon"], {}, "--poll=soon"),
        (["train"], {}, "what to train stands after --"),
        (["train", "--spot", "--", "--config=a.py", "--workdir=runs/a"], {}, "--workdir must be gs://"),
        (["train", "--spot", "--", "--config=a.py", "--workdir=gs://b/a"], {"TPU_TYPE": ""}, "--type or TPU_TYPE"),
    ],
)
def test_a_mistake_is_named_before_anything_is_called(cloud, arguments, environment, names):
    assert names in cloud(*arguments, code=1, **environment)
    assert not cloud.calls()


def test_train_without_a_tpu_or_a_set_up_says_what_is_missing(cloud):
    cloud.lives({"queued-resources": ["MISSING"]})
    assert "scripts/tpu.sh create makes it" in cloud("train", "--", *RUN, code=1)
    cloud.lives(ALIVE)
    (cloud.folder / "worker").mkdir()
    assert "scripts/tpu.sh setup installs it" in cloud("train", "--", *RUN, code=1)


def test_without_gcloud_there_is_no_traceback(tmp_path):
    for tool in ("dirname", "cat"):
        (tmp_path / tool).symlink_to(f"/bin/{tool}")
    done = subprocess.run(
        ["/bin/bash", SCRIPT, "status", "--zone=z"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "gcloud is not on PATH" in done.stderr


def test_help_names_every_verb_and_flag_that_the_script_takes(cloud):
    said = cloud("--help")
    for verb in ("create", "setup", "train", "logs", "ssh", "status", "delete"):
        assert f"\n  {verb}" in said
    taken = set(re.findall(r"--\w+(?==\*|\))", SCRIPT.read_text()))
    assert len(taken) > 9 and all(flag in said for flag in taken - {"--help"})
    assert not cloud.calls()
