"""patch(model) together with what people train with: transformers, accelerate, FSDP2, torch.compile, checkpointing, other patchers."""

import contextlib
import copy
import io
import pickle
import warnings
from types import MethodType

import bitsandbytes as bnb
import mllama
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.state import AcceleratorState
from numerics import assert_no_worse, assert_rounding_apart
from peft import LoraConfig, get_peft_model
from qlora import HOSTS, Block, Doubling, gradients, lora, quantized
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from weights import quantize

import fastfuse
from fastfuse.modules.peft import LoRALinear

LINEARS = 14  # of the two layers below, q, k, v, o, gate, up and down each


def llama(dtype=torch.float32) -> nn.Module:
    """A Llama of two layers in NF4 by bitsandbytes, with LoRA adapters on every linear layer."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=97)
    model = LlamaForCausalLM(config).to(dtype)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
                    made.weight = quantize(linear.weight.detach(), "nested")
                    made.support_avx512bf16_for_cpu = False  # else the unpatched layer repacks its weight for good in eval mode
                    setattr(part, name, made)
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape)


def step(model, ids):
    """The loss, and its gradients for all that is trained."""
    loss = model(input_ids=ids, labels=ids).loss
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_same_step(got, want) -> None:
    """Through the two layers and back: 14 products of three factors each way, with their adapters."""
    assert_rounding_apart(got[0], want[0], K=128, products=2 * LINEARS)
    for g, w in zip(got[1], want[1], strict=True):
        assert_rounding_apart(g, w, K=128, products=4 * LINEARS)


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = llama(), tokens(2, 11)
    want = step(model, ids)
    fastfuse.patch(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if not reentrant:
        return assert_same_step(step(model, ids), want)
    model.enable_input_require_grads()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()  # reentrant checkpointing knows no autograd.grad
    assert_same_step((loss, [p.grad for p in model.parameters() if p.requires_grad]), want)


def test_gradient_checkpointing_draws_the_same_dropout_again():
    model, ids = llama(), tokens(2, 11)
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Identity):
            module["default"] = nn.Dropout(0.3)
    fastfuse.patch(model)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        results.append(step(model, ids))
    assert_same_step(*results)
    torch.manual_seed(2)
    assert not torch.equal(step(model, ids)[0], results[0][0]) and fastfuse.status(model).fallbacks == {}


def test_compile_fullgraph_of_a_transformer():
    model, ids = llama(), tokens(2, 11)
    want = step(model, ids)
    fastfuse.patch(model)
    torch.compiler.reset()
    assert_same_step(step(torch.compile(model, fullgraph=True, backend="eager"), ids), want)


def test_generation():
    """Token by token from a cache: where two tokens are about as likely, rounding may choose, so the scores are compared."""
    model, ids = llama().eval(), tokens(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    want = model.generate(input_ids=ids, **options)
    fastfuse.patch(model)
    got = model.generate(input_ids=ids, **options)
    for g, w in zip(got.logits, want.logits, strict=True):
        assert_rounding_apart(g, w, K=128, products=2 * LINEARS)
    assert torch.equal(got.sequences, want.sequences) and fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_a_transformer(dtype):
    """bf16 autocast: an fp32 input, which PEFT adapts in another dtype than it multiplies in, runs PEFT's own forward; a bf16 one is fused."""
    model, ids = llama(dtype), tokens(2, 11)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, ids)

    want = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastfuse.patch(model)
        got = run()
    assert got[0].dtype == want[0].dtype
    assert_same_step([got[0].bfloat16(), [g.bfloat16() for g in got[1]]], [want[0].bfloat16(), [w.bfloat16() for w in want[1]]])
    assert set(fastfuse.status(model).fallbacks) == ({"AUTOCAST"} if dtype == torch.float32 else set())


