"""Missing and broken packages: one line with the fix."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="OpenMMLab's packages are not installed", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

from spatial_mamba.detection.openmmlab import packages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "mmdet"}, r"mmdet, which this command needs, is missing: pip install mmdet==3\.3\.0 --force"),
        ({"missing": "mmcv"}, r"mmcv-lite, .* is missing: pip install mmcv-lite==2\.1\.0 --force-reinstall"),
        ({"versions": {"mmcv-lite": "2.2.0"}}, r"mmcv 2\.2\.0 is unsupported; it must be >= 2\.0\.0 and < 2\.2\.0: "),
        ({"versions": {"mmcv": "1.7.0"}}, r"mmcv 1\.7\.0 is unsupported"),  # the compiled one is what is imported
        ({"versions": {"mmengine": "0.7.1"}}, r"mmengine 0\.7\.1 is unsupported.*pip install mmengine==0\.10\.7"),
        ({"missing": "pkg_resources"}, r"mmengine imports pkg_resources, .*: pip install 'setuptools<82'"),
        (
            {"import": {"mmcv._ext": ImportError("undefined symbol: x")}},
            r"_ext .*\(undefined symbol: x\): pip uninstall -y mmcv",
        ),
        (
            {"import": {"cv2": ImportError("libGL.so.1")}},
            r"cv2 .*\(libGL\.so\.1\): .* opencv-python-headless",
        ),
        (
            {"import": {"torchvision": RuntimeError("no nms")}},
            r"torchvision cannot be imported \(no nms\): install",
        ),
    ],
)
def test_faulty_packages_get_a_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    def import_module(name: str) -> None:
        if name in change["import"]:
            raise change["import"][name]

    version, find = packages.importlib.metadata.version, packages.find_spec
    versions = change.get("versions", {})
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == change.get("missing") else find(name))
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: versions.get(name) or version(name))
    if "import" in change:
        monkeypatch.setattr(packages.importlib, "import_module", import_module)
    with pytest.raises(packages.UserError, match=message):
        packages.check_packages("mmdet")


def test_packages_that_are_not_installed_are_named_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = packages.importlib.metadata.version

    def only_mmengine(name: str) -> str:
        if name != "mmengine":
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(packages.importlib.metadata, "version", only_mmengine)
    with pytest.raises(packages.UserError) as error:
        packages.check_packages("mmdet")
    expected = "mmcv-lite, mmdet, which this command needs, are missing: pip install mmcv-lite==2.1.0 mmdet==3.3.0"
    assert str(error.value) == expected


@pytest.mark.parametrize("command", ["detection", "segmentation.complexity", "tools/train.py"])
def test_without_mmengine_a_command_reports_it_in_one_line(command: str) -> None:
    start = "run_module('spatial_mamba." + command + "', run_name='__main__')"
    if command.startswith("tools"):
        start = f"run_path({str(ROOT / 'detection' / command)!r}, run_name='__main__')"
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "mmengine" else find_spec(name, *package)
class Finder:
    def find_spec(self, name, *more):
        if name.split(".")[0] == "mmengine":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
sys.argv = ["command", "config.py"]
import spatial_mamba.segmentation.demo_data, spatial_mamba.detection.demo_data  # need none of the packages
runpy.{start}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 2
    install = "pip install mmengine==0.10.7 --force-reinstall --no-deps"  # its metadata is still there
    assert result.stderr == f"error: mmengine, which this command needs, is missing: {install}\n"


def test_segmentation_needs_no_mmdet_and_detection_no_mmseg() -> None:
    for task, other in (("detection", "mmseg"), ("segmentation", "mmdet")):
        code = f"import sys; sys.modules['{other}'] = None; import spatial_mamba.{task}.prediction"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
