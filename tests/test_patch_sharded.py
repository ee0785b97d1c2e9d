"""patch(model) where parameters lie in shards, by FSDP2 or as DTensors, or a module's class becomes another one."""

import copy

import bitsandbytes as bnb
import mllama
import pytest
import torch
import torch.distributed as dist
from fronts import front
from numerics import assert_no_worse, assert_rounding_apart
from prepared_layers import IN_THE_WAY, a_of, b_of, layer_of
from qlora import HOSTS, UNREAD, assert_same, in_order, lora, quantized, said
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

from fastfuse import patch, status, unpatch
from fastfuse.modules.peft import LoRALinear

ORDERS = ["patch, shard", "shard, patch"]


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def as_dtensor(t, mesh, requires_grad=True):
    return nn.Parameter(distribute_tensor(t.data, mesh, [Replicate()]), requires_grad=requires_grad)


def made(wrap, host="bitsandbytes", **config):
    return quantized(host) if wrap == "bare" else lora(host, **config)


def columns(model, storage=torch.uint8):
    """With codes that FSDP2 can shard: a column, as bitsandbytes itself makes it, whose quant_state the layer keeps too."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.quant_state, layer.quant_storage = layer.weight.quant_state, storage
            layer.weight.data = layer.weight.data.view(-1).view(storage)[:, None]
    return model


def stepped(model, x):
    """The result, and the gradient of x as backward() leaves it."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y, [x.grad]


UNITS = {
    "the model": lambda layer: [],
    "each layer": lambda layer: [layer],
    "base layers": lambda layer: [layer.base_layer],
    "adapters": lambda layer: [a_of(layer), b_of(layer)],
}


@pytest.mark.parametrize("units, order, host", [(u, o, HOSTS[(i + j) % 2]) for i, u in enumerate(UNITS) for j, o in enumerate(ORDERS)])
def test_fsdp2(units, order, host, mesh, taken):
    """fully_shard with the NF4 weights left whole: bitsandbytes' lose their quant_state to it, and torchao's cannot be gathered.

    Whole parameters come and go, and those of the next step are the optimizer's: the prepared calls see it.
    """
    model, x = lora(host), torch.randn(3, 128)
    twin, layers = copy.deepcopy(model), [model.base_model.model.up, model.base_model.model.down]
    whole = {layer.base_layer.weight for layer in layers}

    def shard():
        for unit in [*UNITS[units](layers[0]), *UNITS[units](layers[1]), model]:
            fully_shard(unit, mesh=mesh, ignored_params=whole)

    in_order(order, patch=lambda: patch(model), shard=shard)
    assert isinstance(model, FSDPModule) and status(model).counts == {"patched": 4}
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, twin)]
    for steps in range(1, 4):
        results = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            out = m(x)
            optimizer.zero_grad()
            out.square().mean().backward()
            results.append((out.detach(), [getattr(p.grad, "full_tensor", p.grad.clone)() for p in m.parameters() if p.requires_grad]))
            optimizer.step()
        assert_same(*results, products=2 * steps)
    hooked = units in ("base layers", "adapters")
    assert status(model).fallbacks == ({"HOOKED": 6} if hooked else {}) and (hooked or taken == [True] * 4)
    unpatch(model)
    assert isinstance(model, FSDPModule)
    assert_rounding_apart(model(x), twin(x), K=256, products=8)