@pytest.mark.parametrize("order", ["patch, dispatch", "dispatch, patch"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_dispatched_model(host, order):
    """accelerate hooks every module of a model spread over devices: that of the adapted layer runs, those inside have nothing left to move."""
    model, x = lora(host), torch.randn(3, 128)
    want, want_grads = gradients(model, x)
    devices = {"base_model.model.up": "cpu", "base_model.model.down": "cpu", "base_model.model.head": "cpu"}
    for act in order.split(", "):
        if act == "patch":
            assert len(fastfuse.patch(model).patched) == 4
        else:
            dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    seen = []
    for module in model.modules():
        if hook := module.__dict__.get("_hf_hook"):
            hook.pre_forward = lambda m, *args, _own=hook.pre_forward, **kwargs: seen.append(m) or _own(m, *args, **kwargs)
    got, got_grads = gradients(model, x)
    layer = model.base_model.model.up
    assert layer in seen and layer.lora_A["default"] not in seen
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    assert fastfuse.status(model).fallbacks == {}
    fastfuse.unpatch(model)
    remove_hook_from_submodules(model)
    assert torch.equal(model(x), want)
    assert not any("_fastfuse" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("hook", ["a user's", "offload"])
@pytest.mark.parametrize("child", ["base_layer", "lora_A", "lora_B"])
def test_a_child_s_hook_that_does_something_runs(child, hook):
    model, x, seen = lora("bitsandbytes"), torch.randn(3, 128), []
    layer = model.base_model.model.up
    target = layer.base_layer if child == "base_layer" else getattr(layer, child)["default"]
    made = Doubling() if hook == "a user's" else AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(target, made)
    own = made.pre_forward
    made.pre_forward = lambda m, *args, **kwargs: seen.append(m) or own(m, *args, **kwargs)
    want = layer(x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="HOOKED"):
        assert_rounding_apart(layer(x), want, K=128, products=2)
    assert seen == [target] * 2


@torch.no_grad()
def test_under_vmap_the_own_forward_runs():
    model, x = quantized("bitsandbytes"), torch.randn(3, 2, 128)
    want = torch.func.vmap(model)(x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="FUNCTORCH"):
        torch.testing.assert_close(torch.func.vmap(model)(x), want)


@pytest.mark.parametrize("order", ["patch, hook", "hook, patch"])
def test_a_hook_that_moves_inputs_leaves_the_layer_fused(order):
    """AlignDevicesHook on the adapted layer alone: it wraps the fused forward."""
    model, x = lora("bitsandbytes"), torch.randn(3, 128)
    layer = model.base_model.model.up
    want = layer(x)
    for act in order.split(", "):
        if act == "patch":
            fastfuse.patch(model)
        else:
            add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_rounding_apart(layer(x), want, K=128, products=2)
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("units", ["the model", "each layer", "base layers", "adapters"])
@pytest.mark.parametrize("order", ["patch, shard", "shard, patch"])
@pytest.mark.parametrize("host", HOSTS)
def test_fsdp2(host, order, units, mesh):
    """fully_shard with the NF4 weights left whole: bitsandbytes' lose their quant_state to it, and torchao's cannot be gathered."""
    model, x = lora(host), torch.randn(3, 128)
    layers = [model.base_model.model.up, model.base_model.model.down]
    want, want_grads = gradients(model, x)

    def shard():
        whole = {layer.base_layer.weight for layer in layers}
        chosen = {"the model": [], "each layer": layers, "base layers": [m.base_layer for m in layers]}
        for unit in chosen.get(units, [child["default"] for m in layers for child in (m.lora_A, m.lora_B)]):
            fully_shard(unit, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)

    for act in order.split(", "):
        if act == "patch":
            assert len(fastfuse.patch(model).patched) == 4
        else:
            shard()
    assert isinstance(model, FSDPModule) and len(fastfuse.status(model).patched) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model(x)
        got.square().sum().backward()
    got_grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    expected = {"base layers": {"HOOKED": 2}, "adapters": {"HOOKED": 2}}
    assert fastfuse.status(model).fallbacks == expected.get(units, {})
    fastfuse.unpatch(model)
    assert isinstance(model, FSDPModule) and torch.equal(model(x), want)


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


def with_another_class(module: nn.Module, how: str, mesh) -> None:
    if how == "fully_shard":
        fully_shard(module, mesh=mesh)
    elif how == "replicate":
        replicate(module)
    elif how == "parametrization":
        nn.utils.parametrize.register_parametrization(module, "class_embedding", Twice())
    else:
        module.__class__ = type("Mine", (type(module),), {"__module__": __name__})


@pytest.mark.parametrize("order", ["patch, wrap", "wrap, patch"])
@pytest.mark.parametrize("how", ["fully_shard", "replicate", "parametrization", "subclass"])
def test_a_vision_model_whose_class_becomes_another(how, order, mesh):
    """FSDP2, replicate and a parametrization swap the class for one of a module of their own: the host's is that of the class it derives from."""
    plain, given = mllama.build(mllama.config()), mllama.batch([["coffee"], ["astronaut", "chelsea"]])
    model, exact, eager = copy.deepcopy(plain), mllama.exactly(plain), copy.deepcopy(plain)
    for act in order.split(", "):
        if act == "patch":
            report = fastfuse.patch(model)
            assert report.counts == {"patched": 5} and {e.code for e in report.entries} == {""}
        else:
            with_another_class(model.model.vision_model, how, mesh)
    for other in (exact, eager):
        with_another_class(other.model.vision_model, how, mesh)
    before = next(e for e in fastfuse.status(model).entries if e.op == "patch_embed")
    assert (before.status, before.code) == ("patched", "")  # FSDP2 gathers its shards before a call
    true = exact(**(given | {"pixel_values": given["pixel_values"].double()})).logits
    assert_no_worse(model(**given).logits, eager(**given).logits, true)
    assert fastfuse.status(model).fallbacks == {}
    fastfuse.unpatch(model)
    assert torch.equal(model(**given).logits, eager(**given).logits)


@pytest.mark.parametrize("order", ["patch, shard", "shard, patch"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_fsdp2_shards_bitsandbytes_codes(wrap, storage, order, mesh):
    """The weight becomes plain codes, and the layer's own quant_state serves. status() knows that shards are whole in a call."""
    model, x = quantized("bitsandbytes") if wrap == "bare" else lora("bitsandbytes"), torch.randn(3, 128, requires_grad=True)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.quant_state, module.quant_storage = module.weight.quant_state, storage
            module.weight.data = module.weight.data.view(-1).view(storage)[:, None]
    want = model(x)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x)

    for act in order.split(", "):
        if act == "patch":
            fastfuse.patch(model, on_unsupported="raise")
        else:
            fully_shard(model, mesh=mesh)
    before = fastfuse.status(model)
    got = model(x)
    got.square().sum().backward()
    model.reshard()
    assert type(next(p for n, p in model.named_parameters() if n.endswith("up.weight") or n.endswith("up.base_layer.weight"))).__name__ == "DTensor"
    for report in (before, fastfuse.status(model)):
        assert [(e.status, e.code, e.reason, dict(e.fallbacks)) for e in report.entries] == [("patched", "", "", {})] * (2 if wrap == "bare" else 4)
    assert_rounding_apart(got, want, K=256, products=2)
    assert_rounding_apart(x.grad, want_grad, K=256, products=4)


@pytest.mark.parametrize("order", ["patch, shard", "shard, patch"])
@pytest.mark.parametrize("changed", ["the hook's name", "where hooks are kept"])
@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_fsdp2_of_a_version_with_other_private_names(wrap, changed, order, mesh):
    """What is known of the shards by private names is for the report alone: calls are right, and fused in whatever is patched."""
    model, x = quantized("bitsandbytes") if wrap == "bare" else lora("bitsandbytes"), torch.randn(3, 128, requires_grad=True)
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for module in linears:
        module.quant_state, module.quant_storage = module.weight.quant_state, torch.uint8
        module.weight.data = module.weight.data.view(-1)[:, None]
    want = model(x)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x)
    for act in order.split(", "):
        if act == "patch":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing to patch
                report = fastfuse.patch(model)
        else:
            fully_shard(model, mesh=mesh)
            for module in model.modules():
                if changed == "the hook's name":
                    for hook in module._load_state_dict_post_hooks.values():
                        hook.__qualname__ = "ShardedParam.<lambda>"
                else:
                    del module.__dict__["_load_state_dict_post_hooks"]
    if order == "shard, patch":
        assert {(e.status, e.code) for e in report.entries} == {("skipped", "DTENSOR")}
    else:
        described = fastfuse.status(model).entries
        assert {(e.status, e.code) for e in described} == {("patched", "DTENSOR")}
        assert all(e.reason.startswith("runs its own forward for now: ") for e in described)  # which is less than the truth
    got = model(x)
    got.square().sum().backward()
    assert fastfuse.status(model).fallbacks == {}
    assert_rounding_apart(got, want, K=256, products=2)
    assert_rounding_apart(x.grad, want_grad, K=256, products=4)


def test_a_shard_that_no_call_finds_gathered(mesh):
    """The hook of FSDP2 by name, over a weight that stays a DTensor: patched, and every call is left to the layer's own forward."""
    model, x = quantized("bitsandbytes"), torch.randn(3, 128)
    layer = model.up
    layer.quant_state, layer.quant_storage = layer.weight.quant_state, torch.uint8

    def hook(module, incompatible):
        pass

    hook.__qualname__ = "FSDPParam.hook"
    layer.register_load_state_dict_post_hook(hook)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data.view(-1)[:, None], mesh, [Replicate()]), requires_grad=False)
    assert fastfuse.patch(model).counts == {"patched": 2}
    layer._fastfuse.original = lambda given: given @ torch.ones(128, 256)  # bitsandbytes' cannot multiply by one
    with pytest.warns(UserWarning, match="DTENSOR"):
        assert torch.equal(layer(x), x @ torch.ones(128, 256))
    assert fastfuse.status(model).fallbacks == {"DTENSOR": 1}


@pytest.mark.parametrize("order", ["patch, shard", "shard, patch"])
@pytest.mark.parametrize("what", ["QUANT_TYPE", "CPU_PACKED_BNB", "CPU_UNPACKED_BNB", "NOT_NF4", "16 bits", "plain"])
def test_fsdp2_shards_what_no_kernel_reads(what, order, mesh):
    """A layer that no call is fused in is skipped with the code that it has unsharded: gathering its shards changes nothing of that."""
    model, code = quantized("bitsandbytes", storage="flat"), what if what.isupper() else "NOT_NF4"
    layer = model.up
    layer.quant_state = state = layer.weight.quant_state
    if what == "QUANT_TYPE":
        state.quant_type = "fp4"
    elif what == "CPU_PACKED_BNB":
        state.packing_format_for_cpu = True
    elif what == "CPU_UNPACKED_BNB":
        state.absmax = state.absmax.view(256, 2).T.contiguous()
    elif what == "NOT_NF4":
        state.shape = torch.Size([256, 256])  # twice the codes that there are
    elif what == "16 bits":
        state.code = state.code.bfloat16()
    else:
        layer.weight, layer.quant_state = nn.Parameter(torch.randn(256, 128)), None
    if order == "patch, shard":
        assert [(e.status, e.code) for e in fastfuse.patch(model).entries] == [("skipped", code), ("patched", "")]
    model.down.quant_state = model.down.weight.quant_state
    fully_shard(model, mesh=mesh)
    report = fastfuse.status(model) if order == "patch, shard" else fastfuse.patch(model)
    skipped = "unpatched" if order == "patch, shard" else "skipped"
    assert [(e.status, e.code) for e in report.entries] == [(skipped, code), ("patched", "")]


@pytest.mark.parametrize("what", ["HOOKED", "CHILD_TYPE", "LORA_BIAS", "DROPOUT"])
def test_fsdp2_hides_no_other_reason(what, mesh):
    """The report looks past shards that will be whole in a call, and says what the call then counts."""
    model, x = lora("bitsandbytes", use_dora=what == "LORA_BIAS"), torch.randn(3, 128)
    layer = model.base_model.model.up
    if what == "HOOKED":
        layer.lora_B["default"].register_forward_hook(lambda *_: None)
    elif what == "CHILD_TYPE":
        layer.lora_B["default"].forward = MethodType(nn.Linear.forward, layer.lora_B["default"])
        layer.lora_B["default"].__class__ = type("Mine", (nn.Linear,), {})
    elif what == "LORA_BIAS":
        layer.lora_A["default"].bias = nn.Parameter(torch.zeros(8))
    else:
        layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    for m in (layer, model.base_model.model.down):
        m.base_layer.quant_state = m.base_layer.weight.quant_state
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    report = fastfuse.patch(model, ops="nf4_lora_linear").patched
    assert [(e.code, e.reason.partition(": ")[0]) for e in report] == [(what, "runs its own forward for now"), ("", "")]
    assert all(parameters[name] is p for name, p in model.named_parameters())  # the very same
    with pytest.warns(UserWarning, match=what):
        model(x)
    assert fastfuse.status(model).fallbacks == {what: 1}


def fsdp2_over_torchao(rank: int, folder: str) -> None:
    """One of two processes: torchao gathers its weights over two at least."""
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    torch.manual_seed(0)
    models = [quantized("torchao"), nn.Sequential(LoRALinear(128, 256, 8, 16.0, quantize_base=True), LoRALinear(256, 128, 8, 16.0, quantize_base=True))]
    for model, status in zip(models, ("patched", "already"), strict=True):
        for p in model.parameters():
            p.requires_grad_(False)
        x = torch.randn(3, 128, requires_grad=True)
        want = model(x)
        (want_grad,) = torch.autograd.grad(want.square().sum(), x)
        fastfuse.patch(model)
        for unit in [*model.children(), model]:
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        before = fastfuse.status(model)
        got = model(x)
        got.square().sum().backward()
        assert all(type(p).__name__ == "DTensor" for p in next(model.children()).parameters())
        for report in (before, fastfuse.status(model)):
            assert [(e.status, e.code, e.reason, dict(e.fallbacks)) for e in report.entries] == [(status, "", "", {})] * 2
        assert_rounding_apart(got, want, K=256, products=2)
        assert_rounding_apart(x.grad, want_grad, K=256, products=4)
        fastfuse.unpatch(model)
        assert fastfuse.patch(model).counts == {status: 2}  # of shards too
    dist.destroy_process_group()


def test_fsdp2_over_torchao_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(fsdp2_over_torchao, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base bias", "lora_B bias", "magnitude"])
@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_a_dtensor_is_left_to_the_modules_own_forward(part, when, mesh):
    model, x = lora("bitsandbytes", lora_bias=part == "lora_B bias", use_dora=part == "magnitude"), torch.randn(3, 128)
    layer = model.base_model.model.up
    owner, name = {
        "lora_A": (layer.lora_A["default"], "weight"),
        "lora_B": (layer.lora_B["default"], "weight"),
        "base bias": (layer.base_layer, "bias"),
        "lora_B bias": (layer.lora_B["default"], "bias"),
        "magnitude": (layer.lora_magnitude_vector["default"] if part == "magnitude" else None, "weight"),
    }[part]
    want = layer(x)
    if when == "after the patch":
        fastfuse.patch(model, ops="nf4_lora_linear")
    setattr(owner, name, nn.Parameter(distribute_tensor(getattr(owner, name).detach(), mesh, [Replicate()])))
    if when == "before the patch":
        report = fastfuse.patch(model, ops="nf4_lora_linear")
        assert [e.code for e in report.patched] == ["DTENSOR", ""] and report.patched[0].reason.startswith("runs its own forward for now: a weight is sharded")
    # PyTorch has no rule by which bitsandbytes' own op takes a DTensor bias: that error is the unpatched layer's too.
    refused = pytest.raises((NotImplementedError, RuntimeError)) if part == "base bias" else contextlib.nullcontext()
    with implicit_replication(), pytest.warns(UserWarning, match="DTENSOR"), refused:
        assert_rounding_apart(layer(x).full_tensor(), want, K=128, products=2)
    assert fastfuse.status(model).fallbacks == {"DTENSOR": 1}


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_bias_that_is_a_dtensor_is_reported(host, when, mesh):
    """One that no call finds gathered: FSDP2 did not make it."""
    model, x = quantized(host), torch.randn(3, 128)
    if when == "after the patch":
        fastfuse.patch(model)
    model.up.bias = nn.Parameter(distribute_tensor(model.up.bias.detach(), mesh, [Replicate()]))
    report = fastfuse.status(model) if when == "after the patch" else fastfuse.patch(model)
    words = "runs its own forward for now: a weight is sharded (DTensor): the op would see one shard"
    assert [(e.status, e.code, e.reason) for e in report.entries] == [("patched", "DTENSOR", words), ("patched", "", "")]
    # What the library's own forward makes of such a bias, an error or a result, is its own: what counts is that the call was left to it, and counted.
    with implicit_replication(), pytest.warns(UserWarning, match="DTENSOR"), contextlib.suppress(NotImplementedError, RuntimeError):
        model.up(x)
    assert fastfuse.status(model).fallbacks == {"DTENSOR": 1}


def test_a_base_weight_that_is_a_dtensor_is_reported(mesh):
    model, x = lora("bitsandbytes"), torch.randn(3, 128)
    fastfuse.patch(model)
    layer = model.base_model.model.up
    whole = layer.base_layer.weight
    layer.base_layer.quant_state = whole.quant_state
    layer.base_layer.weight = nn.Parameter(distribute_tensor(whole.data, mesh, [Replicate()]), requires_grad=False)
    with pytest.warns(UserWarning, match="DTENSOR"), contextlib.suppress(RuntimeError):  # bitsandbytes' own op takes none
        layer(x)
    assert fastfuse.status(model).fallbacks == {"DTENSOR": 2}  # the adapted layer and its base
    layer.base_layer.weight = whole
    assert_rounding_apart(layer(x), layer._fastfuse and type(layer).forward(layer, x), K=128, products=2)


def trained(model, batches, folder, **options) -> list[float]:
    """The losses by transformers' Trainer, one at each of three steps."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        learning_rate=1e-2, seed=0, **options,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in batches]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the first precision that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"optim": "sgd", "max_grad_norm": 0.1}], ids=str)
def test_trainer(options, tmp_path, fresh_accelerator):
    model, batches = llama(), tokens(6, 11)
    twin = copy.deepcopy(model)
    want = trained(model, batches, tmp_path, **options)
    fastfuse.patch(twin)
    got = trained(twin, batches, tmp_path, **options)
    assert len(got) == 3 and len(set(got)) == 3
    assert_rounding_apart(torch.tensor(got), torch.tensor(want), K=128, products=3 * 4 * LINEARS)  # three steps, there and back
    assert fastfuse.status(twin).fallbacks == {}


def test_trainer_in_bf16_with_checkpointing_is_fused(tmp_path, fresh_accelerator):
    model, batches = llama(torch.bfloat16), tokens(6, 11)
    twin = copy.deepcopy(model)
    want = trained(model, batches, tmp_path, bf16=True, gradient_checkpointing=True)
    fastfuse.patch(twin)
    got = trained(twin, batches, tmp_path, bf16=True, gradient_checkpointing=True)
    assert_rounding_apart(torch.tensor(got).bfloat16(), torch.tensor(want).bfloat16(), K=128, products=3 * 4 * LINEARS)
    assert fastfuse.status(twin).fallbacks == {}


@pytest.mark.parametrize("patch_after", [False, True])
def test_a_loop_written_by_hand_over_accelerate(patch_after, fresh_accelerator):
    model, batches = llama(), tokens(3, 2, 11)
    curves = []
    for m in (copy.deepcopy(model), model):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        if m is model and not patch_after:
            fastfuse.patch(m)
        m, optimizer, loader = accelerator.prepare(m, optimizer, torch.utils.data.DataLoader(batches, batch_size=None))
        if m is model and patch_after:
            fastfuse.patch(m)
        losses = []
        for ids in loader:
            with accelerator.accumulate(m):
                loss = m(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert_rounding_apart(curves[1], curves[0], K=128, products=3 * 4 * LINEARS)
    assert fastfuse.status(model).counts == {"patched": 2 * LINEARS} and fastfuse.status(model).fallbacks == {}


def rms_norm(self, hidden):
    return 1.5 * self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def swiglu(self, x):
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) / 2


@pytest.mark.parametrize("order", ["patch, other", "other, patch"])
def test_another_library_that_binds_forwards(order):
    """As Liger does (its kernels need a GPU): methods on the instances of norms and MLPs, which call the patched projections and outlive an unpatch."""
    model, ids = llama(), tokens(2, 11)
    twin = copy.deepcopy(model)

    def other(m):
        for layer in m.base_model.model.model.layers:
            layer.mlp.__dict__["forward"] = MethodType(swiglu, layer.mlp)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.__dict__["forward"] = MethodType(rms_norm, norm)

    other(twin)
    want = step(twin, ids)
    for act in order.split(", "):
        fastfuse.patch(model) if act == "patch" else other(model)
    assert_same_step(step(model, ids), want)
    assert fastfuse.status(model).counts == {"patched": 2 * LINEARS} and fastfuse.status(model).fallbacks == {}
    fastfuse.unpatch(model)
    assert model.base_model.model.model.layers[0].mlp.forward.__func__ is swiglu
    assert torch.equal(model(input_ids=ids, labels=ids).loss, want[0])


def test_a_model_loaded_by_transformers(tmp_path):
    """from_pretrained(quantization_config=...) as in every QLoRA recipe."""
    plain = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=97)
    )
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").train()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = tokens(2, 11)
    want = step(model, ids)
    assert fastfuse.patch(model, verify=True).counts == {"patched": 2 * LINEARS}
    assert_same_step(step(model, ids), want)
    assert fastfuse.status(model).fallbacks == {}


def test_a_model_without_data():
    """On the meta device: what is not quantized yet says so, and what is runs."""
    with torch.device("meta"):
        empty = nn.Sequential(bnb.nn.Linear4bit(128, 256, quant_type="nf4"), bnb.nn.Linear4bit(256, 128, quant_type="nf4"))
    report = fastfuse.patch(empty)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "NOT_NF4")] * 2
    assert fastfuse.status(empty).counts == {"unpatched": 2} and not fastfuse.unpatch(empty)
    model = lora("torchao").to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fastfuse.patch(model)
        assert str(report) and str(fastfuse.status(model))
        fastfuse.patch(model, dry_run=True, on_unsupported="warn")
    fastfuse.unpatch(model)
    assert not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_disabled_by_the_environment(monkeypatch):
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want, before = model(x), [dict(m.__dict__) for m in model.modules()]
    monkeypatch.setenv("FASTFUSE_DISABLE", "1")
    report = fastfuse.patch(model, on_unsupported="raise")  # asked for: nothing to raise
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "DISABLED")] * 4 and not report and "FASTFUSE_DISABLE" in str(report)
    with fastfuse.patched(model):
        assert torch.equal(model(x), want)
    assert [dict(m.__dict__) for m in model.modules()] == before
    monkeypatch.setenv("FASTFUSE_DISABLE", "0")
    assert fastfuse.patch(model).counts == {"patched": 4}


def test_strict_by_the_environment(monkeypatch):
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    model.add_adapter("rs", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    fastfuse.patch(model)
    monkeypatch.delenv("FASTFUSE_STRICT")  # what counts is how it was patched
    model(x)
    with model.disable_adapter():
        model(x)
    model.set_adapter("rs")
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
    assert set(fastfuse.status(model).fallbacks) == {"ADAPTERS_DISABLED", "NO_ADAPTER", "MERGED"}
    model.base_model.model.up.lora_A["rs"].register_forward_hook(lambda m, args, out: None)
    with pytest.raises(fastfuse.Unsupported, match="FASTFUSE_STRICT is set: HOOKED") as raised:
        model(x)
    assert raised.value.code == "HOOKED"
    fastfuse.unpatch(model)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="HOOKED"):
        model(x)


class Squarer(nn.Module):
    """A module of the user's own."""

    def __init__(self, power=2):
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.tensor(3.0)), power

    def forward(self, x, *, shift=0.0):
        return self.scale * x**self.power + shift


def squared(module, x, shift=0.0):
    if module.power != 2:
        raise fastfuse.Unsupported(f"power {module.power}", "POWER")
    return module.scale * x * x + shift


@pytest.fixture
def registration():
    made = fastfuse.register_host("squarer", "square", lambda module: isinstance(module, Squarer), squared)
    yield made
    made.remove()


def test_a_module_of_ones_own(registration):
    model, x = nn.Sequential(Squarer(), Squarer(3), lora("bitsandbytes")), torch.randn(4, 128)
    want, twice = model(x), model[0](x, shift=2.0)
    report = fastfuse.patch(model, ops="square")
    assert [(e.name, e.host, e.op, e.backend) for e in report.patched] == [("0", "squarer", "square", "torch"), ("1", "squarer", "square", "torch")]
    with pytest.warns(UserWarning, match="POWER: power 3"):
        assert_rounding_apart(model(x), want, K=256, products=3)
    assert_rounding_apart(model[0](x, shift=2.0), twice, K=1)
    assert [dict(e.fallbacks) for e in fastfuse.status(model).entries][:2] == [{}, {"POWER": 1}]
    fastfuse.patch(model)
    assert fastfuse.status(model).counts == {"patched": 6}
    assert fastfuse.unpatch(model).counts == {"restored": 6}
    assert torch.equal(model(x), want)


def test_what_a_removed_host_has_patched_stays_patched(registration):
    model, x = nn.Sequential(Squarer()), torch.randn(4)
    want = model(x)
    fastfuse.patch(model)
    registration.remove()
    registration.remove()  # nothing left to do
    assert "forward" in model[0].__dict__
    assert_rounding_apart(model(x), want, K=1)
    assert [(e.host, e.code) for e in fastfuse.status(model).entries] == [("squarer", "")]
    with pytest.raises(ValueError, match="ops has 'square', known are"):
        fastfuse.patch(model, ops="square")


def test_what_a_removed_host_has_patched_is_given_back(registration):
    model = nn.Sequential(Squarer())
    fastfuse.patch(model)
    registration.remove()
    assert fastfuse.unpatch(model).counts == {"restored": 1}
    assert "forward" not in model[0].__dict__ and "_fastfuse" not in model[0].__dict__


def test_a_host_of_ones_own_comes_before_the_built_in_ones():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)

    def doubled(module, x):
        return 2 * type(module).forward(module, x)

    want = model.base_model.model.up(x)
    mine = fastfuse.register_host("doubled", "nf4_lora_linear", lambda module: module is model.base_model.model.up, doubled)
    try:
        report = fastfuse.patch(model, ops="nf4_lora_linear")
        assert [e.host for e in report.patched] == ["doubled", "PEFT LoRA"]
        assert torch.equal(model.base_model.model.up(x), 2 * want)
    finally:
        mine.remove()


