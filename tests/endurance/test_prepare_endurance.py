"""`jaxlm prepare` at length: two gigabytes in bounded memory, and kill -9 at random moments."""

import json
import random
import subprocess
import sys
import time

import psutil
import pytest

from jaxlm.data import store

pytestmark = pytest.mark.endurance

PREPARE = """
import json, sys
from jaxlm import prepare
from jaxlm.data import encode, pipeline
if __name__ == "__main__":
    path, source, commit, encode.BATCH = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    prepare.COMMIT = pipeline.PART = commit
    encode.BESIDE = 0
    prepare.prepare(path, dict(docs=source), dict(kind="bytes"), workers=2, **json.loads(sys.argv[5]))
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", PREPARE, *map(str, arguments)], stdout=subprocess.DEVNULL)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def resident(process):
    """Bytes of memory of a process and all its children, pages that they share counted for each."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def write_lines(path, size, length):
    """Write about `size` bytes of different lines of about `length`; returns how many lines and bytes they are."""
    words = random.Random(0).choices(["the", "of", "and", "to", "in", "that", "is", "was", "token", "ships"], k=200_000)
    block = " ".join(words).encode()
    lines = written = 0
    with path.open("wb") as file:
        while written < size:
            first = lines * 7919 % (len(block) - length)
            written += file.write(b"%d %s\n" % (lines, block[first : first + length]))
            lines += 1
    return lines, written


def test_two_gigabytes_are_prepared_in_one_and_a_half_of_memory(tmp_path):
    documents, size = write_lines(tmp_path / "big.txt", 2 << 30, 20_000)
    begun, peak = time.perf_counter(), 0
    process = start(tmp_path / "store", f"text:{tmp_path}/big.txt?documents=line", 4 << 20, 1 << 18, "{}")
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, resident(watched))
        time.sleep(0.1)
    assert process.returncode == 0
    seconds = time.perf_counter() - begun
    print(f"peak {peak / 2**20:,.0f} MiB, {seconds:.0f} s, {size / seconds / 1e6:.1f} MB/s")
    splits = store.open(f"{tmp_path}/store").manifest("docs")["splits"].values()
    assert sum(split["documents"] for split in splits) == documents
    assert sum(split["bytes"] for split in splits) == size - documents  # without the line ends
    assert peak < 1.5 * 2**30


RULES = dict(clean=["unicode", "pii", dict(name="length", max_words=245)], dedup=dict(near=0.8))


@pytest.mark.parametrize("size, rules", [(100 << 20, {}), (20 << 20, RULES)], ids=["plain", "rules"])
def test_killed_at_random_moments_it_ends_in_the_very_same_bytes(size, rules, tmp_path):
    write_lines(tmp_path / "text.txt", size, 1_000)
    arguments = (
        f"text:{tmp_path}/text.txt?documents=line",
        1 << 20,
        1 << 15,
        json.dumps(rules),
    )  # a commit is 32 batches, a shard 16 commits
    begun = time.perf_counter()
    assert start(tmp_path / "straight", *arguments).wait() == 0
    seconds, kills, rng = time.perf_counter() - begun, 0, random.Random(0)
    for _ in range(10):
        process = start(tmp_path / "killed", *arguments)
        try:
            process.wait(rng.uniform(0.1, 0.3) * seconds)
            break
        except subprocess.TimeoutExpired:
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            kills += 1
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlive their parent"
    assert kills >= 3
    assert start(tmp_path / "killed", *arguments).wait() == 0
    assert contents(tmp_path / "straight") == contents(tmp_path / "killed")
    print(f"{kills} kills, {seconds:.1f} s uninterrupted")
