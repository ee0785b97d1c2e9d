"""patch_embed: pictures in tiles, tables in both forms, pixels in every layout; torchtune's loop over images as the formula."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import Call, Op, Refusal, Tensors, route
from fastfuse import Unsupported, tune
from fastfuse.ops import patch_embed, patch_embed_bwd

T = 4  # the tables' side
NAMES = ("images", "weight", "cls", "aspect_ratio", "local_pos", "global_pos", "gate", "pre_pos", "pre_gate", "bias")


def place_images(x: Tensor, table: Tensor, gate: Tensor | None, aspect_ratio: Tensor) -> Tensor:
    """x [images, tiles, n, d], written: tile r * w + c of an image of h x w tiles += tanh(gate) * table[r, c]."""
    for image, (h, w) in enumerate(aspect_ratio):
        tiles = h * w
        if tiles:
            entry = table[:h, :w].reshape(tiles, *table.shape[2:])
            x[image, :tiles] += entry if gate is None else entry * gate.tanh()
    return x


def place_ids(x: Tensor, table: Tensor, gate: Tensor | None, ids: Tensor) -> Tensor:
    """x, written: tile i of an image += tanh(gate) * table[its id, i], whether the image reaches so far or not."""
    for image, row in enumerate(ids):
        entry = table[row, : x.shape[1]]
        x[image] += entry if gate is None else entry * gate.tanh()
    return x


def pixels_as(images: Tensor, weight: Tensor, scale, shift) -> Tensor:
    """pixel * scale + shift, in fp32 at least, then weight's dtype."""
    if scale is not None or shift is not None:
        images = images.to(torch.promote_types(weight.dtype, torch.float32))
        for values, combine in ((scale, torch.mul), (shift, torch.add)):
            if values is not None:
                images = combine(images, torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1))
    return images.to(weight.dtype)


def loop(
    images, weight, cls=None, aspect_ratio=None, local_pos=None, global_pos=None, gate=None, pre_pos=None, pre_gate=None,
    *, bias=None, norm=None, append_cls=False, scale=None, shift=None, pad_tokens_to=1,
):  # fmt: skip
    """patch_embed as torchtune places tiles, each image read on the host and added in place to its slice of x; every step rounds to the dtype it is in.

    It grows with the square of the number of images: the backward of every slice add copies the gradient of all of x."""
    lead, (n_tiles, *_) = images.shape[:-4], images.shape[-4:]
    x = pixels_as(images, weight, scale, shift).reshape(-1, *images.shape[-3:])
    x = F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2).unflatten(0, (lead.numel(), n_tiles)).clone()
    place = place_images
    if aspect_ratio is None:
        aspect_ratio = torch.ones(lead.numel(), 2, dtype=torch.int64, device=images.device)
    elif aspect_ratio.dim() == len(lead):
        aspect_ratio, place = aspect_ratio.reshape(-1), place_ids
    aspect_ratio = aspect_ratio.reshape(lead.numel(), 2) if place is place_images else aspect_ratio
    if pre_pos is not None:
        x = place(x, pre_pos, pre_gate, aspect_ratio)
    if cls is not None:
        token = cls.to(x.dtype).expand(*x.shape[:2], 1, -1)
        x = torch.cat([x, token] if append_cls else [token, x], 2)
    if local_pos is not None:
        x = x + (local_pos if gate is None else local_pos * (1 - gate.tanh()))
    if global_pos is not None:
        x = place(x.to(torch.promote_types(x.dtype, global_pos.dtype), copy=True), global_pos, gate, aspect_ratio)
    if norm is not None:
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        w, b = (None if t is None else t.to(wide) for t in norm[:2])
        x = F.layer_norm(x.to(wide), x.shape[-1:], w, b, norm[2]).to(dtype)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % pad_tokens_to))
    return x.view(*lead, *x.shape[1:])


