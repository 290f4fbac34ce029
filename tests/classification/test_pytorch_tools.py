"""PyTorch's tools on the models: torch.func, tracing, compiling, checkpointing, FSDP, hooks, pruning, wrappers."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from spatial_mamba import SpatialMamba
from spatial_mamba.classification.export.form import export_form
from spatial_mamba.classification.models.spatial_mamba import Stage
from spatial_mamba.kernels import use_backend
from spatial_mamba.kernels.backends import reference_serves

from .micro_models import assert_near, assert_same_step, filled_classifier, images, micro_classifier, train_step


def test_transforms_of_torch_func() -> None:
    """Per-sample gradients and forward-mode derivatives equal those of reverse mode."""
    model = filled_classifier(depths=(1, 1)).double().eval()
    x, direction = images(2, 3, 32, 32).double(), images(2, 3, 32, 32).double().flip(-1)
    labels = torch.tensor([0, 2])
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, labels)
    for i in range(2):
        expected = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]), weights.values())
        for name, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(per_sample[name][i], gradient, rtol=1e-9, atol=1e-9)

    logits, tangent = torch.func.jvp(model, (x,), (direction,))
    jacobian = torch.func.jacrev(model)(x)  # (2, classes, 2, 3, 32, 32)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(tangent, torch.einsum("bcnxyz,nxyz->bc", jacobian, direction), rtol=1e-9, atol=1e-9)
    assert tangent.abs().min() > 0


def test_traces_for_any_size() -> None:
    """Tracing a model as TensorBoard, fvcore and other tools do."""
    model = filled_classifier(depths=(1, 1)).eval()
    traced = torch.jit.trace(model, images(1, 3, 64, 64))
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (2, 3, 96, 64), (1, 3, 64, 33)):
            torch.testing.assert_close(traced(images(*shape)), model(images(*shape)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_for_any_size(training: bool) -> None:
    """Tracing a model as torchvision's feature extraction and PyTorch's quantization do."""
    model = filled_classifier(depths=(1, 1)).train(training)
    node = "layers.1.blocks.0.mlp.fc2"
    traced, extractor = torch.fx.symbolic_trace(model), create_feature_extractor(model, [node, "head"])
    for shape in ((1, 3, 64, 64), (2, 3, 96, 33)):
        x = images(*shape)
        logits, features = model(x), extractor(x)
        torch.testing.assert_close(traced(x), logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(features["head"], logits, rtol=1e-6, atol=1e-6)
        assert features[node].shape == (shape[0], math.ceil(shape[2] / 8), math.ceil(shape[3] / 8), 16)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_compiles_in_one_graph(use_checkpoint: bool) -> None:
    model = filled_classifier(depths=(1, 1), use_checkpoint=use_checkpoint)
    x = images(2, 3, 32, 32)
    expected = train_step(model, x)
    torch._dynamo.reset()  # a graph of another test must not be counted as a recompilation
    loss, gradients = train_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_same_step((loss, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), expected)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_activation_checkpointing_changes_nothing_but_memory(drop_path_rate: float) -> None:
    model = filled_classifier(depths=(2, 2), drop_path_rate=drop_path_rate).train()
    start = deepcopy(model.state_dict())
    block_calls = []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, args: block_calls.append(module))

    def step_with(enable: bool) -> tuple[tuple[Tensor, dict[str, Tensor]], dict[str, Tensor], int]:
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        block_calls.clear()
        step = train_step(model, images(4, 3, 32, 32))
        return step, deepcopy(model.state_dict()), len(block_calls)

    expected, expected_state, calls = step_with(False)
    assert calls == 4
    step, state, calls = step_with(True)
    assert calls == 8  # every block once more in the backward pass
    assert_same_step(step, expected)
    torch.testing.assert_close(state, expected_state)
    assert step_with(False)[-1] == 4

    other_seed = train_step(model, images(4, 3, 32, 32), seed=1)[0]
    assert (other_seed.item() != expected[0].item()) == (drop_path_rate > 0)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """Apply FSDP2 to the modules whose names end with one of ``units``, and to the model."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for name, module in model.named_modules():
        if name.endswith(tuple(units)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_as_before(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """The same with FSDP1."""
    chosen = [module for name, module in model.named_modules() if name.endswith(tuple(units))]
    policy = lambda module, recurse, **_: recurse or module in chosen  # noqa: E731
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on CPUs came with PyTorch 2.7")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [pytest.param(shard, marks=fsdp2), shard_as_before])
@pytest.mark.parametrize("units", [["blocks.0"], ["conv2d", "state_fusion", "out_norm", "in_proj", "cpe1", "norm"]])
def test_fsdp_of_any_unit(wrap: Callable[..., nn.Module], units: Sequence[str], process_group: None) -> None:
    def losses(model: nn.Module) -> list[float]:
        """Losses of two steps, the second after an update."""
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        values = []
        for _ in range(2):
            loss = F.cross_entropy(model(images(2, 3, 32, 32)), torch.arange(2))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    model = micro_classifier(depths=(1, 1), drop_path_rate=0.0)
    expected = losses(deepcopy(model))
    assert losses(wrap(model, units)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_hooks_are_called_on_every_module(dtype: torch.dtype) -> None:
    model = filled_classifier(depths=(1, 1)).to(dtype)
    x = images(2, 3, 64, 48).to(dtype)
    expected = model(x)
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.add(module))
    assert_near(model(x), expected, 1e-10 if dtype == torch.float64 else 2e-2)
    assert called == {module for module in model.modules() if not isinstance(module, nn.ModuleList)}
    assert model.to("meta")(x.to("meta")).shape == expected.shape  # a device without autocast


@pytest.mark.parametrize("name", ["conv2d", "state_fusion", "out_norm"])
def test_a_replaced_forward_is_called(name: str) -> None:
    """Changes as made by tools that set a module's ``forward``, and by global hooks."""
    model = filled_classifier(depths=(1,))
    expected = model(images())
    module = model.layers[0].blocks[0].self_attention.get_submodule(name)
    kind, forward = type(module), module.forward

    hook = register_module_forward_hook(lambda module, args, output: 2 * output if type(module) is kind else None)
    hooked = model(images())
    hook.remove()
    assert not torch.allclose(hooked, expected)
    module.forward = lambda *args: 2 * forward(*args)
    assert not torch.allclose(model(images()), expected)
    with pytest.raises(RuntimeError, match=f"self_attention.{name} has hooks, is in training mode, or was"):
        model.eval().fuse()


def other_gelu(model: nn.Module) -> None:
    model.layers[0].blocks[0].mlp.act = nn.GELU("tanh")


def adapter(model: nn.Module) -> None:
    """A layer that adds to another one, like LoRA's."""
    block = model.layers[0].blocks[0]
    changed = ((block.mlp, "fc2"), (block.self_attention, "in_proj"), (model.layers[0].downsample.conv[1], "conv"))
    for parent, name in changed:
        setattr(parent, name, nn.Sequential(getattr(parent, name), nn.Tanh()))


def double(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)


def doubling_hooks(model: nn.Module) -> None:
    for name in ("blocks.0.mlp.fc1", "blocks.0.self_attention.out_proj", "downsample.conv.1.conv"):
        double(model.layers[0], name)


def other_geometry(model: nn.Module) -> None:
    """As for dense predictions."""
    conv = model.layers[0].downsample.conv[1].conv
    conv.stride, conv.padding, conv.dilation = (1, 1), (2, 2), (2, 2)


def other_norm(model: nn.Module) -> None:
    model.layers[0].downsample.conv[1].norm = nn.BatchNorm2d(len(model.layers[0].downsample.conv[1].conv.weight))
    model.layers[0].downsample.conv[1].norm.running_mean.fill_(-3.0)
    model.double().eval()


@pytest.mark.parametrize("change", [other_gelu, adapter, doubling_hooks, other_geometry, other_norm])
def test_changed_parts_of_one_operator_are_called(change: Callable[[nn.Module], None]) -> None:
    """One operator computes an MLP, and one the reduction of a downsampling, but not if a part was changed."""
    model = filled_classifier(depths=(1, 1)).double().eval()
    change(model)
    with use_backend("torch"):
        expected = model(images().double())
    assert not torch.allclose(filled_classifier(depths=(1, 1)).double().eval()(images().double()), expected)
    torch.testing.assert_close(model(images().double()), expected)


def test_the_backward_pass_may_count_flops_or_find_new_hooks() -> None:
    """It computes the expanded maps again as the forward pass did."""
    model = filled_classifier(depths=(1, 1))
    loss = model(images()).sum()
    with FlopCounterMode(display=False):
        expected = torch.autograd.grad(loss, list(model.parameters()))
    loss = model(images()).sum()
    model.layers[0].downsample.conv[1].conv.register_forward_hook(lambda *_: None)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_parametrised_weights_are_computed_once() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight

    model, counting = filled_classifier(depths=(1, 1)), Counting()
    register_parametrization(model.layers[0].blocks[0].mlp.fc1, "weight", counting)
    register_parametrization(model.layers[0].blocks[0].self_attention.in_proj, "weight", counting)
    register_parametrization(model.layers[0].downsample.conv[1].conv, "weight", counting)
    for backend in (nullcontext(), use_backend("torch")):
        counting.calls = 0
        with backend:
            model(images())
        assert counting.calls == 3


def test_replaced_layers_of_a_downsampling_are_called_once() -> None:
    """They may be random, as an adapter with dropout is."""
    model, dropout = filled_classifier(depths=(1, 1)), nn.Dropout()
    expand, calls = model.layers[0].downsample.conv[0], []
    expand.conv = nn.Sequential(expand.conv, dropout)
    dropout.forward = lambda x: calls.append(x.shape) or x
    model(images()).sum().backward()
    assert len(calls) == 1


def test_sparse_weights_are_used() -> None:
    block = filled_classifier(depths=(1,)).layers[0].blocks[0].requires_grad_(False)
    x = torch.randn(2, 3, 3, block.mlp.fc1.in_features)
    expected = block(x)
    for layer in (block.mlp.fc1, block.self_attention.in_proj):
        layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(block(x), expected)


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_parametrised_layers_of_another_class_are_called() -> None:
    model = filled_classifier(depths=(1,))
    expected, mixer = model(images()), model.layers[0].blocks[0].self_attention
    weight = mixer.in_proj.weight
    mixer.in_proj = DoubledLinear(*weight.shape[::-1], bias=False)
    mixer.in_proj.weight = nn.Parameter(weight / 2)
    register_parametrization(mixer.in_proj, "weight", nn.Identity())
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("name", ["self_attention.in_proj", "self_attention.out_proj", "mlp.fc2"])
def test_layers_of_another_dtype_are_refused(name: str) -> None:
    model = filled_classifier(depths=(1,))
    model.layers[0].blocks[0].get_submodule(name).double()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(images())


@pytest.mark.parametrize(("part", "operator"), [("blocks.0.mlp", "mlp"), ("downsample", "downsampling")])
def test_frozen_matrices_get_no_gradients(part: str, operator: str) -> None:
    stage = filled_classifier(depths=(1, 1)).layers[0]
    module = stage.get_submodule(part)
    x = torch.ones(2, 3, 3, stage.blocks[0].ln_1.weight.numel(), requires_grad=True)
    for frozen in (False, True):
        module.requires_grad_(not frozen)
        with torch.profiler.profile() as profile:
            module(x).sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert (f"spatial_mamba::{operator}_backward" in names) == (not frozen and not reference_serves(x, operator))


def test_dropout_in_mlps_is_applied() -> None:
    mlp = filled_classifier(depths=(1,)).layers[0].blocks[0].mlp
    mlp.drop1.p = 0.5
    x = torch.ones(2, 3, 3, mlp.fc1.in_features)
    assert not torch.equal(mlp.train()(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_pruned_and_parametrised_weights_are_used() -> None:
    """Pruning changes weights in a hook, a parametrisation whenever they are read."""
    for change in (partial(prune.random_unstructured, name="weight", amount=0.5), weight_norm):
        model = filled_classifier(depths=(1,)).double()
        mixer = model.layers[0].blocks[0].self_attention
        change(mixer.conv2d)
        before = model(images().double())
        with torch.no_grad():
            for parameter in mixer.conv2d.parameters():
                parameter.add_(torch.randn_like(parameter))
        after = model(images().double())
        after.sum().backward()
        assert not torch.allclose(before, after)
        assert all(parameter.grad.abs().max() > 0 for parameter in mixer.conv2d.parameters())


class Doubled(nn.Module):
    """A wrapper that passes attributes on, like those of LoRA and FSDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_layer = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.base_layer(*args)


def wrap(model: nn.Module, name: str) -> None:
    model.set_submodule(name, Doubled(model.get_submodule(name)))


def set_inside(*names: str, **settings: Any) -> Callable[[nn.Module, str], None]:
    def change(model: nn.Module, name: str) -> None:
        for module in filter(lambda module: type(module).__name__ in names, model.get_submodule(name).modules()):
            for setting, value in settings.items():
                setattr(module, setting, value)

    return change


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CALLED = {"", "patch_embed", "patch_embed.conv2", "patch_embed.conv3", "layers", "norm", "head_drop", "head"}
MODULES = [
    name
    for name, module in micro_classifier(depths=(1, 1)).named_modules()
    if name not in CALLED and not isinstance(module, nn.ModuleList | Stage) and name != "layers.1.downsample"
]


@pytest.mark.parametrize("use", [SpatialMamba.fuse, export_form])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(wrap, MODULES, id="wrapped"),
        pytest.param(double, MODULES, id="hooked"),
        pytest.param(set_inside("Mlp", act=nn.ReLU()), ["layers.1.blocks.0.mlp"], id="activation of an MLP"),
        pytest.param(set_inside("GELU", approximate="tanh"), ["layers.1.blocks.0.mlp.act"], id="another GELU"),
        pytest.param(set_inside("Reduction", act=nn.SiLU()), ["layers.0.downsample.conv.1"], id="activation"),
        pytest.param(set_inside("ConvLayer", norm=Scaled(8)), ["patch_embed.conv3.1"], id="another BatchNorm"),
        pytest.param(
            set_inside("Conv2d", "DepthwiseConv", "PositionEncoding", padding_mode="circular"),
            ["layers.0.downsample.conv", "layers.0.blocks.0.cpe1", "layers.0.blocks.0.self_attention.conv2d"],
            id="padding",
        ),
    ],
)
def test_changed_modules_are_never_bypassed(
    use: Callable[[nn.Module], nn.Module], change: Callable[[nn.Module, str], None], names: list[str]
) -> None:
    for name in names:
        model = filled_classifier(depths=(1, 1))
        change(model, name)
        model.eval()
        expected = model(images())
        try:
            used = use(model)
        except RuntimeError as error:
            assert f"{error}".startswith(name) and "has hooks, is in training mode, or was wrapped" in f"{error}"
        else:  # such as a wrapped layer of the stem
            assert_near(used(images()), expected, 1e-5)


@pytest.mark.parametrize("settings", [dict(padding_mode="circular"), dict(padding=(2, 2), dilation=(2, 2))], ids=str)
def test_padding_and_dilation_may_be_changed(settings: dict[str, Any]) -> None:
    """Circular padding is usual for panoramas and textures."""
    block = filled_classifier(depths=(1,)).double().eval().layers[0].blocks[0]
    x = images(2, 8, 6, 7).double().permute(0, 2, 3, 1)
    before = block.self_attention(x)
    for layer, tokens in ((block.cpe1, x), (block.self_attention.conv2d, torch.cat((x, -x), dim=-1))):
        dim = tokens.shape[-1]
        plain = nn.Conv2d(dim, dim, 3, **dict(padding=1) | settings, groups=dim).double()
        plain.load_state_dict(layer.state_dict())
        out = plain(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for name, value in settings.items():
            setattr(layer, name, value)
        torch.testing.assert_close(layer(tokens), tokens + out if layer is block.cpe1 else F.silu(out))
    assert not torch.allclose(block.self_attention(x), before)


def with_weight_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
            module.parametrizations.weight.original0.data.mul_(1.5)


def with_folded_norm(model: nn.Module) -> None:
    layer = model.patch_embed.conv1
    layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()


def with_other_stem(model: nn.Module) -> None:
    first, second = model.patch_embed.conv1, model.patch_embed.conv2[0]
    first.conv.stride, first.conv.padding_mode, first.act = (1, 1), "circular", nn.Identity()
    second.conv.padding = second.conv.dilation = (2, 2)


def with_more_blocks(model: nn.Module) -> None:
    model.layers[0].blocks = nn.Sequential(*model.layers[0].blocks, deepcopy(model.layers[0].blocks[0]))


def with_another_head(model: nn.Module) -> None:
    model.head.__class__ = DoubledLinear


@pytest.mark.parametrize("use", [SpatialMamba.fuse, export_form])
@pytest.mark.parametrize(
    "change", [with_weight_norm, with_folded_norm, with_other_stem, with_more_blocks, with_another_head]
)
def test_what_weights_and_calls_describe_is_fused_and_exported(
    use: Callable[[nn.Module], nn.Module], change: Callable[[nn.Module], None]
) -> None:
    model = filled_classifier(depths=(1, 1)).eval()
    change(model)
    expected = model(images())
    copy = deepcopy(model)
    assert_near(use(copy)(images()), expected, 1e-5)
    assert_near(model(images()), expected, 1e-5)
    assert_near(use(model)(images()), expected, 1e-5)
