"""Orbax on s3://, which it does not know yet (google/orbax#2739): as on gs://, but for the driver that writes arrays.

    s3.teach()

An object store cannot rename a folder, so Orbax marks what is complete by a file; it tells such stores by their prefix.
"""

import functools
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from jaxlm import paths


@functools.cache
def teach() -> None:
    """Let Orbax write and read checkpoints on s3:// in this process."""
    build = tensorstore_utils.build_kvstore_tspec

    def build_kvstore_tspec(directory: str, *args: Any, **how: Any) -> dict[str, Any]:
        if not directory.startswith("s3://"):
            return build(directory, *args, **how)
        return _amazon(build("gs://" + directory.removeprefix("s3://"), *args, **how))

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec
    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")


def _amazon(spec: Any) -> Any:
    """A TensorStore spec with Amazon's driver in the place of Google's."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") == "gcs":
        return paths.s3(spec["bucket"], spec["path"])
    return {key: _amazon(value) for key, value in spec.items()}
