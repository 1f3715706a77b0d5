"""Hold every golden's model against transformers itself, as `jaxlm convert --check` does with a folder.

    python -m scripts.check_goldens [NAME ...]      in an environment with jaxlm, torch and transformers

Prints, for each, the largest difference of its answers in every way to ask; exits with 1 where one is above 1e-4.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
import tempfile

from jaxlm import check
from tests.golden import GOLDENS, folder_of

WAYS = ("a prompt", "padded on the left", "padded on the right", "packed", "cached", "exported")


def main(names: Sequence[str]) -> int:
    """Print the table."""
    within = True
    print(f"{'':13}", *(f"{way:>19}" for way in WAYS), sep="  ")
    for name in names or GOLDENS:
        with tempfile.TemporaryDirectory() as folder:
            found = check.check(folder_of(name, Path(folder)))
        columns = [{key: x for key, x in found.items() if key[0].startswith(way)} for way in WAYS]
        print(f"{name:13}", *(f"{max(x.values()):19.1e}" if x else f"{'':19}" for x in columns), sep="  ", flush=True)
        amiss = {key: x for key, x in found.items() if not x <= check.TOLERANCE}
        for (way, what), difference in amiss.items():
            print(f"{'':13}  {way}: {what} differ by {difference:.1e}")
        within = within and not amiss
    return int(not within)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
