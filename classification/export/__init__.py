"""Exports models to files that run without this package: ONNX, `torch.export` programs, AOTInductor packages."""

from .onnx_file import export_onnx
from .programs import export_aoti, export_program

__all__ = ["export_aoti", "export_onnx", "export_program"]
