"""Set-up for all tests: Triton's interpreter if there is no GPU, selected before Triton is imported; plain logging."""

import logging
import os
from collections.abc import Generator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-check", action="store_true", help="count skips as failures; show failures as they happen")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-check"):
        config.pluginmanager.register(GPUCheck(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slow tests first, so that no long one is left for a single worker at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class GPUCheck:
    """For `make gpu`: on a GPU, nothing may be skipped, and a stopped run shows the failures so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped:
            *_, reason = report.longrepr
            report.outcome, report.longrepr = "failed", f"{reason}; a GPU check must run every test"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.config.get_terminal_writer().line(f"\n{report.nodeid}\n{report.longreprtext}")


@pytest.fixture(autouse=True)
def package_logger() -> None:
    """Let ``caplog`` see the package's records, even after a test in which training has set up the logger."""
    logger = logging.getLogger("spatial_mamba")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def small_instruments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks measure the speed of the machine in no time, and leave the process as it is for other tests."""
    benchmark = "spatial_mamba.kernels.benchmark"
    monkeypatch.setattr(f"{benchmark}.measure.COPY_BYTES", 2**20)
    monkeypatch.setattr(f"{benchmark}.measure.PEAK_SIZES", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(f"{benchmark}.report.keep_freed_memory", lambda: None)
