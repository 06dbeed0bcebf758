from __future__ import annotations

import numpy as np
import pytest

from relex_stream.blocks import Workspace
from relex_stream.pages import PAGE_BYTES


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f8"])
def test_buffers_for_files_agree_with_them_modulo_a_page(dtype):
    workspace = Workspace()
    for size in (1, 3, 1000, 10_000, 2):
        for offset in (0, 1, 7, 8, 24, 4095, 4096, 10**12 + 5):
            array = workspace.array("a", size, dtype, offset)
            assert (array.size, array.dtype) == (size, np.dtype(dtype))
            assert array.flags.aligned
            assert (offset - array.ctypes.data) % PAGE_BYTES < 8
            array[:] = 1  # all of it is there
            assert workspace.array("a", (size, 1), dtype).shape == (size, 1)