@pytest.mark.parametrize(
    "name, op, matches, forward, error, message",
    [
        ("squarer", "other", bool, squared, ValueError, "the name 'squarer' is taken"),
        ("PEFT LoRA", "other", bool, squared, ValueError, "the name 'PEFT LoRA' is taken"),
        ("mine", "other", "Squarer", squared, TypeError, "matches is a str, not callable"),
        ("mine", "other", bool, None, TypeError, "forward is a NoneType, not callable"),
        ("", "other", bool, squared, TypeError, "name is '', not a name"),
        ("mine", 3, bool, squared, TypeError, "op is 3, not a name"),
    ],
)
def test_a_host_that_cannot_be_registered(name, op, matches, forward, error, message, registration):
    with pytest.raises(error, match=message):
        fastfuse.register_host(name, op, matches, forward)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "state_dict"])
def test_saved_while_registered(how, registration):
    model, x = nn.Sequential(Squarer(), Squarer()), torch.randn(4)
    want, keys = model(x), list(model.state_dict())
    fastfuse.patch(model)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        assert list(model.state_dict()) == keys
        loaded = nn.Sequential(Squarer(), Squarer())
        loaded.load_state_dict(model.state_dict())
    assert fastfuse.status(loaded).counts == {"unpatched": 2} and torch.equal(loaded(x), want)
    assert fastfuse.patch(loaded).counts == {"patched": 2}


def test_a_dense_model_has_nothing_to_patch():
    with pytest.warns(UserWarning, match="found nothing to patch"):
        fastfuse.patch(Block())
    assert fastfuse.patch(quantized("torchao")).counts == {"patched": 2}
