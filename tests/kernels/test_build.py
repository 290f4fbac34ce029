"""Building, checking and loading the native libraries, and the report of the backends."""

import ctypes
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spatial_mamba.kernels import __main__ as command
from spatial_mamba.kernels import backends, build, native, selective_scan, use_backend

# The levels of portable libraries that this processor supports, fastest first.
SUPPORTED = [level for level, (_, used) in build.levels().items() if set(used.split()) <= build.cpu_features()]
TINY = 'extern "C" int twice(int x) { return 2 * x; }\n'
TINY_KERNEL = "__global__ void twice(int* x) { *x *= 2; }\nvoid launch(int* x) { twice<<<1, 1>>>(x); }\n"


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    found = shutil.which("g++") or shutil.which("c++")
    return pytest.mark.slow(pytest.mark.skipif(not found, reason="no C++ compiler")(test))


def needs_level(test: Callable[..., None]) -> Callable[..., None]:
    reason = "the processor is below all levels of portable libraries"
    return needs_compiler(pytest.mark.skipif(not SUPPORTED, reason=reason)(test))


def write_sources(folder: Path, text: str = TINY, name: str = "cpu/tiny.cpp") -> Path:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's environment variables, and whatever another test has loaded, forced or printed."""
    of_package = [name for name in os.environ if name.startswith("SPATIAL_MAMBA_")]
    for variable in ("CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", *of_package):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(backends, "_missing", dict(backends._missing))
    state = {"_forced": None, "_required": False, "_interpreted": False, "_hinted": set(), "_served": {}}
    for name, value in state.items():
        monkeypatch.setattr(backends, name, value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a built library and of its sources."""
    sources, out = write_sources(tmp_path_factory.mktemp("csrc")), tmp_path_factory.mktemp("lib")
    build.build(["cpu"], out=out, sources=sources)
    return out, sources


@pytest.fixture
def copied(tiny: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy that the test may change."""
    return shutil.copytree(tiny[0], tmp_path / "lib"), shutil.copytree(tiny[1], tmp_path / "csrc")


# --- building ---------------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_built_library_loads_and_its_folder_holds_nothing_else(tiny: tuple[Path, Path]) -> None:
    out, sources = tiny
    assert native.load("cpu", out, sources) is None
    assert ctypes.CDLL(str(out / "cpu.so")).twice(21) == 42
    assert names_in(out) == ["cpu.json", "cpu.so"]
    facts = native.read_facts(out / "cpu.so")
    assert facts["PyTorch"] == torch.__version__
    assert facts["CPU features"].split() == build._used_features(build.find_compiler())
    assert facts["compilers"]


@needs_compiler
def test_features_are_those_that_the_compiler_uses_on_this_processor() -> None:
    used = build._used_features(build.find_compiler())
    expected = {"x86_64": "sse2", "aarch64": "atomics"}.get(build.platform.machine())
    assert expected is None or expected not in build.cpu_features() or expected in used
    assert "hypervisor" not in used  # a flag of Linux, not an instruction set


@needs_compiler
def test_the_standard_is_the_one_that_pytorch_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the header that the sources include, and flags as written in PyTorch 2.6 and 2.13."""
    build.build(["cpu"], out=tmp_path / "lib", sources=write_sources(tmp_path / "csrc", "#include <torch/library.h>\n"))
    monkeypatch.setattr(build, "_torch_folder", lambda: tmp_path)
    (tmp_path / "utils").mkdir()
    source = tmp_path / "utils/cpp_extension.py"
    for text, standard in (
        ("x = ['-g', '-std=c++20']\ncflags += ['-fPIC', '-std=c++17']\ncuda += ['-std=c++17']\n", "17"),
        ("cflags += ['-fPIC', '-std=c++20']\n", "20"),
        ("cflags += elsewhere\n", "20"),
    ):
        source.write_text(text)
        assert build.cxx_standard() == standard


@needs_compiler
def test_one_line_per_file_and_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_sources(tmp_path / "csrc")
    (sources / "cpu/second.cpp").write_text("int zero() { return 0; }\n")
    monkeypatch.setenv("MAX_JOBS", "0")
    with pytest.raises(build.BuildError, match="MAX_JOBS must be a positive number, got '0'"):
        build.build(["cpu"], out=tmp_path / "lib", sources=sources)
    monkeypatch.setenv("MAX_JOBS", "1")
    build.build(["cpu"], out=tmp_path / "lib", sources=sources)
    *files, last = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in files] == [["[1/2]", "second.cpp"], ["[2/2]", "tiny.cpp"]]
    assert last.startswith("built cpu in ")
    assert last.endswith(str(tmp_path / "lib"))


@needs_compiler
@pytest.mark.parametrize(
    "text", ["#error no luck", 'int elsewhere(); extern "C" int no_luck() { return elsewhere(); }']
)
def test_a_failed_build_leaves_the_old_library(
    copied: tuple[Path, Path], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out, sources = copied
    before = (out / "cpu.so").read_bytes()
    (sources / "cpu/broken.cpp").write_text(text)
    with pytest.raises(build.BuildError, match=r"(broken\.cpp|^cpu\.so) could not be built"):
        build.build(["cpu"], out=out, sources=sources)
    assert "luck" in capfd.readouterr().err  # the compiler's own words
    assert (out / "cpu.so").read_bytes() == before
    assert names_in(out) == ["cpu.json", "cpu.so"]


@needs_compiler
def test_a_failed_build_does_not_lose_the_other_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"cpu": write_sources(tmp_path / "broken", "#error no luck"), "cuda": write_sources(tmp_path / "csrc")}
    prepare = build.prepare
    monkeypatch.setattr(build, "prepare", lambda name, *_: replace(prepare("cpu", (), sources[name]), name=name))
    with pytest.raises(build.BuildError, match=r"tiny\.cpp could not be built"):
        build.build(["cpu", "cuda"], out=tmp_path / "lib")
    assert "built cuda in " in capsys.readouterr().out
    assert names_in(tmp_path / "lib") == ["cuda.json", "cuda.so"]


@needs_compiler
def test_folders_of_killed_builds_are_removed(tmp_path: Path) -> None:
    sources, running, killed = write_sources(tmp_path / "csrc"), tmp_path / ".build-running", tmp_path / ".build-killed"
    for folder in (running, killed):
        folder.mkdir()
        (folder / "0.o").touch()
    os.utime(killed, (0, time.time() - 2 * build.ABANDONED_SECONDS))
    build.build(["cpu"], out=tmp_path, sources=sources)
    assert running.exists() and not killed.exists()


@needs_compiler
def test_two_builds_at_once_leave_one_good_library(tmp_path: Path) -> None:
    out, sources = tmp_path / "lib", write_sources(tmp_path / "csrc")
    with ThreadPoolExecutor() as pool:
        built = [pool.submit(build.build, ["cpu"], (), out, sources) for _ in range(3)]
    assert [future.result() for future in built] == [["cpu"]] * 3
    assert native.load("cpu", out, sources) is None
    assert names_in(out) == ["cpu.json", "cpu.so"]


@needs_compiler
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(build.BuildError, match=rf"cannot write to {tmp_path}/file/lib .*{build.FOLDER_VARIABLE}"):
        build.build(["cpu"], out=tmp_path / "file/lib", sources=write_sources(tmp_path / "csrc"))


def test_no_sources_no_linux_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match="no sources in"):
        build.prepare("cpu", sources=tmp_path)
    sources = write_sources(tmp_path / "csrc")
    monkeypatch.setenv("CXX", "/nowhere/c++ -g")
    with pytest.raises(build.BuildError, match=r"CXX=/nowhere/c\+\+ -g was not found"):
        build.prepare("cpu", sources=sources)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler.*apt install"):
        build.prepare("cpu", sources=sources)
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    with pytest.raises(build.BuildError, match="but this is Darwin"):
        build.prepare("cpu", sources=sources)


def test_the_file_needs_no_other_module() -> None:
    """setup.py loads the module even if neither the package nor PyTorch is installed."""
    script = f"import runpy, sys; runpy.run_path({build.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", script]).returncode == 0


# --- portable libraries -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a native and of portable libraries, and of their sources."""
    out = tmp_path_factory.mktemp("both")
    shutil.copytree(tiny[0], out, dirs_exist_ok=True)
    build.build(out=out, sources=tiny[1], portable=True)
    return out, tiny[1]


@pytest.fixture
def copied_both(both: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return shutil.copytree(both[0], tmp_path / "lib"), both[1]


@needs_level
def test_a_portable_library_is_for_one_minor_release_and_a_level_of_processors(both: tuple[Path, Path]) -> None:
    folder = build.portable_folder(both[0])
    assert sorted(path.stem for path in folder.glob("*.so")) == sorted(f"cpu-{level}" for level in build.levels())
    for level, (_, features) in build.levels().items():
        facts = native.read_facts(folder / f"cpu-{level}.so")
        assert facts["PyTorch"] == ".".join(torch.__version__.split(".")[:2])
        assert (facts["level"], facts["CPU features"]) == (level, features)
        assert "PyTorch's CUDA" not in facts
        assert build.environment(portable=True).items() <= facts.items()


@needs_level
def test_the_native_library_is_preferred_and_a_portable_one_is_the_fallback(
    copied_both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sources = copied_both
    assert native.libraries("cpu", out)[0] == out / "cpu.so"
    assert native.load("cpu", out, sources) is None
    assert "level" not in native.loaded("cpu")
    change_facts(out, "PyTorch", "2.0.0")  # PyTorch was replaced since
    assert native.load("cpu", out, sources) is None
    assert native.loaded("cpu")["level"] == SUPPORTED[0]
    (out / "cpu.so").unlink()
    monkeypatch.setattr(torch, "__version__", f"{build._minor_release()}.7+another")
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    native._loaded.clear()
    assert native.load("cpu", out, sources) is None
    assert native.loaded("cpu")["level"] == SUPPORTED[0]


@needs_level
def test_the_fastest_level_of_the_processor_is_chosen_and_a_variable_forces_another(
    copied_both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sources = copied_both
    (out / "cpu.so").unlink()
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    for level, (_, features) in build.levels().items():
        with monkeypatch.context() as patch:
            patch.setattr(build, "cpu_features", lambda features=features: {*features.split(), "hypervisor"})
            assert native.load("cpu", out, sources) is None
        assert native.loaded("cpu")["level"] == level
    slowest = level
    for level in SUPPORTED:
        monkeypatch.setenv(native.LEVEL_VARIABLE, level)
        assert native.load("cpu", out, sources) is None
        assert native.loaded("cpu")["level"] == level

    monkeypatch.setenv(native.LEVEL_VARIABLE, slowest)
    with pytest.raises(
        ImportError, match=rf"^SPATIAL_MAMBA_CPU_LEVEL={slowest} cannot be used: not built\. Unset it; "
    ):
        native.load("cpu", out / "nowhere", sources)
    monkeypatch.setattr(build, "cpu_features", lambda: set())
    with pytest.raises(ImportError, match=rf"LEVEL={slowest} cannot be used: built for a processor with .*--portable"):
        native.load("cpu", out, sources)
    monkeypatch.setenv(native.LEVEL_VARIABLE, "x86-64")
    with pytest.raises(ImportError, match=rf"^SPATIAL_MAMBA_CPU_LEVEL must be one of .*{slowest}, got 'x86-64'$"):
        native.load("cpu", out, sources)
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert native.load("cuda", out, sources) == f"not built: {native.BUILD_COMMAND} cuda"  # it has no levels


@needs_level
def test_portable_libraries_are_refused_for_other_releases_abis_and_older_processors(
    copied_both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sources = copied_both
    folder = build.portable_folder(out)
    (out / "cpu.so").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(build, "cpu_features", lambda: {"sse2"})
        least = sorted(list(build.levels().values())[-1][1].split())
        assert f"built for a processor with {', '.join(least[:6])}, which this" in refusal(out, sources, patch)
    with monkeypatch.context() as patch:
        abi = torch.compiled_with_cxx11_abi()
        patch.setattr(torch, "compiled_with_cxx11_abi", lambda: not abi)
        assert refusal(out, sources, patch).startswith("built for C++ ABI ")
    for version in ("2.99.0", "2.99.0a0+git1234"):  # a future release, and a preview of it
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", version)
            assert refusal(out, sources, patch).startswith("not built: ")
            folder = folder.rename(build.portable_folder(out))
            assert f"but this is {build._minor_release()}: " in refusal(out, sources, patch)


@needs_level
def test_a_portable_library_shares_pytorchs_openmp(tmp_path: Path) -> None:
    text = (
        "#include <cmath>\n"
        'extern "C" double total(double x) {\n'
        "  double sum = 0;\n"
        "#pragma omp parallel for reduction(+ : sum) num_threads(2)\n"
        "  for (int i = 0; i < 8; ++i) sum += std::exp(x);\n"
        "  return sum;\n"
        "}\n"
    )
    sources = write_sources(tmp_path / "csrc", text)
    build.build(["cpu"], out=tmp_path, sources=sources, portable=True)
    library = build.portable_folder(tmp_path) / f"cpu-{SUPPORTED[0]}.so"
    assert "gomp" not in build._output(["readelf", "--dynamic", str(library)])
    assert str(tmp_path).encode() not in library.read_bytes()
    torch.ops.load_library(library)
    total = ctypes.CDLL(str(library)).total
    total.argtypes, total.restype = [ctypes.c_double], ctypes.c_double
    assert total(1.0) == pytest.approx(8 * math.e)


def test_portable_libraries_are_for_the_cpu_and_for_known_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"names": ["cpu", "cuda"]}, {"architectures": ["9.0"]}):
        with pytest.raises(build.BuildError, match="only the cpu library can be portable"):
            build.build(**options, portable=True)
    monkeypatch.setattr(build.platform, "machine", lambda: "sparc64")
    with pytest.raises(build.BuildError, match="portable libraries need x86_64 or aarch64, but this is sparc64"):
        build.build(portable=True)


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> build.Toolkit:
    """A toolkit that claims to be version 99.0."""
    root = tmp_path / "toolkit"
    nvcc = root / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo release 99.0, V99.0.1 || echo compute_80 compute_90 compute_100\n'
    )
    nvcc.chmod(0o755)
    (root / "include").mkdir()
    (root / "include/cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(root))
    return build.Toolkit(root, "99.0", root / "include")


def test_the_toolkit_matches_pytorch_in_its_major_version(
    toolkit: build.Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "99.2")
    assert build.find_toolkit() == toolkit
    monkeypatch.setattr(torch.version, "cuda", "98.0")
    with pytest.raises(build.BuildError, match=rf"toolkit 98 is needed.*99\.0 in {toolkit.root}"):
        build.find_toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="without CUDA"):
        build.find_toolkit()


def test_architectures_are_named_by_argument_variable_gpu_or_default(
    toolkit: build.Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build._chosen_architectures([], toolkit) == ["8.0", "9.0", "10.0"]
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (3, 5)][index])
    assert build._chosen_architectures([], toolkit) == ["9.0"]  # not the old one, which the toolkit does not support
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0;8.0 9.0a+PTX")
    assert build._chosen_architectures([], toolkit) == ["8.0", "9.0", "10.0"]
    assert build._chosen_architectures(["8.0"], toolkit) == ["8.0"]
    with pytest.raises(build.BuildError, match=r"cannot compile for '5\.2'; it knows 8\.0, 9\.0, 10\.0"):
        build._chosen_architectures(["5.2"], toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(build, "ARCHITECTURES", ("7.0",))
    with pytest.raises(build.BuildError, match=r"choose with --arch what CUDA toolkit 99\.0 compiles for: 8\.0, 9\.0"):
        build._chosen_architectures([], toolkit)
    with pytest.raises(build.BuildError, match="only the cuda library is built for architectures of GPUs"):
        build.build(["cpu"], ["9.0"])
    assert build._code_flags(["8.0", "10.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@needs_compiler
def test_a_cuda_library_is_compiled_where_a_toolkit_is(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "csrc", TINY_KERNEL, "cuda/tiny.cu")
    try:
        newest = build.find_toolkit().architectures()[-1]
        build.prepare("cuda", [newest], sources)
    except build.BuildError as obstacle:
        pytest.skip(str(obstacle))
    build.build(["cuda"], [newest], tmp_path / "lib", sources)
    assert native.load("cuda", tmp_path / "lib", sources) is None
    assert native.kernels_for(build.capability(newest))
    assert not native.kernels_for((3, 5))


@needs_compiler
def test_without_names_cuda_is_built_only_where_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = write_sources(tmp_path / "csrc")
    write_sources(sources, TINY_KERNEL, "cuda/tiny.cu")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.build(out=tmp_path / "lib", sources=sources) == ["cpu"]
    assert "cuda: not built, PyTorch is built without CUDA" in capsys.readouterr().out
    with pytest.raises(build.BuildError, match="without CUDA"):
        build.build(["cpu", "cuda"], out=tmp_path / "other", sources=sources)
    assert not (tmp_path / "other").exists()


def test_code_serves_its_generation_and_ptx_all_later_ones() -> None:
    assert not native.kernels_for((9, 0))  # no library
    native._loaded["cuda"] = {"compute capabilities": "8.0 9.0", "PTX": "9.0"}
    served = [c for c in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)] if native.kernels_for(c)]
    assert served == [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)]
    native._loaded["cuda"] = {"compute capabilities": "8.6", "PTX": "8.6"}
    assert not native.kernels_for((8, 0))


def test_a_gpu_without_code_is_served_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._missing.update(cuda=None, triton=None)
    native._loaded["cuda"] = {"compute capabilities": "8.0", "PTX": "8.0"}
    assert backends.serving("cuda", torch.float32, (9, 0)) == "cuda"
    reason = r"built without code for compute capability 7\.5: .* build cuda --arch 7\.5"
    with pytest.warns(UserWarning, match=f"run on the 'triton' backend; 'cuda' would be faster: {reason}"):
        assert backends.serving("cuda", torch.float32, (7, 5)) == "triton"
    with use_backend("cuda"), pytest.raises(RuntimeError, match=reason):
        backends.serving("cuda", torch.float32, (7, 5))
    monkeypatch.setattr(backends, "_required", True)
    with pytest.raises(RuntimeError, match=f"REQUIRE_NATIVE=1, but the cuda backend cannot be used: {reason}"):
        backends.serving("cuda", torch.float32, (7, 5))


# --- loading ----------------------------------------------------------------------------------------------------------


def change_facts(out: Path, fact: str, value: object) -> None:
    facts = native.read_facts(out / "cpu.so")
    assert fact in facts
    (out / "cpu.json").write_text(json.dumps({**facts, fact: value}))


def refusal(out: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason that ``load`` gives for not loading the library."""
    touched = []
    monkeypatch.setattr(torch.ops, "load_library", touched.append)
    reason = native.load("cpu", out, sources)
    assert touched == []
    assert reason.endswith(f": {native.BUILD_COMMAND} cpu")
    assert "\n" not in reason
    return reason


@needs_compiler
@pytest.mark.parametrize(
    ("fact", "value", "reason"),
    [
        ("PyTorch", "2.0.0+cu117", f"built for PyTorch 2.0.0+cu117, but this is {torch.__version__}"),
        ("PyTorch", None, "built for PyTorch unknown"),
        ("PyTorch's CUDA", "11.7", "built for PyTorch's CUDA 11.7"),
        ("platform", "Linux sparc64", "built for platform Linux sparc64"),
        ("C++ ABI", "other", "built for C++ ABI other"),
        ("CPU features", "warp_drive", "processor with warp_drive, which this one lacks"),
        ("CPU features", 5, "cannot be loaded"),
        ("sources", "0" * 64, "built from different sources"),
        ("bytes", 1, "is damaged"),
    ],
)
def test_a_library_for_another_environment_is_named_and_not_loaded(
    copied: tuple[Path, Path], fact: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_facts(copied[0], fact, value)
    assert reason in refusal(*copied, monkeypatch)


@needs_compiler
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2]", b"\xff\xfe\x00"])
def test_a_library_without_readable_facts_is_not_loaded(
    copied: tuple[Path, Path], content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied[0] / "cpu.json").unlink()
    if content is not None:
        (copied[0] / "cpu.json").write_bytes(content)
    assert "cpu.json, which records what" in refusal(*copied, monkeypatch)


@needs_compiler
def test_changed_sources_and_missing_libraries_are_named(
    copied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sources = copied
    header = sources / "shared.h"
    header.write_text("// new")
    assert "built from different sources" in refusal(out, sources, monkeypatch)
    header.rename(sources / "notes.txt")  # no part of the library
    assert native._mismatch("cpu", out / "cpu.so", native.read_facts(out / "cpu.so"), sources) is None
    monkeypatch.setitem(build.FLAGS, ("cpu", ".cpp"), ("-O0",))
    assert "built from different sources" in refusal(out, sources, monkeypatch)
    assert refusal(tmp_path / "nowhere", sources, monkeypatch) == f"not built: {native.BUILD_COMMAND} cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in native.load("cuda", out, sources)


@needs_compiler
def test_a_library_that_the_system_cannot_load_is_a_reason_not_an_error(copied: tuple[Path, Path]) -> None:
    library = copied[0] / "cpu.so"
    library.write_bytes(bytes(library.stat().st_size))
    assert "cannot be loaded" in native.load("cpu", *copied)
    assert native._loaded == {}


def test_a_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library_folder() == Path(build.__file__).parent / "lib"
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path))
    assert build.library_folder() == tmp_path
    assert native.load("cpu") == f"not built: {native.BUILD_COMMAND} cpu"


# --- choosing ---------------------------------------------------------------------------------------------------------


def scan() -> torch.Tensor:
    u = torch.ones(1, 2, 3)
    return selective_scan(u, u, -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3))


def test_a_missing_library_is_hinted_at_once_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._missing["cpu"] = "not built: ask for it"
    with pytest.warns(
        UserWarning, match="cpu operators run on the 'torch' backend; 'cpu' would be faster: not built: ask for it"
    ) as hints:
        scan()
        scan()
    assert len(hints) == 1

    monkeypatch.setattr(backends, "_required", True)
    backends._served.clear()
    for function in (scan, torch.compile(scan, backend="eager")):
        with pytest.raises(RuntimeError, match=r"REQUIRE_NATIVE=1, but the cpu backend cannot be used: not built"):
            function()
    with use_backend("torch"):  # requested by name
        scan()
    assert backends.serving("cuda", torch.float64) == "torch"  # no library supports float64


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._missing["cpu"] = "not built: ask for it"
    for name, reason in {
        "cpu": "not built: ask for it",
        "cuda": "no kernels for cpu tensors",
        "triton": "TRITON_INTERPRET=1",
    }.items():
        with (
            use_backend(name),
            pytest.raises(RuntimeError, match=f"'{name}' is forced, but cannot be used: .*{reason}"),
        ):
            scan()
    with pytest.raises(ValueError, match="must be one of cpu, cuda, triton, torch"), use_backend("gpu"):
        pass
    monkeypatch.setenv(backends.FORCE_VARIABLE, "gpu")
    with pytest.raises(ImportError, match="SPATIAL_MAMBA_BACKEND must be one of"):
        backends._read_force_variable()


def test_triton_needs_a_recent_version_and_a_compiler_unless_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in (None, SimpleNamespace(origin=None)):  # of nothing, and of a plain folder
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert "pip install triton" in backends._why_no_triton()
        assert ", Triton none, " in command.report()
    module = tmp_path / "__init__.py"
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(module)))
    module.write_text('"""isort"""\n__version__ = "3.3.1"\n')
    assert backends._why_no_triton().startswith("Triton 3.3.1 is too old, 3.4 is needed")
    module.write_text("__version__ = version('triton')\n")
    assert "too old" not in (backends._why_no_triton() or "")
    module.write_text("__version__ = '3.10.0+git'\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler" in backends._why_no_triton()
    monkeypatch.setattr(backends, "_interpreted", True)
    assert backends._why_no_triton() is None


@pytest.mark.slow
def test_native_code_required_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The package can still be imported, so that the library can be built; the first call raises."""
    script = (
        "import torch\n"
        "from spatial_mamba.kernels import selective_scan\n"
        "from spatial_mamba.kernels.__main__ import report\n"
        "print(report())\n"
        "x = torch.ones(1, 1, 1)\n"
        "selective_scan(x, x, -torch.ones(1, 1), x)\n"
    )
    variables = {backends.REQUIRE_VARIABLE: "1", build.FOLDER_VARIABLE: str(tmp_path)}
    python = [sys.executable, "-c", script]
    result = subprocess.run(python, capture_output=True, text=True, env=os.environ | variables)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        "RuntimeError: SPATIAL_MAMBA_REQUIRE_NATIVE=1, but the cpu backend cannot be used: not built"
    )
    assert native.BUILD_COMMAND in last
    assert "error: SPATIAL_MAMBA_REQUIRE_NATIVE=1" in result.stdout
    assert f"forced by the environment: SPATIAL_MAMBA_REQUIRE_NATIVE=1, SPATIAL_MAMBA_LIB={tmp_path}" in result.stdout


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_report_shows_the_backend_in_use_and_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends._missing.update(cpu=native.load("cpu"), cuda=None, triton=None)
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["serving", "float32", "bfloat16", "float16", "float64"]
    assert lines[1].split()[:5] == ["cpu", "torch", "torch", "torch", "torch"]
    assert lines[2].split()[:5] == ["cuda", "-", "-", "-", "-"]
    assert any(line.startswith("  cpu     on cpu   not built: python -m spatial_mamba.kernels build") for line in lines)
    assert any("on cuda" in line and "no GPU that PyTorch can use" in line for line in lines)
    assert "  cpu.so: none" in lines
    assert any(line.startswith(f"PyTorch {torch.__version__}, CUDA") for line in lines)
    assert max(map(len, lines)) < 240


def test_the_report_on_gpus_and_on_what_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["NVIDIA H200", "NVIDIA H200", "Tesla T4"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index < 2 else (7, 5))
    backends._missing.update(cpu=f"not built: {native.BUILD_COMMAND} cpu", cuda=None, triton=None)
    native._loaded["cuda"] = {"compute capabilities": "9.0", "PTX": "9.0"}
    text = command.report()
    rows = [line.split() for line in text.splitlines() if line.startswith("cuda")]
    assert rows == [
        ["cuda", "cuda", "cuda", "cuda", "torch", "NVIDIA", "H200", "(9.0)"],
        ["cuda", "triton", "triton", "triton", "torch", "Tesla", "T4", "(7.5)"],
    ]
    assert "float32, bfloat16, float16: built without code for compute capability 7.5" in text
    assert "build cpu; but no C++ compiler" in text


@needs_compiler
def test_the_report_shows_a_librarys_facts_and_a_forced_backend(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tiny[0]))
    monkeypatch.setenv(backends.FORCE_VARIABLE, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with use_backend("cuda"):
        text = command.report()
    assert text.splitlines()[1].split()[:5] == ["cpu", "error", "error", "error", "error"]
    assert "error: the backend 'cuda' is forced, but cannot be used" in text
    assert f"compilers: {native.read_facts(tiny[0] / 'cpu.so')['compilers']}" in text
    assert "forced by the environment: SPATIAL_MAMBA_BACKEND=cuda" in text


@needs_level
def test_the_report_shows_the_portable_library_in_use(
    copied_both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sources = copied_both
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(out / "mine"))
    monkeypatch.setattr(build, "PACKAGE", out.parent)
    assert native.load("cpu", sources=sources) is None
    monkeypatch.setenv(native.LEVEL_VARIABLE, SUPPORTED[0])
    lines = command.report().splitlines()
    for level in build.levels():
        used = ", in use" * (level == SUPPORTED[0])
        assert f"  cpu-{level}.so, portable, {build.portable_folder(out)}{used}" in lines
    assert lines.count(f"    level: {SUPPORTED[0]}") == sum(line.startswith("    level: ") for line in lines) == 1
    assert any(line.startswith("forced by ") and f"_CPU_LEVEL={SUPPORTED[0]}" in line for line in lines)


@needs_compiler
def test_the_build_command_names_its_folder_or_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: tuple[Path, Path]
) -> None:
    monkeypatch.setattr(build, "build", functools.partial(build.build, sources=tiny[1]))
    assert command.main(["build", "cpu", "--out", str(tmp_path / "lib")]) == 0
    assert f"export SPATIAL_MAMBA_LIB={tmp_path / 'lib'}" in capsys.readouterr().out
    if build.levels():
        assert command.main(["build", "--portable", "--out", str(tmp_path / "lib")]) == 0
        assert f"cpu-{list(build.levels())[-1]} in " in capsys.readouterr().out
        assert names_in(tmp_path / "lib") == ["cpu.json", "cpu.so", build.portable_folder(Path()).name]
    assert command.main(["build", "tpu"]) == 2
    assert "there is no library 'tpu': choose from cpu, cuda" in capsys.readouterr().err

    monkeypatch.setenv("PATH", str(tmp_path))
    for names in ([], ["cpu"], ["cuda"]):
        assert command.main(["build", *names]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


def test_usable_libraries_are_kept_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = []
    monkeypatch.setattr(build, "build", lambda names, *_, **__: built.append(names))
    gpus = [command.Device("cuda", "a GPU", (9, 0))]
    monkeypatch.setattr(command, "_devices", lambda: gpus)
    native._loaded["cuda"] = {"compute capabilities": "9.0"}
    assert command.main(["build", "cpu", "cuda", "--missing"]) == 0
    assert built == [["cpu"]] and capsys.readouterr().out == "cuda: works here as it is\n"
    assert command.main(["build", "cuda", "--missing"]) == 0
    assert built == [["cpu"]]
    gpus.append(command.Device("cuda", "another", (12, 0)))
    assert command.main(["build", "cuda", "--missing"]) == 0
    assert built == [["cpu"], ["cuda"]]
    for options in ([], ["cuda", "--portable"], ["cuda", "--out", "folder"]):
        assert command.main(["build", *options, "--missing"]) == 2
        assert "--missing: name libraries, without --portable and --out" in capsys.readouterr().err
