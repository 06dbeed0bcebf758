"""Checkpoints and bases on the Hugging Face Hub.

``client`` speaks with the Hub; ``steps`` finds which of its revisions or directories is which step;
``download`` puts the files of one checkpoint on the disk, and takes up what was begun; ``feed``
fetches one checkpoint ahead of the one in use; ``base`` keeps a base in the Hub's own cache.
"""

from .base import fetch_base
from .building import build_from_hub

__all__ = ["build_from_hub", "fetch_base"]
