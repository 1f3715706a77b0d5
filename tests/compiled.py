"""Tests of a CPU's own kernels, where the machine has a C++ compiler; without one there are none to test."""

import pytest

from jaxlm.nn import native

compiled = pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
EITHER = [pytest.param(True, marks=compiled, id="own kernel"), pytest.param(False, id="no compiler")]
