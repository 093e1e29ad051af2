"""The steps between the matrix products of a perturbed run, in Triton."""

import triton
import triton.language as tl

from shared_kernels.ops.triton_math import tanh

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_PI = tl.constexpr(0.7978845608028654)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _largest(y):
    """Largest absolute value as a bit pattern: these are in the order of the values, NaN last."""
    return tl.max(tl.abs(y).to(tl.int32, bitcast=True), 0)


@triton.jit
def _scale(bits):
    """Scale that makes a code of 448 from the largest absolute value."""
    size = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(size, 448.0)
    scale = tl.where(scale < _SMALLEST, _SMALLEST, scale)
    return tl.where(bits == 0, 1.0, scale)


@triton.jit
def _codes(y, scale):
    """Nearest e4m3 code to ``y / scale``, ties to even.

    In integers, so that the interpreter, which truncates, gives the codes that a GPU gives.
    """
    value = tl.div_rn(y, scale)
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    # the last place of 2^14 is the step of codes below 2^-6
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(bits > 0x7F800000, 0x7F, code)
    negative = value.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, code | 0x80, code).to(tl.uint8)


@triton.jit
def _store(values_ptr, scale_ptr, place, y, column, inside, width, FP8: tl.constexpr):
    """Round one token's values, all of them if they have a scale, and store them."""
    values_ptr += place * width
    if FP8:
        scale = _scale(_largest(y))
        tl.store(scale_ptr + place, scale)
        tl.store(values_ptr + column, _codes(y, scale), mask=inside)
    else:
        tl.store(values_ptr + column, y.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _centred(x, inside, width):
    return tl.where(inside, x - tl.sum(x, 0) / width, 0.0)


@triton.jit
def _norm_difference(x, root, a, inside, width, eps, KIND: tl.constexpr):
    """Norm(x + a) - Norm(x) where ``root`` is of ``mean(x^2) + eps``, and x is centred if need be.

    See `reference.norm_difference`.
    """
    if KIND == "layer":
        a = _centred(a, inside, width)
    whole = x + a
    moved = tl.sqrt_rn(tl.sum(whole * whole, 0) / width + eps)
    grown = tl.sum(a * (2.0 * x + a), 0) / width
    change = tl.div_rn(-grown, root * moved * (root + moved))
    return a * tl.div_rn(1.0, root) + whole * change


@triton.jit
def combine_norm_kernel(
    x_ptr,
    wide_ptr,
    narrow_ptr,
    offsets_ptr,
    entries_ptr,
    at_ptr,
    weight_ptr,
    values_ptr,
    scale_ptr,
    groups,
    rows,
    tokens,
    width,
    wide_slot,
    wide_row,
    narrow_slot,
    narrow_row,
    eps,
    KIND: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what one token of one receiver gets in one row, and take the norm's difference.

    Receivers are the fastest index and tokens the slowest: what several programs read, they read
    at about the same time.
    """
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    row = program // groups % rows
    token = program // groups // rows
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = token
    if at_ptr is not None:
        source = tl.load(at_ptr + token)
    wide_ptr += row * wide_row + source * width
    narrow_ptr += row * narrow_row + token * width
    low = tl.load(offsets_ptr + group)
    high = tl.load(offsets_ptr + group + 1)
    a = tl.zeros((BLOCK,), tl.float32)
    for index in range(low, high):
        entry = tl.load(entries_ptr + index).to(tl.int64)
        sender = tl.where(
            entry >= 0, wide_ptr + entry * wide_slot, narrow_ptr + (-1 - entry) * narrow_slot
        )
        a += tl.load(sender + column, mask=inside, other=0.0).to(tl.float32)
    y = a
    if KIND != "none":
        x = tl.load(x_ptr + (group * tokens + token) * width + column, mask=inside, other=0.0)
        if KIND == "layer":
            x = _centred(x, inside, width)
        root = tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
        y = _norm_difference(x, root, a, inside, width, eps, KIND)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0)
    place = (group * rows + row) * tokens + token
    _store(values_ptr, scale_ptr, place, y, column, inside, width, FP8)


@triton.jit
def prefix_norm_kernel(
    x_ptr,
    differences_ptr,
    picked_ptr,
    drop_ptr,
    start_ptr,
    at_ptr,
    weight_ptr,
    values_ptr,
    scale_ptr,
    rows,
    tokens,
    width,
    slot,
    eps,
    KIND: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Go through the rows of one token, BLOCK columns of it where there is no norm and no scale.

    A row's difference is read while the one before it is worked on.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = token
    if at_ptr is not None:
        source = tl.load(at_ptr + token)
    differences_ptr += source * width
    total = tl.zeros((BLOCK,), tl.float32)
    if start_ptr is not None:
        total = tl.load(start_ptr + token * width + column, mask=inside, other=0.0)
    if KIND != "none":
        x = tl.load(x_ptr + token * width + column, mask=inside, other=0.0)
        if KIND == "layer":
            x = _centred(x, inside, width)
        root = tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    first = tl.load(picked_ptr)
    coming = tl.load(differences_ptr + first * slot + column, mask=inside, other=0.0)
    place = token
    for row in range(rows):
        own = coming
        more = row + 1 < rows
        following = tl.load(picked_ptr + row + 1, mask=more, other=0)
        left = tl.where(more, width, 0)
        coming = tl.load(differences_ptr + following * slot + column, mask=column < left, other=0.0)
        a = total - own
        y = a
        if KIND != "none":
            y = _norm_difference(x, root, a, inside, width, eps, KIND)
            if weight_ptr is not None:
                y *= weight
        _store(values_ptr, scale_ptr, place, y, column, inside, width, FP8)
        total = tl.where(tl.load(drop_ptr + row) != 0, a, total)
        place += tokens


@triton.jit
def _activation(h, ACT: tl.constexpr):
    if ACT == "silu":
        y = h / (1.0 + tl.exp(-h))
    elif ACT == "gelu":
        y = 0.5 * h * (1.0 + tl.erf(h * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        y = 0.5 * h * (1.0 + tanh((h + 0.044715 * (h * h * h)) * _SQRT_2_PI))
    else:
        # not maximum(h, 0), which hides what is not a number
        y = tl.where(h < 0, 0.0, h)
    return y


@triton.jit
def _activation_change(
    moved_ptr, base_ptr, column, inside, features, ACT: tl.constexpr, GATED: tl.constexpr
):
    """Change of the activations of one token in one row, see `reference.activation_delta`."""
    base = tl.load(base_ptr + column, mask=inside, other=0.0)
    moved = tl.load(moved_ptr + column, mask=inside, other=0.0).to(tl.float32)
    old = _activation(base, ACT)
    y = _activation(base + moved, ACT) - old
    if GATED:
        up = tl.load(base_ptr + features + column, mask=inside, other=0.0)
        up_moved = tl.load(moved_ptr + features + column, mask=inside, other=0.0).to(tl.float32)
        y = y * (up + up_moved) + old * up_moved
    return y


@triton.jit
def activation_kernel(
    moved_ptr,
    base_ptr,
    values_ptr,
    scale_ptr,
    rows,
    tokens,
    features,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the change of BLOCK activations of one token in one row, of all if they have a scale."""
    program = tl.program_id(0).to(tl.int64)
    row = program % rows
    token = program // rows
    place = row * tokens + token
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    inputs = 2 * features if GATED else features
    y = _activation_change(
        moved_ptr + place * inputs, base_ptr + token * inputs, column, inside, features, ACT, GATED
    )
    _store(values_ptr, scale_ptr, place, y, column, inside, features, FP8)


@triton.jit
def activation_scaled_kernel(
    moved_ptr,
    base_ptr,
    values_ptr,
    scale_ptr,
    rows,
    tokens,
    features,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the changes of one token in one row twice: for their scale, and for their codes."""
    program = tl.program_id(0).to(tl.int64)
    row = program % rows
    token = program // rows
    place = row * tokens + token
    inputs = 2 * features if GATED else features
    moved_ptr += place * inputs
    base_ptr += token * inputs
    values_ptr += place * features
    largest = tl.zeros((BLOCK,), tl.int32)
    for low in range(0, features, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < features
        y = _activation_change(moved_ptr, base_ptr, column, inside, features, ACT, GATED)
        largest = tl.maximum(largest, tl.abs(y).to(tl.int32, bitcast=True))
    scale = _scale(tl.max(largest, 0))
    tl.store(scale_ptr + place, scale)
    for low in range(0, features, BLOCK):
        column = low + tl.arange(0, BLOCK)
        inside = column < features
        y = _activation_change(moved_ptr, base_ptr, column, inside, features, ACT, GATED)
        tl.store(values_ptr + column, _codes(y, scale), mask=inside)
