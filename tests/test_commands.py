"""The command ``spatial-mamba``, and the help of every command."""

import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba import __version__
from spatial_mamba.__main__ import COMMANDS, main


@pytest.mark.slow
def test_every_command_gives_help_without_what_only_posix_has() -> None:
    script = """if True:
        import contextlib, importlib.util, io, os, runpy, signal, sys, warnings
        import torch._dynamo, timm.data, torchvision, matplotlib.pyplot  # these know their system
        openmmlab = importlib.util.find_spec("mmdet") and importlib.util.find_spec("mmseg")
        if openmmlab:
            import mmdet.apis, mmseg.apis
        for name in ("fcntl", "grp", "pwd", "resource", "termios"):
            sys.modules[name] = None  # cannot be imported
        for module, names in ((os, "fork getuid killpg sched_getaffinity setsid"), (signal, "SIGKILL SIGUSR1 SIGHUP")):
            for name in names.split():
                delattr(module, name)

        from spatial_mamba.__main__ import COMMANDS
        commands = [["spatial_mamba", *name.split()] for name in ("", *COMMANDS)]
        modules = "kernels kernels.benchmark tests.gpu_check classification.main"
        modules += " classification.demo_data classification.benchmark classification.benchmark.loading"
        if openmmlab:
            for task in (" detection", " segmentation"):
                modules += f"{task}{task}.complexity{task}.demo_data{task}.tools.train{task}.tools.test"
        commands += [[f"spatial_mamba.{name}"] for name in modules.split()]
        for module, *words in commands:
            sys.argv = [module, *words, "--help"]
            try:
                with contextlib.redirect_stdout(io.StringIO()) as shown:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                assert not end.code and "usage: " in shown.getvalue(), sys.argv
                tool = words or "detection" in module or "segmentation" in module
                assert not tool or "demo_data" in module or "\\nexample: " in shown.getvalue(), sys.argv
            else:
                raise AssertionError(sys.argv)
    """
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_help_and_the_package_load_nothing_heavy_that_timm_does_not() -> None:
    script = """if True:
        import contextlib, io, sys
        import timm
        with_timm = set(sys.modules)
        from spatial_mamba.__main__ import COMMANDS, main
        for name in ("", *COMMANDS):
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                main([*name.split(), "--help"])
        heavy = {"fvcore", "huggingface_hub.hf_api", "matplotlib", "mmengine", "onnx", "onnxscript", "sklearn"}
        heavy |= {"tensorboard", "torch._inductor.compile_fx", "torch.utils.tensorboard", "torchvision", "triton"}
        print(*(heavy & set(sys.modules) - with_timm))
    """
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "\n"


@pytest.mark.parametrize("start", ([], ["-m", "spatial_mamba"]))
@pytest.mark.parametrize("words", ([], ["--help"], ["benchmark", "--help"], ["--version"], ["predcit"]))
def test_commands_are_listed_without_pytorch(start: list[str], words: list[str], tmp_path: Path) -> None:
    if not start:
        start = [str(tmp_path / "spatial-mamba")]
        Path(start[0]).write_text("import sys\nfrom spatial_mamba.__main__ import main\nsys.exit(main())\n")
    command = [sys.executable, "-X", "importtime", *start, *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == (2 if words == ["predcit"] else 0)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "spatial_mamba" in imported and imported.isdisjoint({"torch", "timm", "numpy"})


@pytest.mark.slow
@pytest.mark.parametrize("start", (["-c", "import program"], ["-m", "program.train"]), ids=" ".join)
def test_other_programs_get_the_models_with_the_package(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    script = "import spatial_mamba, timm; print(*timm.list_models('spatial_mamba_*'))"
    (tmp_path / "program/__init__.py").write_text(script)
    (tmp_path / "program/train.py").touch()
    command = [sys.executable, *start, "--backbone", "spatial_mamba"]
    shown = subprocess.check_output(command, text=True, cwd=tmp_path)
    assert shown.split() == ["spatial_mamba_base", "spatial_mamba_small", "spatial_mamba_tiny"]


def test_commands_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spatial-mamba {__version__}\n"


@pytest.mark.parametrize("words", (["predcit", "photo.jpg"], ["benchmark"], ["photo.jpg", "--checkpoint", "w.pth"]))
def test_unknown_commands_are_one_line(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{words[0]}") and error.count("\n") == 1
    assert "choose from predict, train" in error and "Images go after predict" in error


def test_training_and_evaluation_take_their_own_options(capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--cfg", "spatialmamba_tiny", "--epochs", "3"]) == 2
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err
    assert main(["evaluate", "--cfg", "spatialmamba_tiny", "--output", "runs"]) == 2
    assert "--data-path is missing" in capsys.readouterr().err, "it may be given, but is not shown"
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--output" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--list-keys"])
    table = capsys.readouterr().out
    assert "\nTRAIN.BASE_LR " in table and "\nDATA.BATCH_SIZE " in table and "--batch-size" in table