def pictures(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    if layout == "crop":  # of a larger batch, at an offset
        return pictures((*shape[:-2], shape[-2] + 3, shape[-1] + 5), dtype, "plain", device)[..., 2:-1, 1:-4]
    if layout == "transposed":
        return pictures((*shape[:-2], shape[-1], shape[-2]), dtype, "plain", device).mT
    if layout == "expanded":
        return pictures((1, *shape[1:]), dtype, "plain", device).expand(shape)
    if layout == "channels_last":
        return pictures((*shape[:-3], *shape[-2:], shape[-3]), dtype, "plain", device).movedim(-1, -3)
    return torch.randint(256, shape, dtype=torch.uint8, device=device) if dtype == torch.uint8 else torch.randn(shape, device=device).to(dtype)


def make(
    device, ratios=((2, 2), (1, 3), (4, 1)), *, lead=None, n_tiles=T, grid=(3, 5), patch=(2, 3), C=3, D=20, dtype=torch.float32, tables=None, pixels=None,
    layout="plain", cls=True, local=True, table=True, pre=True, gates=True, bias=False, norm=False, ids=None, no=(), empty=(), eps=1e-5,
    formula: Callable = loop, **options,
) -> Call:  # fmt: skip
    """grid, patch: patches of a tile, pixels of a patch. dtype, tables, pixels: of the weight, of all that is added, of the images. cls to norm: what there
    is. ids: entries of tables by id. no: names to leave out, empty: images of zeros, eps: of the norm; options: patch_embed's own."""
    n, entries = grid[0] * grid[1] + cls, ids or T

    def leaf(there, *shape):
        return torch.randn(shape, device=device).to(tables or dtype).requires_grad_() if there else None

    lead = (len(ratios),) if lead is None else lead
    images = pictures((*lead, n_tiles, C, grid[0] * patch[0], grid[1] * patch[1]), pixels or dtype, layout, device)
    for image in empty:
        images[image] = 0
    tensors = {
        "images": images.requires_grad_(images.is_floating_point()),
        "weight": (torch.randn(D, C, *patch, device=device) * (C * patch[0] * patch[1]) ** -0.5).to(dtype).requires_grad_(),
        "cls": leaf(cls, D),
        "aspect_ratio": None if ratios is None else torch.tensor(ratios, dtype=torch.int64, device=device).reshape((*lead, *([] if ids else [2]))),
        "local_pos": leaf(local, n, D),
        "global_pos": leaf(table, entries, T, n, D),
        "gate": None,
        "pre_pos": leaf(pre, entries, T, 1, D),
        "pre_gate": None,
        "bias": leaf(bias, D),
        "norm_weight": leaf(norm, D),
        "norm_bias": leaf(norm, D),
    }
    for gate, there, value in (("gate", table, 0.7), ("pre_gate", pre, -0.4)):
        if there and gates:
            tensors[gate] = torch.full((1,), value, device=device, dtype=tables or dtype, requires_grad=True)
    eps = eps if norm else None
    return Call(partial(_through, patch_embed, eps, options), partial(_through, formula, eps, options), tensors | dict.fromkeys(no))


def _through(fn: Callable, eps: float | None, options: dict, tensors: Tensors, **more) -> Tensor:
    """fn: patch_embed or one with its arguments."""
    *places, bias = (tensors[name] for name in NAMES)
    norm = None if eps is None else (tensors["norm_weight"], tensors["norm_bias"], eps)
    return fn(*places, **{"bias": bias, "norm": norm} | options | more)


NUMBERS = {"scale": [1.5, 0.5, 2.0], "shift": [0.1, -0.2, 0.3]}
EVERYTHING = {"bias": True, "norm": True, "pad_tokens_to": 8, **NUMBERS}
SMALL = {"ratios": ((1, 2), (1, 1)), "n_tiles": 2, "grid": (1, 2), "D": 8}
BARE = {"local": False, "table": False, "pre": False}
CASES = {
    "everything": {**SMALL, **EVERYTHING, "append_cls": True},
    "ids, uint8": {**SMALL, "ratios": (1, 0), "ids": 3, "pixels": torch.uint8, "scale": 0.1},
    "positions": SMALL,
    "mixed ratios": {},
    "norm": {"ratios": ((1, 1), (2, 1)), "n_tiles": 2, "norm": True, "append_cls": True},
    "norm, padded, uint8": {"ratios": ((1, 1), (2, 1)), "n_tiles": 2, "pixels": torch.uint8, **EVERYTHING, "scale": 1 / 64, "shift": -2.0},
    "norm without bias": {**SMALL, "norm": True, "no": ("norm_bias",)},
    "norm without weight": {**SMALL, "norm": True, "no": ("norm_weight",)},
    "norm without eps": {**SMALL, "bias": True, "norm": True, "pad_tokens_to": 8, "eps": 0.0},  # nothing of a padding row's 1 / 0 may reach anything
    "padding images": {"ratios": ((0, 0), (1, 1), (2, 1)), "empty": (0, 1), "append_cls": True, "pad_tokens_to": 8, "bias": True},
    "uint8 by channel": {"pixels": torch.uint8, "scale": [0.02, 0.01, 0.03], "shift": [-2.0, -1.0, -2.5]},
    "uint8 as it is": {"pixels": torch.uint8, "ratios": ((2, 1),), "n_tiles": 3},
    "scale alone": {**SMALL, "scale": 3.0},
    "shift alone": {**SMALL, "shift": [1.0, 2.0, 3.0]},
    "scale by channel, one shift": {**SMALL, "scale": [1.0, 2.0, 3.0], "shift": 0.5, "pixels": torch.float16, "dtype": torch.bfloat16},
    "fp32 pixels": {"pixels": torch.float32, "dtype": torch.bfloat16},
    "bf16 pixels": {"pixels": torch.bfloat16, "dtype": torch.float16, **SMALL},
    "no CLS": {"cls": False},
    "no CLS, padded": {"cls": False, "pad_tokens_to": 8, "norm": True, **SMALL},
    "no tables": {**BARE, "bias": True},
    "no tables, ratio given": {**BARE, "cls": False, **SMALL},
    "local alone": {"table": False, "pre": False, "ratios": None, "lead": (2,)},
    "pre alone": {"table": False, "local": False},
    "pre and local": {"table": False, "bias": True},
    "global alone": {"local": False, "pre": False},
    "no gates": {"gates": False},
    "one tile without a ratio": {"ratios": None, "lead": (2,), "n_tiles": 1},
    "fewer tiles than the table": {"ratios": ((1, 1), (2, 1), (1, 2)), "n_tiles": 2},
    "more tiles than a side": {"ratios": ((2, 3), (3, 2)), "n_tiles": 6, "grid": (1, 2)},
    "a tile without height": {**SMALL, "ratios": ((0, 2), (1, 1), (3, 0))},
    "patch 14": {"patch": (14, 14), "ratios": ((2, 1),), "n_tiles": 2, "grid": (2, 2)},
    "patch 16, one channel": {"patch": (16, 16), "C": 1, "ratios": ((2, 1),), "n_tiles": 2, "grid": (1, 2), "scale": 2.0},
    "patch 32, uint8": {"patch": (32, 32), "ratios": ((1, 1),), "n_tiles": 1, "grid": (1, 2), "pixels": torch.uint8, "scale": 1 / 256},
    "patch 8 x 1": {"patch": (8, 1), **SMALL},
    "a pixel a patch": {"patch": (1, 1), **SMALL},
    "a tile a patch": {"patch": (6, 4), **SMALL, "grid": (1, 1)},
    "four channels": {"C": 4, "scale": [1.0, 2.0, 3.0, 4.0], "shift": [0.0, 1.0, 2.0, 3.0], **SMALL},
    "D 1": {**SMALL, "D": 1},
    "D 70": {**SMALL, "D": 70, "norm": True},
    "images of videos": {"lead": (2, 1, 2), "ratios": ((1, 1), (1, 2), (2, 1), (0, 0)), "n_tiles": 2},
    "4-D images": {"lead": (), "ratios": ((2, 2),)},
    "bf16 weight, fp32 tables": {"dtype": torch.bfloat16, "tables": torch.float32, "norm": True, **SMALL},
    "fp32 weight, fp16 tables": {"tables": torch.float16, "bias": True, **SMALL},
    "channels last": {"layout": "channels_last"},
    "crop": {"layout": "crop", "pixels": torch.uint8, "scale": 0.01},
    "expanded": {"layout": "expanded"},
    "transposed": {"layout": "transposed"},
    "ids": {"ids": 9, "ratios": (0, 8, 3), "pad_tokens_to": 8},
    "ids, fewer tiles": {"ids": 5, "ratios": (4, 1), "n_tiles": 3, "norm": True, "grid": (1, 2)},
    "ids, one image": {"ids": 5, "ratios": (2,), "lead": ()},
    "no images": {**SMALL, "ratios": (), "norm": True, "bias": True},
    "images without tiles": {**SMALL, "ratios": ((0, 0), (0, 0)), "n_tiles": 0, "norm": True, "bias": True},
}
GEMM = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "SUBTILES": 2, "DIRECT": False, "FLATTEN": False})
GATHER = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "SUBTILES": 4, "DIRECT": True, "FLATTEN": False})
FEW = [(vars(patch_embed_bwd), {"_NORM_PROGRAMS": 5})]  # several rows for each program of the norm's backward, as at real sizes
ROUTES = {
    "reference": partial(route, "auto"),
    "library": partial(route, "triton", {"patch_embed": None}, FEW),
    "gemm": partial(route, "triton", {"patch_embed": GEMM}, FEW),
    "gather": partial(route, "triton", {"patch_embed": GATHER}, FEW),
    "torch": partial(route, "torch"),
}


