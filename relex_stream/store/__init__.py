"""The delta store on disk: its layout, reading it, and appending to it.

``files`` holds every call that changes the disk; ``records`` the immutable records and HEAD;
``arrays`` the zarr side; ``read`` and ``write`` the store itself. The format is written down in
``docs/store-format.md``.
"""

from relex_stream.store.read import SketchReader, Store
from relex_stream.store.write import StoreWriter

__all__ = ["SketchReader", "Store", "StoreWriter"]