NAMES = ["as they are", "the hook's is another", "hooks are elsewhere"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrap", ["bare", "lora"])
@pytest.mark.parametrize("names", NAMES)
def test_fsdp2_shards_bitsandbytes_codes(names, wrap, order, mesh):
    """The weight becomes plain codes, and the layer's own quant_state serves. That shards are whole in a call status() knows by private names of PyTorch's:
    in a version with others its report is less than the truth, and calls are right, and fused in whatever is patched."""
    storage = torch.uint8 if (wrap == "bare") == (order == ORDERS[0]) else torch.float32
    model, x = columns(made(wrap), storage), torch.randn(3, 128)
    want = stepped(model, x)

    def shard():
        fully_shard(model, mesh=mesh)
        for module in model.modules() if names != NAMES[0] else ():
            hooks = module.__dict__["_load_state_dict_post_hooks"]
            for hook in hooks.values():
                hook.__qualname__ = "ShardedParam.<lambda>"
            if names == NAMES[2]:
                del module.__dict__["_load_state_dict_post_hooks"]

    in_order(order, patch=lambda: patch(model), shard=shard)
    code = "" if names == NAMES[0] else "DTENSOR"
    state = "patched" if order == ORDERS[0] or not code else "unpatched"

    def check():
        report = status(model)
        assert said(report) == [(state, code)] * (2 if wrap == "bare" else 4) and report.fallbacks == {}
        assert all(e.reason.startswith("runs its own forward for now: ") == bool(code) for e in report.entries if state == "patched")

    check()
    assert_same(stepped(model, x), want)
    model.reshard()
    layer = layer_of(model)
    assert type(getattr(layer, "base_layer", layer).weight).__name__ == "DTensor"
    check()


def test_a_shard_that_no_call_finds_gathered(mesh):
    """The hook of FSDP2 by name, over a weight that stays a DTensor: patched, and every call is left to the layer's own forward."""
    model, x = columns(quantized("bitsandbytes")), torch.randn(3, 128)
    layer = model.up

    def hook(module, incompatible):
        pass

    hook.__qualname__ = "FSDPParam.hook"
    layer.register_load_state_dict_post_hook(hook)
    layer.weight = as_dtensor(layer.weight, mesh, requires_grad=False)
    assert patch(model).counts == {"patched": 2}
    layer._fastfuse.original = lambda given: given @ torch.ones(128, 256)  # bitsandbytes' cannot multiply by one
    with pytest.warns(UserWarning, match="DTENSOR"):
        assert torch.equal(layer(x), x @ torch.ones(128, 256))
    assert status(model).fallbacks == {"DTENSOR": 1}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", UNREAD)
def test_fsdp2_shards_what_no_kernel_reads(what, order, mesh):
    """A layer that no call is fused in is skipped with the code that it has unsharded: gathering its shards changes nothing of that."""
    model, (code, spoil) = quantized("bitsandbytes", storage="flat"), UNREAD[what]
    for layer in (model.up, model.down):
        layer.quant_state = layer.weight.quant_state
    spoil(model.up, model.up.quant_state)
    if order == ORDERS[0]:
        assert said(patch(model)) == [("skipped", code), ("patched", "")]
    fully_shard(model, mesh=mesh)
    report = status(model) if order == ORDERS[0] else patch(model)
    assert said(report) == [("unpatched" if order == ORDERS[0] else "skipped", code), ("patched", "")]


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_fsdp2_hides_no_other_reason(what, mesh):
    """The report looks past shards that will be whole in a call, and says what the call then counts."""
    model, (code, act) = columns(lora("bitsandbytes", use_dora="bias" in what)), IN_THE_WAY[what]
    act(layer_of(model))
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    report = patch(model, ops="nf4_lora_linear").patched
    assert [(e.code, e.reason.partition(": ")[0]) for e in report] == [(code, "runs its own forward for now"), ("", "")]
    assert all(parameters[name] is p for name, p in model.named_parameters())  # the very same
    with pytest.warns(UserWarning, match=code):
        model(torch.randn(3, 128))
    assert status(model).fallbacks == {code: 1}


def fsdp2_over_torchao(rank, folder):
    """One of two processes: torchao gathers its weights over two at least."""
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    torch.manual_seed(0)
    own = nn.Sequential(LoRALinear(128, 256, 8, 16.0, quantize_base=True), LoRALinear(256, 128, 8, 16.0, quantize_base=True))
    for model, state in ((quantized("torchao"), "patched"), (own, "already")):
        model.requires_grad_(False)
        x = torch.randn(3, 128)
        want = stepped(model, x)
        patch(model)
        for unit in [*model.children(), model]:
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        before = status(model)
        got = stepped(model, x)
        assert all(type(p).__name__ == "DTensor" for p in next(model.children()).parameters())
        for report in (before, status(model)):
            assert [(e.status, e.code, e.reason, dict(e.fallbacks)) for e in report.entries] == [(state, "", "", {})] * 2
        assert_same(got, want)
        unpatch(model)
        assert patch(model).counts == {state: 2}  # of shards too
    dist.destroy_process_group()


def test_fsdp2_over_torchao_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(fsdp2_over_torchao, (str(tmp_path),), nprocs=2)


# part: the module that holds it inside of the layer "up", its name there, and how the layer is made
PARTS = {
    "A": ("lora_A.default", "weight", ("lora", "bitsandbytes"), {}),
    "B": ("lora_B.default", "weight", ("lora", "torchao"), {}),
    "the base's weight": ("base_layer", "weight", ("lora", "bitsandbytes"), {}),
    "the base's bias": ("base_layer", "bias", ("lora", "bitsandbytes"), {}),
    "B's bias": ("lora_B.default", "bias", ("lora", "bitsandbytes"), {"lora_bias": True}),
    "DoRA's magnitude": ("lora_magnitude_vector.default", "weight", ("lora", "bitsandbytes"), {"use_dora": True}),
    "bitsandbytes' bias": ("", "bias", ("bare", "bitsandbytes"), {}),
    "torchao's bias": ("", "bias", ("bare", "torchao"), {}),
}


def outcome(layer, x):
    """The result, or what kind of error there is in its place."""
    try:
        return layer(x).full_tensor()
    except (NotImplementedError, RuntimeError) as e:
        return type(e)


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
@pytest.mark.parametrize("part", PARTS)
def test_a_dtensor_is_left_to_the_modules_own_forward(part, when, mesh):
    """One that no call finds gathered: FSDP2 did not make it. The layer gives what an unpatched one gives, be it an error."""
    path, name, kind, config = PARTS[part]
    model, x = columns(made(*kind, **config)), torch.randn(3, 128)
    layer, ops = layer_of(model), "nf4_lora_linear" if kind[0] == "lora" else None
    owner, want, twin = layer.get_submodule(path), layer(x), copy.deepcopy(layer)
    whole = getattr(owner, name)
    if when == "after the patch" or part == "the base's weight":  # sharded, it is not patched at all
        patch(model, ops=ops)
    for each in (owner, twin.get_submodule(path)):
        setattr(each, name, as_dtensor(getattr(each, name), mesh, name == "bias" or "base" not in part))
    if when == "before the patch":
        patch(model, ops=ops)
    first, second = [e for e in status(model).entries if e.status == "patched"]
    words = "runs its own forward for now: a weight is sharded (DTensor): the op would see one shard"
    assert (first.code, first.reason, second.code) == ("DTENSOR", words, "") or part == "the base's weight"
    with implicit_replication(), pytest.warns(UserWarning, match="DTENSOR"):
        got, own = outcome(layer, x), outcome(twin, x)
    if isinstance(own, type):  # an error of the host's own op, which has no rule for DTensors
        assert got is own and path in ("base_layer", "")
    else:
        assert_rounding_apart(got, want, K=128, products=2)
    assert status(model).fallbacks == {"DTENSOR": 1}
    setattr(owner, name, whole)  # and back: the op runs again
    assert_rounding_apart(layer(x), want, K=128, products=2)
    assert status(model).fallbacks == {"DTENSOR": 1}


def test_a_convolution_that_is_a_dtensor_is_left_alone(mesh):
    module = front("SiglipVision")
    module.patch_embedding.weight = as_dtensor(module.patch_embedding.weight, mesh)
    assert [e.code for e in patch(module).entries] == ["DTENSOR"]


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


BECOMING_ANOTHER = {
    "fully_shard": lambda module, mesh: fully_shard(module, mesh=mesh),
    "replicate": lambda module, mesh: replicate(module),
    "parametrization": lambda module, mesh: nn.utils.parametrize.register_parametrization(module, "class_embedding", Twice()),
    "subclass": lambda module, mesh: setattr(module, "__class__", type("Mine", (type(module),), {"__module__": __name__})),
}


@pytest.mark.parametrize("order", ["patch, wrap", "wrap, patch"])
@pytest.mark.parametrize("how", BECOMING_ANOTHER)
def test_a_vision_model_whose_class_becomes_another(how, order, mesh):
    """FSDP2, replicate and a parametrization swap the class for one of a module of their own: the host's is that of the class it derives from."""
    plain, given = mllama.build(mllama.config(cross=(1,), layers=2, vision_layers=(1, 1), taken=(0,))), mllama.batch([["coffee"]])
    model, exact, eager = copy.deepcopy(plain), mllama.exactly(plain), copy.deepcopy(plain)

    def wrap(model):
        BECOMING_ANOTHER[how](model.model.vision_model, mesh)

    in_order(order, patch=lambda: patch(model), wrap=lambda: wrap(model))
    wrap(exact)
    wrap(eager)
    assert set(said(status(model))) == {("patched", "")}  # FSDP2 gathers its shards before a call
    assert status(model).counts == {"patched": 4}
    want, true = eager(**given).logits, exact(**(given | {"pixel_values": given["pixel_values"].double()})).logits
    assert_no_worse(model(**given).logits, want, true)
    assert status(model).fallbacks == {}
    unpatch(model)
    assert torch.equal(model(**given).logits, want)
