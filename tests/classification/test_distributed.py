"""Runs of two processes, started with torchrun."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from spatial_mamba.classification.checkpoint import BEST, LATEST
from spatial_mamba.classification.main import main
from spatial_mamba.classification.models.weights import read_checkpoint

from .runs import accuracy_lines, assert_same, options, records

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

MAIN = Path(__file__).parents[2] / "classification" / "main.py"
SECONDS = 200  # after which processes hang


@contextmanager
def torchrun(*arguments: str, script: Path = MAIN) -> Iterator[subprocess.Popen]:
    """Start two processes. They are killed if the test fails; if they hang, each first prints where."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*launcher, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    ) as process:
        output = arguments[arguments.index("--output") + 1]
        hung = threading.Timer(SECONDS, kill_all, (output, signal.SIGABRT))
        hung.start()
        try:
            yield process
        except BaseException:
            kill_all(output, signal.SIGKILL)
            raise
        finally:
            hung.cancel()


def read_until(process: subprocess.Popen, words: str) -> str:
    """What the processes print, up to the line with ``words``."""
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    pytest.fail(f"these words were never printed: {words}\n{printed}")


def kill_all(output: str, number: int) -> int:
    """Send a signal to the launcher of a run and all its processes, which can outlive it; returns their number."""
    table = subprocess.run(["ps", "-e", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    doomed = [int(line.split()[0]) for line in table.splitlines() if output in line.split()]
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(doomed)


MORE = ("--workers", "1", "--batch-size", "2")


@pytest.fixture(scope="module")
def undisturbed(micro: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes with loader workers."""
    output = tmp_path_factory.mktemp("undisturbed")
    with torchrun(*options(micro, photos, output, *MORE)) as process:
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
    return output / "micro" / "default"


def assert_same_runs(*runs: Path) -> None:
    """Equal checkpoints, to the last bit, and equal records."""
    a, b = (read_checkpoint(run / LATEST) for run in runs)
    assert a.pop("config")["OUTPUT"] != b.pop("config")["OUTPUT"]
    assert_same(a, b)
    names = ("epoch", "train_loss", "gradient_norm", "learning_rate", "updates", "val_acc1", "ema_acc1")
    figures = [[[record[name] for name in names] for record in records(run)] for run in runs]
    assert figures[0] == figures[1] and len(figures[0]) == 2


def test_evaluation_agrees_whatever_processes_and_batch_size(
    undisturbed: Path, micro: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """One process finds the accuracy that two have recorded."""
    best = max(records(undisturbed), key=lambda record: record["val_acc1"])
    arguments = options(micro, photos, tmp_path / "none", "--eval", "--pretrained", str(undisturbed / BEST))
    results = []
    for batch in ("4", "7"):
        assert main([*arguments, "--batch-size", batch]) == 0
        results.append(accuracy_lines(capfd.readouterr().out))
    assert results[0] == results[1]
    model, ema = results[0]
    assert f"acc@1 {best['val_acc1']:.3f}%" in model and "/15)" in model
    assert f"acc@1 {best['ema_acc1']:.3f}%" in ema
    assert not (tmp_path / "none").exists()


def test_preempted_and_killed_training_resumes_to_the_same_bits(
    undisturbed: Path, micro: Path, photos: Path, tmp_path: Path
) -> None:
    """The launcher gets SIGTERM in the first epoch; all processes get SIGKILL in the second one.

    Buffers that differ between the two processes, which have loader workers, are kept.
    """
    arguments = options(micro, photos, tmp_path, *MORE)
    stopped = tmp_path / "micro" / "default"
    with torchrun(*arguments) as process:
        read_until(process, "epoch 1/2 update 2/6")
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
        assert process.wait(30) != 0
    assert "stopped by a signal; the same command continues this run" in printed, printed
    progress = read_checkpoint(stopped / LATEST)["progress"]
    assert len(progress) == 2 and 2 <= progress[0]["totals"]["updates"] < 6
    with torchrun(*arguments) as process:
        printed = read_until(process, "epoch 2/2 update 3/6")
        assert kill_all(str(tmp_path), signal.SIGKILL) >= 3, "the launcher and two processes"
    assert "resumed from" in printed and " in epoch 1, after " in printed, printed
    content = read_checkpoint(stopped / LATEST)
    assert content["epoch"] == 0 and content["progress"] is None
    with torchrun(*arguments) as process:
        printed = process.communicate()[0]
        assert process.returncode == 0 and "resumed from" in printed, printed

    assert_same_runs(undisturbed, stopped)


def test_processes_stop_when_their_launcher_is_killed(micro: Path, photos: Path, tmp_path: Path) -> None:
    """They save their state and release the folder."""
    arguments = options(micro, photos, tmp_path, *MORE, "--epochs", "1000")
    with torchrun(*arguments) as process:
        printed = read_until(process, "epoch 1/1000 update 2/6")
        process.kill()
        printed += process.stdout.read()  # ends with the last process that writes to it
        process.wait(60)
    assert "stopped by a signal" in printed and "error:" not in printed, printed
    assert read_checkpoint(tmp_path / "micro/default" / LATEST)["progress"] is not None


def test_a_signal_to_one_process_stops_all_in_validation(micro: Path, photos: Path, tmp_path: Path) -> None:
    """The other process may be at the end of its images when the signal comes."""
    script = tmp_path / "train.py"
    script.write_text("""if True:
        import os, signal, sys
        from spatial_mamba.classification import main, trainer
        progress_of = trainer.progress_of
        def signalled(*arguments):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
            return progress_of(*arguments)
        trainer.progress_of = signalled
        sys.exit(main.main())
    """)
    with torchrun(*options(micro, photos, tmp_path, *MORE), script=script) as process:
        printed = process.communicate()[0]
    assert "stopped by a signal" in printed and "\nerror:" not in printed, printed
    assert "epoch 1/2: model" not in printed, printed
    assert read_checkpoint(tmp_path / "micro/default" / LATEST)["progress"] is not None


def test_a_killed_loader_process_is_one_error(micro: Path, photos: Path, tmp_path: Path) -> None:
    script = f"""if True:
        import os, signal, sys
        from spatial_mamba.classification import data, main
        def die(worker):
            if worker == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        data.ignore_signals = die
        sys.exit(main.main({options(micro, photos, tmp_path, "--workers", "2")!r}))
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: a loader process was killed, probably because memory ran out"), (
        result.stderr
    )
    assert result.stderr.count("\n") == 1
