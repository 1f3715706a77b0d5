"""What gs:// and s3:// do otherwise than a folder: files that grow, renaming, checkpoints, the store of tokens."""

import json
import os
from pathlib import Path
import subprocess
import sys

from etils import epath
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, paths, prepare
from jaxlm.checkpoint import Checkpoints
from jaxlm.data import store as token_store
from jaxlm.log import Log, lines
from jaxlm.lookup import Mistake
from tests import runs
from tests.buckets import Buckets, serve

CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}


@pytest.fixture(scope="module")
def server():
    """One for the process: the clients look up its address once."""
    with serve() as buckets, pytest.MonkeyPatch.context() as patch:
        for name, value in buckets.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", json.loads(buckets.environment["FSSPEC_GCS"]))
        yield buckets


@pytest.fixture(params=CLIENTS)
def bucket(server, request):
    """The address of an empty bucket, whose objects are `server.objects`."""
    pytest.importorskip(CLIENTS[request.param], reason=f"the extra of {CLIENTS[request.param]}")
    server.clear()
    return f"{request.param}://bucket"


def held(server: Buckets) -> dict[str, bytes]:
    return {key.removeprefix("bucket/"): value for key, value in server.objects.items()}


def test_a_bucket_s_place_is_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(paths.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert str(paths.absolute("s3://bucket/run")) == "s3://bucket/run"
    assert paths.absolute("run") == epath.Path(tmp_path).resolve() / "run"
    assert paths.kvstore("run") == dict(driver="file", path=f"{tmp_path.resolve()}/run/")
    assert paths.kvstore("gs://bucket/a/b") == "gs://bucket/a/b/"


@pytest.mark.parametrize(
    "address", ["gs:/bucket/run", "gs://", "s3://", "http://x/run", "GS://bucket/run", "gs://b1/a?b"]
)
def test_an_address_that_is_none_of_a_bucket_is_told_before_anything_is_written(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("from ml_collections import ConfigDict as C\ndef get_config(): return C()")
    for what, flags in (("--workdir", []), ("config.store", ["--workdir=run"])):
        flag = f"--{what.removeprefix('--')}={address}"
        with pytest.raises(Mistake, match=f"{what}=.* is no address of a bucket: gs://BUCKET/FOLDER or s3://"):
            config.parse("", ["--config=config.py", *flags, flag])
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_slash_behind_a_place_in_a_bucket_is_not_a_part_of_it(kind):
    assert paths.kvstore(f"{kind}://bucket/store/") == paths.kvstore(f"{kind}://bucket/store")


def test_amazon_s_protocol_takes_the_endpoint_and_keys_of_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert paths.kvstore("s3://bucket/a") == dict(driver="s3", bucket="bucket", path="a/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    assert paths.kvstore("s3://bucket/a/b") == dict(
        driver="s3", bucket="bucket", path="a/b/", endpoint="http://minio:9000", aws_region="us-east-1",
        aws_credentials=dict(type="environment"),
    )  # fmt: skip


# Files that grow.


def test_files_that_grow_are_copied_when_asked_and_at_the_end(bucket, server):
    mirror = paths.Mirror(f"{bucket}/run")
    (mirror.folder / "events").mkdir()
    with (mirror.folder / "metrics.jsonl").open("a", buffering=1) as file:
        file.write("1\n")
        (mirror.folder / "events/a").write_bytes(b"x")
        mirror.sync()
        assert held(server) == {"run/metrics.jsonl": b"1\n", "run/events/a": b"x"}
        file.write("2\n")
    count = len(server.requests)
    mirror.close()
    assert held(server)["run/metrics.jsonl"] == b"1\n2\n" and not mirror.folder.exists()
    assert not any("events" in request for request in server.requests[count:]), "what is as it was is not copied again"


def test_files_that_grow_are_copied_by_themselves(bucket, server, monkeypatch):
    monkeypatch.setattr(paths, "SECONDS", 0.01)
    mirror = paths.Mirror(f"{bucket}/run")
    (mirror.folder / "metrics.jsonl").write_text("1\n")
    for _ in range(1000):
        if "run/metrics.jsonl" in held(server):
            break
        mirror._end.wait(0.01)
    assert held(server) == {"run/metrics.jsonl": b"1\n"}
    mirror.close()


def test_in_a_folder_they_are_the_files_themselves(tmp_path):
    mirror = paths.Mirror(str(tmp_path))
    assert mirror.folder == tmp_path
    mirror.sync()
    mirror.close()
    assert tmp_path.exists()


def test_a_resumed_run_s_metrics_keep_what_was_logged_before_its_checkpoint(bucket, server):
    with Log(f"{bucket}/run", start_step=0, steps=4) as log:
        for step in (1, 2):
            log.train(step, dict(loss=float(step), lr=0.1))
        log.sync()
        assert [line["step"] for line in lines(f"{bucket}/run")] == [1, 2]
    with Log(f"{bucket}/run", start_step=1, steps=4) as log:
        log.train(2, dict(loss=5.0, lr=0.1))
    assert [line["loss"] for line in lines(f"{bucket}/run")] == [1.0, 5.0]
    assert sum("events.out" in name for name in held(server)) >= 1


# Checkpoints.


def state(value: float) -> dict:
    return {"params": {"w_DF": jnp.full((4, 6), float(value))}, "opt": {"count": jnp.array(int(value))}}


@pytest.mark.endurance
def test_checkpoints_in_a_bucket_are_kept_restored_and_skipped_where_damaged(bucket, server):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0.0))
    with Checkpoints(f"{bucket}/run", newest=2, best=0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.parts(3) >= {"params", "opt", "seal"}
    assert not any(name.startswith("run/checkpoints/1/") for name in held(server))

    for name in [name for name in held(server) if name.startswith("run/checkpoints/3/params/w_DF/0")]:
        server.put(f"bucket/{name}", held(server)[name][:-20] + bytes(20))
    with Checkpoints(f"{bucket}/run", newest=2, best=0) as checkpoints:
        found = checkpoints.restore(shapes)
        assert found and found[0] == 2
        np.testing.assert_array_equal(found[1]["params"]["w_DF"], state(2)["params"]["w_DF"])
        checkpoints.set_aside(2)
        assert checkpoints.steps() == [2]
        checkpoints.save(3, state(3))
        checkpoints.wait()
    with Checkpoints(f"{bucket}/run", newest=2, best=0) as checkpoints:
        found = checkpoints.restore(shapes)
        assert found and found[0] == 3
    assert any(".damaged-" in name for name in held(server))


def test_a_checkpoint_that_was_cut_off_is_none(bucket, server):
    with Checkpoints(f"{bucket}/run", newest=3, best=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step))
        checkpoints.wait()
    for name in [name for name in held(server) if name.startswith("run/checkpoints/2/") and "commit_success" in name]:
        server.remove(f"bucket/{name}")
    with Checkpoints(f"{bucket}/run", newest=3, best=0) as checkpoints:
        assert checkpoints.steps() == [1]