def _refused(error: type[Exception], message: str, given: dict | None = None, *, backend: str | None = None, **changes) -> Refusal:
    """changes: in the place of a tensor or an option; a function makes it of the tensor."""

    def call():
        made = make("cpu", **{"ratios": ((2, 2), (1, 1)), "grid": (2, 2)} | (given or {}))
        tensors = {n: change(made.tensors[n]) if callable(change) else change for n, change in changes.items() if n in made.tensors}
        made.run(made.tensors | tensors, backend=backend, **{n: value for n, value in changes.items() if n not in tensors})

    return call, error, message


of_value, of_type, uncovered = partial(_refused, ValueError), partial(_refused, TypeError), partial(_refused, Unsupported, backend="triton")
ones, ratios = torch.ones, torch.tensor


def _refusals_of_images() -> list[Refusal]:
    """And of the weight and of how tiles lie."""
    bare = dict.fromkeys(("local_pos", "global_pos", "gate", "pre_pos", "pre_gate"))
    return [
        of_value("tiles are 3 x 6 pixels, patches 2 x 3: patches must divide tiles", images=lambda t: t[..., :3, :]),
        of_value("tiles are 4 x 4 pixels, patches 2 x 3", images=lambda t: t[..., :4]),
        of_value("tiles are 4 x 0 pixels", images=lambda t: t[..., :0]),
        of_value(r"images has shape \(3, 4, 6\), expected \(..., n_tiles, C, H, W\)", images=lambda t: t[0, 0]),
        of_value(r"weight has shape \(20, 18\), expected \(D, C, ph, pw\)", weight=lambda t: t.flatten(1)),
        of_value("images have 2 channels, weight takes 3", images=lambda t: t[:, :, :2]),
        of_value("images is torch.int32, expected uint8 or floating point", images=lambda t: t.detach().int()),
        of_value("images is torch.bool, expected uint8", images=lambda t: t.detach() > 0),
        of_value(r"aspect_ratio has \[1, 5\].*, images have 4 tiles and max_num_tiles is 4", aspect_ratio=ratios([[1, 1], [1, 5]])),
        of_value(r"aspect_ratio has \[3, 2\].*, images have 4 tiles", aspect_ratio=ratios([[3, 2], [1, 1]])),
        of_value(r"aspect_ratio has \[-2, -2\].*, images have 4 tiles", aspect_ratio=ratios([[1, 1], [-2, -2]])),
        of_value(r"aspect_ratio has \[4294967297, 1\].*, images have 4 tiles", aspect_ratio=ratios([[1, 1], [2**32 + 1, 1]])),
        of_value("aspect_ratio is None, images have 4 tiles that pre_pos places", aspect_ratio=None),
        of_value("aspect_ratio is None, images have 4 tiles that global_pos places", aspect_ratio=None, pre_pos=None, pre_gate=None),
        of_value("aspect_ratio is torch.float32, expected integers", aspect_ratio=ones(2, 2)),
        of_value("aspect_ratio is torch.bool, expected integers", aspect_ratio=ones(2, 2, dtype=torch.bool)),
        of_value(r"aspect_ratio has shape \(1, 2\), images need \(2, 2\) of \(h, w\), or \(2,\) of ids", aspect_ratio=ratios([[1, 1]])),
        of_value(r"aspect_ratio has shape \(2, 3\), images need \(2, 2\)", aspect_ratio=ratios([[1, 1, 1], [1, 1, 1]])),
        of_value(r"aspect_ratio has shape \(1, 2\), images need \(2, 2\)", aspect_ratio=ratios([[1, 1]]), **bare),
        of_type("aspect_ratio is a list, not a tensor", aspect_ratio=[[1, 1], [1, 1]]),
        of_value("aspect_ratio has 9, tables have ids 0 to 8", {"ids": 9, "ratios": (3, 9)}),
        of_value("aspect_ratio has -1, tables have ids 0 to 8", {"ids": 9, "ratios": (-1, 3)}),
        of_value("images have 5 tiles, tables for ids hold 4", {"ids": 9, "ratios": (1, 3), "n_tiles": 5}),
        of_value("images is on cpu, weight on meta", weight=lambda t: t.to("meta")),
        of_value("weight is torch.int8, expected floating point", weight=lambda t: t.detach().to(torch.int8)),
        uncovered("weight is torch.float64, covered are bf16, fp16 and fp32", weight=Tensor.double),
        uncovered("weight is torch.float8_e4m3fn", weight=lambda t: t.detach().to(torch.float8_e4m3fn)),
        uncovered("images is torch.float64, covered are uint8", images=Tensor.double),
    ]


