"""Skips what this machine cannot run: tests marked gpu without a CUDA device, download without RLHFSCALE_DOWNLOAD=1."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("gpu") for item in items):
        import torch  # slow to import: only where a GPU test was collected

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")
    if os.environ.get("RLHFSCALE_DOWNLOAD") != "1":
        _skip(items, "download", "needs the network: set RLHFSCALE_DOWNLOAD=1")


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
