"""mmcv's operators on top of torchvision and PyTorch, for all devices; imported as ``mmcv._ext``.

The functions have the names and arguments that ``mmcv.ops`` uses; most write their result into a given tensor. They
agree with the compiled operators. For dtypes that those refuse (bfloat16, and float16 in ``nms``) they compute in
float32. Every other name is a function that raises `MissingOperatorError`.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
import torchvision  # also registers torch.ops.torchvision
from torch import Tensor

from spatial_mamba_mmcv import MissingOperatorError


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOperatorError(f"the operator {name}")

    return missing


def get_compiler_version() -> str:
    return f"none, torchvision {torchvision.__version__} is used"


def get_compiling_cuda_version() -> str:
    return "none"


# --- boxes ------------------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, by decreasing score.

    Args:
        boxes: (N, 4), corners x1, y1, x2, y2.
        scores: (N,).
        offset: added to widths and heights: 1 if x2 and y2 are the last pixel inside.
    """
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    # mmcv compares in float32, torchvision in double, where 0.4 in float32 is above a threshold of 0.4.
    threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    # Among equal scores, mmcv's unstable sort decides; torchvision's own sort is stable.
    scores, order = scores.to(dtype).sort(descending=True)
    return order[torchvision.ops.nms(_with_offset(boxes.to(dtype), offset)[order], scores, threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): lower the scores of boxes that overlap a better one, drop those below ``min_score``.

    Args:
        boxes: (N, 4).
        scores: (N,).
        dets: (N, 5); the kept boxes and their new scores are written to its first rows.
        method: 0 drops overlapping boxes, 1 lowers scores linearly in the IoU, 2 by a Gaussian of width ``sigma``.
        offset: as in `nms`.

    Returns:
        Indices of the kept boxes in the order of ``dets``.
    """
    overlaps = torchvision.ops.box_iou(*[_with_offset(boxes, offset)] * 2).nan_to_num(0)  # of two empty boxes
    scores, order, place, count = scores.clone(), list(range(len(scores))), 0, len(scores)
    # Boxes move as in mmcv, where the first of equal scores wins: the best to the front, the last to the place of a
    # dropped one.
    while place < count:
        first = place + int(scores[order[place:count]].numpy().argmax())
        order[place], order[first] = order[first], order[place]
        best, rest = order[place], order[place + 1 : count]
        dets[place, :4], dets[place, 4] = boxes[best], scores[best]
        iou = overlaps[best, rest]
        if method == 2:
            scores[rest] *= torch.exp(-iou.square() / sigma)
        else:
            scores[rest] *= torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0.0, 1.0)
        place += 1
        dropped, position = (scores < min_score).tolist(), place
        while position < count:
            if dropped[order[position]]:
                count -= 1
                order[position] = order[count]
            else:
                position += 1
    return torch.tensor(order[:count], dtype=torch.long)


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes


# --- RoIAlign (arXiv 1703.06870) --------------------------------------------------------------------------------------


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` (K, C, aligned_height, aligned_width) with averages over regions of a map.

    Args:
        input: (N, C, H, W).
        rois: (K, 5), index of the map, x1, y1, x2, y2.
        argmax_y, argmax_x: unused; they belong to pool_mode 0.
        spatial_scale: factor from the regions' coordinates to the map's.
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin has pixels.
        pool_mode: 1, the average; 0, the maximum, raises MissingOperatorError.
        aligned: whether pixel centres are at half-integers.
    """
    _check_pool_mode(pool_mode)
    dtype = _compute_dtype(input)
    pooled = torch.ops.torchvision.roi_align(
        input.to(dtype), rois.to(dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input`` (N, C, H, W), see `roi_align_forward`."""
    _check_pool_mode(pool_mode)
    dtype = _compute_dtype(grad_output)
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output.to(dtype),
        rois.to(dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(gradient)


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise MissingOperatorError("RoIAlign with pool_mode='max'")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype


# --- focal loss (arXiv 1708.02002) ------------------------------------------------------------------------------------


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N, classes) with the loss of every logit.

    Args:
        input: (N, classes) logits.
        target: (N,) class indices; ``classes`` itself is the background.
        weight: weights of the classes, must be empty.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` (N, classes) with the derivative of each loss with respect to its logit."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha)
        gradient = torch.autograd.grad(loss.sum(), logits)[0]
    grad_input.copy_(gradient.nan_to_num(0))  # NaN if a probability is 1 and gamma < 1


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise MissingOperatorError("focal loss with class weights")
    classes = torch.arange(logits.shape[1], device=logits.device)
    truth = (target[:, None] == classes).to(torch.float32)
    return torchvision.ops.sigmoid_focal_loss(logits.float(), truth, alpha, gamma)


# --- multi-scale deformable attention (arXiv 2010.04159) --------------------------------------------------------------


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """(B, queries, heads * channels); arguments as in mmcv's ``MultiScaleDeformableAttnFunction``."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    """Fill the three gradients, by differentiating `ms_deform_attn_forward`."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        output = ms_deform_attn_forward(inputs[0], shapes, starts, inputs[1], inputs[2], im2col_step)
        gradients = torch.autograd.grad(output, inputs, grad_output)
    for target, gradient in zip((grad_value, grad_locations, grad_weights), gradients, strict=True):
        target.copy_(gradient)