# The store of tokens.


@pytest.mark.endurance
def test_a_store_in_a_bucket_is_the_one_in_a_folder(bucket, server, tmp_path):
    sources = runs.write_corpus(tmp_path)
    made = dict(tokenizer=dict(kind="bytes"), validation=0.2, dedup=dict(near=0.0), workers=1)
    here = prepare.prepare(str(tmp_path / "store"), sources, **made)
    for name in sources:
        server.put(f"bucket/text/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    there = prepare.prepare(f"{bucket}/store", {n: f"jsonl:{bucket}/text/{n}.jsonl" for n in sources}, **made)
    for name in sources:
        for split in ("train", "validation"):
            a, b = here.split(name, split), there.split(name, split)
            assert len(a) == len(b) > 0
            for i in (0, len(a) - 1):
                np.testing.assert_array_equal(a.document(i), b.document(i))
    local = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert {name for name in held(server) if name.startswith("store/")} == local
    again = prepare.prepare(f"{bucket}/store", {"prose": f"jsonl:{bucket}/text/prose.jsonl"}, overwrite=True, **made)
    assert again.sources == ["prose"] and not any("lists" in name for name in held(server) if "store/" in name)


@pytest.mark.endurance
def test_a_preparation_that_was_killed_early_goes_on_in_a_bucket(bucket, server, tmp_path):
    """Before there is a tokenizer: an object store has no empty folder that could stand for it."""
    sources = runs.write_corpus(tmp_path)
    made = dict(tokenizer=dict(kind="bytes"), dedup=dict(near=0.0), workers=1)
    prepare.prepare(str(tmp_path / "store"), sources, **made)
    recipe = json.loads((tmp_path / "store/prose/manifest.json").read_text())
    keys = [
        "format",
        "split",
        "validation",
        "split_seed",
        "clean",
        "dedup",
        "decontaminate",
        "libraries",
        "source",
        "inputs",
        "after",
    ]
    text = json.dumps({key: recipe[key] for key in [*keys, "after"]})
    server.put("bucket/store/prose/selection/recipe.json", text.encode())
    assert len(prepare.prepare(f"{bucket}/store", sources, **made).sources) == 2


def test_what_is_no_store_is_not_overwritten_in_a_bucket_either(bucket, server, tmp_path):
    server.put("bucket/store/thesis.txt", b"...")
    with pytest.raises(Mistake, match="is not empty and no token store"):
        prepare.prepare(f"{bucket}/store", runs.write_corpus(tmp_path), dict(kind="bytes"))
    with pytest.raises(Mistake):
        token_store.open(f"{bucket}/nothing")


# Without the client.


def test_a_missing_client_is_answered_with_the_line_that_installs_it():
    source = """
import sys
sys.modules["gcsfs"] = sys.modules["s3fs"] = None
from jaxlm import program, report
for address in sys.argv[1:]:
    try:
        program.run("report", report.main, [address])
    except SystemExit as e:
        print(e.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", source, "gs://bucket/run", "s3://bucket/run"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout == "2\n2\n" and len(done.stderr.splitlines()) == 2, done.stderr
    for line, extra in zip(done.stderr.splitlines(), ("gcs", "s3")):
        assert f'pip install "jaxlm[{extra}]"' in line
