"""Writes ONNX files with PyTorch's exporter, simplifies and optionally quantises them, and runs them."""

import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import UserError
from ..models.spatial_mamba import SpatialMambaBackbone, SpatialMambaEncoder
from .programs import Size, export_program, quiet

OPSET = 20  # the first with Gelu
NARROWEST = 32  # rows and columns of quantised matrices; smaller ones would lose precision and gain no speed
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_PYTORCH = "2.7"  # whose exporter takes products of matrices with any batch size


def export_onnx(
    model: SpatialMambaEncoder,
    path: str | PathLike[str],
    size: Size = 224,
    metadata: Mapping[str, str] | None = None,
    int8: bool = False,
) -> None:
    """Write the model as an ONNX file, for any batch size and one image size.

    The input is ``images`` (batch, in_chans, height, width), the output ``logits`` (batch, num_classes), or
    ``feature{i}`` for each map of a backbone. The graph has no loops or branches.

    Args:
        model: see ``export_program``; on any device.
        path: the file to write.
        size: height and width of the images, or one number for both.
        metadata: stored in the file.
        int8: quantise the matrices of linear layers to 8 bits per output channel. Their inputs are quantised at run
            time.

    Raises:
        UserError: if the size is too small, a package is missing, or PyTorch is too old.
        RuntimeError: for a fused model, or one in training mode.
    """
    require_exporter()
    import onnx
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule, reshape_reshape_rule

    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            export_program(model, size),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=_output_names(model),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    # Only the parts of the exporter's optimisation that this graph needs: all of them would take quadratic time.
    optimizer.fold_constants(graph, onnx_shape_inference=True)
    rewriter.rewrite(graph, [materialize_reshape_shape_rule, reshape_reshape_rule])
    for simplify in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # removes stack traces with local paths
    ):
        simplify(graph)
    graph.metadata_props.update(metadata or {})
    proto = program.model_proto
    if int8:
        proto = _quantised(proto)
        onnx.helper.set_model_props(proto, dict(metadata or {}))  # without the quantiser's own entry
    onnx.save(proto, path)


def _output_names(model: SpatialMambaEncoder) -> list[str]:
    if isinstance(model, SpatialMambaBackbone):
        return [f"feature{i}" for i in model.out_indices]
    return ["logits"]


def _quantised(proto: Any) -> Any:
    """Quantise the weights to int8; activations are quantised by their range at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shapes = {weight.name: tuple(weight.dims) for weight in proto.graph.initializer}
    nodes = [
        node.name
        for node in proto.graph.node
        if node.op_type == "MatMul" and min(shapes.get(node.input[1], (0,))) >= NARROWEST
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        logging.disable(logging.WARNING)  # it recommends constant folding, which has been done
        try:
            quantize_dynamic(
                proto,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=nodes,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(path)


def onnx_session(path: str | PathLike[str], threads: int = 0) -> Any:
    """Open a file in ONNX Runtime on the CPU; with ``threads=0`` the runtime chooses the number of threads.

    Raises:
        UserError: without ONNX Runtime.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_function(path: str | PathLike[str]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The file as a function of images, run by ONNX Runtime on the CPU.

    Raises:
        UserError: without ONNX Runtime.
    """
    session = onnx_session(path)
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def require_exporter() -> None:
    """Raise UserError unless PyTorch and the installed packages can write ONNX files."""
    if torch.__version__ < f"{OLDEST_PYTORCH}.dev0":  # pre-releases are new enough
        raise UserError(f"ONNX files need PyTorch {OLDEST_PYTORCH} or newer, but this is {torch.__version__}")
    require_onnx()


def require_onnx() -> None:
    """Raise UserError unless the packages for ONNX files are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need more packages: pip install {' '.join(missing)}")


@dataclass(frozen=True)
class OnnxFacts:
    """The version of the operators in a file, and the number of nodes of each operator."""

    opset: int
    operators: Counter[str]

    @property
    def nodes(self) -> int:
        """Total number of nodes."""
        return self.operators.total()


def onnx_facts(path: str | PathLike[str]) -> OnnxFacts:
    """Count the operators of a file."""
    import onnx

    proto = onnx.load(path)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxFacts(opset, Counter(node.op_type for node in proto.graph.node))