def _refusals_of_additions() -> list[Refusal]:
    """Of all that is added to the products, and of options."""
    return [
        of_value(r"local_pos has shape \(4, 20\), expected \(5, 20\)", local_pos=lambda t: t[:4]),
        of_value(r"global_pos has shape \(4, 4, 4, 20\), expected \[T, T, 5, 20\] or \[ids, T, 5, 20\]", global_pos=lambda t: t[:, :, :4]),
        of_value(r"global_pos has shape \(4, 5, 20\), expected \[T, T, 5, 20\]", global_pos=lambda t: t[0]),
        of_value(r"pre_pos has shape \(4, 4, 1, 19\), expected \[T, T, 1, 20\]", pre_pos=lambda t: t[..., :19]),
        of_value(r"global_pos is for \(4, 4\) tiles, pre_pos for \(3, 3\)", pre_pos=lambda t: t[:3, :3]),
        of_value(r"tables are for \[3, 4\] tiles, aspect_ratio in \(h, w\) needs \[T, T\]", pre_pos=lambda t: t[:3], global_pos=lambda t: t[:3]),
        of_value(r"cls has shape \(4,\), expected \(20,\)", cls=ones(4)),
        of_value(r"bias has shape \(4,\), expected \(20,\)", bias=ones(4)),
        of_value(r"norm_weight has shape \(4,\), expected \(20,\)", norm=(ones(4), None, 1e-5)),
        of_type(r"norm is .*expected \(weight, bias, eps\)", norm=(ones(20), ones(20))),
        of_type(r"norm is .*expected \(weight, bias, eps\)", norm=(ones(3, 20), ones(3, 20), None)),
        of_type(r"expected \(weight, bias, eps\) with a number for eps", norm=(None, None, "1e-5")),
        of_type(r"norm is .*LayerNorm.*expected \(weight, bias, eps\)", norm=nn.LayerNorm(20)),
        of_value(r"gate has shape \(2,\), expected one number", gate=ones(2)),
        of_value(r"pre_gate has shape \(2,\), expected one number", pre_gate=ones(2)),
        of_value("gate is given, global_pos is None: there is nothing to gate", global_pos=None),
        of_value("pre_gate is given, pre_pos is None", pre_pos=None),
        of_type("gate is a float, not a tensor", gate=0.5),
        of_value("scale has 2 numbers, images have 3 channels", scale=[1.0, 2.0]),
        of_value("shift has 4 numbers, images have 3 channels", shift=(1.0, 2.0, 3.0, 4.0)),
        of_type("scale is a tensor, expected a number or one for each channel", scale=ones(3)),
        of_type("scale", scale=[ones(())] * 3),
        of_type("scale is 'much', expected a number", scale="much"),
        of_value("pad_tokens_to is 0, expected a whole number >= 1", pad_tokens_to=0),
        of_value("pad_tokens_to is 1.5", pad_tokens_to=1.5),
        of_value("images is on cpu, pre_pos on meta", pre_pos=lambda t: t.to("meta")),
        of_value("backend is 'cuda', not one of", backend="cuda"),
        uncovered("local_pos is torch.float64, covered are", local_pos=Tensor.double),
    ]


OPS = [
    Op(
        "patch_embed", make, CASES, ("everything", "ids, uint8", "positions"),
        ("no CLS, padded", "no tables", "local alone", "no images", "bf16 pixels", "fp32 weight, fp16 tables"), ROUTES,
        kernels={"patchify_kernel", "tile_rows_kernel", "patch_embed_fwd_kernel", "place_kernel", "norm_bwd_kernel", "place_bwd_kernel"},
        backwards={"patchify_kernel": {"weight"}, "place_bwd_kernel": {"global_pos", "gate", "pre_pos", "pre_gate"}},
        autocast=("weight",),
        dynamic=({"images": (0,), "aspect_ratio": (0,)}, [{**SMALL, "ids": 9, "ratios": (3,) * n, "pixels": torch.uint8, "scale": 0.1, "norm": True, "pad_tokens_to": 8} for n in (2, 5, 7)]),
        refusals=[*_refusals_of_images(), *_refusals_of_additions()],
    )
]  # fmt: skip
