"""Fixtures of all tests."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _a_test_draws_the_same_numbers_in_any_order():
    """Seed torch's global generator, from which a few tests draw."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def one_thread():
    """Run torch on one thread: small tensors gain nothing from more, and test processes share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    """Share one cache within a module, and afterwards restore torch's threads, which runs of this process change."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def leakbench(capfd):
    """Run a command line in this process; return (exit code, stdout, stderr)."""

    from leakbench import cli

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        return end.value.code, *capfd.readouterr()

    return call
