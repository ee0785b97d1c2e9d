"""silu(gate) * up, forward and backward, each in one pass and one rounding."""

import triton
import triton.language as tl


@triton.jit
def swiglu_fwd_kernel(e_ptr, g_ptr, h_ptr, n, BLOCK: tl.constexpr):
    """h = e * sigmoid(e) * g. Program p computes BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    e = tl.load(e_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32)
    tl.store(h_ptr + offs, (e * tl.sigmoid(e) * g).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(dh_ptr, e_ptr, g_ptr, de_ptr, dg_ptr, n, BLOCK: tl.constexpr):
    """dg = dh * silu(e);  de = dh * g * (sigmoid(e) + silu(e) * (1 - sigmoid(e))). Program p computes BLOCK elements."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    dh = tl.load(dh_ptr + offs, mask=mask).to(tl.float32)
    e = tl.load(e_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32)
    s = tl.sigmoid(e)
    tl.store(dg_ptr + offs, (dh * e * s).to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(de_ptr + offs, (dh * g * (s + e * s * (1 - s))).to(de_ptr.dtype.element_ty), mask=mask)
