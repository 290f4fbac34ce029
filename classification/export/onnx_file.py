"""ONNX files: written by PyTorch's exporter, tidied, described and, if wanted, quantised."""

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
NARROWEST = 32  # rows and columns of the matrices that are quantised: narrower ones gain nothing and lose precision
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: SpatialMambaEncoder,
    path: str | PathLike[str],
    size: Size = 224,
    metadata: Mapping[str, str] | None = None,
    int8: bool = False,
) -> None:
    """Write the model as an ONNX file, for any batch size and one image size.

    The input is ``images`` (batch, in_chans, height, width), the output ``logits`` (batch, num_classes), or
    ``feature{i}`` for each map of a backbone. The graph has no loop and no branch.

    Args:
        model: see ``export_program``; its device does not matter.
        path: of the file.
        size: height and width of the images, or one number for both.
        metadata: kept in the file.
        int8: quantise the matrices of linear layers to 8 bits per output channel, and, as the model runs, what they
            are multiplied with.

    Raises:
        UserError: for too small a size, or without the packages that this needs.
        RuntimeError: for a fused model, or one in training mode.
    """
    require_onnx()
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
    graph = program.model
    # Of the exporter's own optimisation what this graph needs: the whole takes time quadratic in the number of nodes.
    optimizer.fold_constants(graph, onnx_shape_inference=True)
    rewriter.rewrite(graph, [materialize_reshape_shape_rule, reshape_reshape_rule])
    for tidy in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # the exporter's traces of this machine
    ):
        tidy(graph)
    graph.metadata_props.update(metadata or {})
    proto = program.model_proto
    if int8:
        proto = _quantised(proto)
    onnx.save(proto, path)


def _output_names(model: SpatialMambaEncoder) -> list[str]:
    if isinstance(model, SpatialMambaBackbone):
        return [f"feature{i}" for i in model.out_indices]
    return ["logits"]


def _quantised(proto: Any) -> Any:
    """The model with weights in int8; activations are quantised by their range, as it is found at run time."""
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
        logging.disable(logging.WARNING)  # it advises to fold constants first, which is done
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
    """ONNX Runtime's session of a file, on the CPU; ``threads`` of 0 leaves their number to it.

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
    """The file as a function of images, computed by ONNX Runtime on the CPU.

    Raises:
        UserError: without ONNX Runtime.
    """
    session = onnx_session(path)
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def require_onnx() -> None:
    """Raise UserError unless the packages that write and run ONNX files are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need more packages: pip install {' '.join(missing)}")


@dataclass(frozen=True)
class OnnxFacts:
    """What a file holds: the version of the operators, and how many nodes there are of each."""

    opset: int
    operators: Counter[str]

    @property
    def nodes(self) -> int:
        """All of them."""
        return self.operators.total()


def onnx_facts(path: str | PathLike[str]) -> OnnxFacts:
    """Look into a file."""
    import onnx

    proto = onnx.load(path)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxFacts(opset, Counter(node.op_type for node in proto.graph.node))
