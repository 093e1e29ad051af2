"""Two passes over the logits of a student and of its teacher in Triton."""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Write x times a number, rounded to the output's dtype once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
    scaled = x * tl.load(scale_ptr)
    tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "inverse", "temperature", "ignore"])
def distillation_kernel(
    student_ptr,
    teacher_ptr,
    slope_ptr,
    place_ptr,
    labels_ptr,
    lm_ptr,
    kd_ptr,
    stats_ptr,
    student_stride,
    teacher_stride,
    slope_stride,
    width,
    inverse,
    temperature,
    ignore,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row's statistics and, with GRADIENT, the gradient of its logits.

    The first pass keeps the largest logits, and of the sums ``e^(z - peak)`` those of the student,
    at temperature 1 and tau, and of the teacher, with the moments that give entropy and KL. They
    are kept by lane and added up at the end. The slope may take the student's place: a thread
    overwrites what it has read itself.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    slope_ptr += row * slope_stride
    teacher_ptr += tl.load(place_ptr + row).to(tl.int64) * teacher_stride
    label = tl.load(labels_ptr + row)
    labelled = label != ignore
    label = tl.where(labelled, label, -1).to(tl.int32)
    # before anything is overwritten
    own = tl.load(student_ptr + label, mask=labelled, other=0.0)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    teacher_total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for low in range(0, width, BLOCK):
        column = low + lane
        mask = column < width
        s = tl.load(student_ptr + column, mask=mask, other=float("-inf"))
        t = tl.load(teacher_ptr + column, mask=mask, other=float("-inf"))
        # no lane waits for another: each has a peak of its own
        higher = tl.maximum(high, s)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((high - safe) * (inverse * _LOG2E))
        total += tl.exp2((s - safe) * (inverse * _LOG2E))
        if TEMPERED:
            plain = plain * tl.exp2((high - safe) * _LOG2E) + tl.exp2((s - safe) * _LOG2E)
        high = higher
        higher = tl.maximum(best, t)
        place = tl.where(t > best, column, place)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((best - safe) * (inverse * _LOG2E))
        shift = tl.where(best == float("-inf"), 0.0, best - safe)
        q = tl.exp2((t - safe) * (inverse * _LOG2E))
        moment = (moment + shift * teacher_total) * shrink + tl.where(mask, q * (t - safe), 0.0)
        gap = gap * shrink + tl.where(mask, q * (t - s), 0.0)
        teacher_total = teacher_total * shrink + q
        best = higher
    # from the lanes' peaks to those of the row
    peak = tl.max(high, 0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    drop = tl.where(high == float("-inf"), float("-inf"), high - safe)
    total *= tl.exp2(drop * (inverse * _LOG2E))
    if TEMPERED:
        plain *= tl.exp2(drop * _LOG2E)
    teacher_peak = tl.max(best, 0)
    safe = tl.where(teacher_peak == float("-inf"), 0.0, teacher_peak)
    drop = tl.where(best == float("-inf"), float("-inf"), best - safe)
    shrink = tl.exp2(drop * (inverse * _LOG2E))
    shift = tl.where(best == float("-inf"), 0.0, drop)
    moment = (moment + shift * teacher_total) * shrink
    gap *= shrink
    teacher_total *= shrink
    p_sum = tl.sum(total, 0)
    q_sum = tl.sum(teacher_total, 0)
    plain_sum = p_sum
    if TEMPERED:
        plain_sum = tl.sum(plain, 0)
    p_log = tl.log2(p_sum)
    q_log = tl.log2(q_sum)
    plain_log = tl.log2(plain_sum)
    chosen = tl.min(tl.where(best == teacher_peak, place, 0x7FFFFFFF), 0)
    agreement = tl.load(student_ptr + chosen, mask=chosen < width, other=float("nan")) == peak
    lm = tl.where(labelled, (peak - own) + plain_log / _LOG2E, 0.0)
    entropy = q_log / _LOG2E - tl.sum(moment, 0) * inverse / q_sum
    kl = tl.sum(gap, 0) * inverse / q_sum - (teacher_peak - peak) * inverse
    kl += (p_log - q_log) / _LOG2E
    tl.store(stats_ptr + row * 4, lm)
    tl.store(stats_ptr + row * 4 + 1, kl)
    tl.store(stats_ptr + row * 4 + 2, entropy)
    tl.store(stats_ptr + row * 4 + 3, agreement.to(tl.float32))
    if GRADIENT:
        a = tl.load(lm_ptr + row)
        b = tl.load(kd_ptr + row) * temperature
        # all have read the teacher's choice before any overwrites it
        tl.debug_barrier()
        blocks = tl.cdiv(width, BLOCK)
        for index in range(blocks):
            # backwards: what was read last may still be in the cache, and is not needed again
            column = (blocks - 1 - index) * BLOCK + lane
            mask = column < width
            s = tl.load(student_ptr + column, mask=mask, other=0.0, eviction_policy="evict_first")
            t = tl.load(teacher_ptr + column, mask=mask, other=0.0, eviction_policy="evict_first")
            # both laws by the same operations: the difference of equal ones is 0
            p = tl.exp2((s - peak) * (inverse * _LOG2E) - p_log)
            q = tl.exp2((t - teacher_peak) * (inverse * _LOG2E) - q_log)
            law = p
            if TEMPERED:
                law = tl.exp2((s - peak) * _LOG2E - plain_log)
            g = a * (law - tl.where(column == label, 1.0, 0.0)) + b * (p - q)
            tl.store(slope_ptr + column, g.to(slope_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "known", "inverse", "temperature", "ignore"])
def sparse_kernel(
    student_ptr,
    slope_ptr,
    indices_ptr,
    log_probs_ptr,
    labels_ptr,
    lm_ptr,
    kd_ptr,
    stats_ptr,
    student_stride,
    slope_stride,
    width,
    known,
    inverse,
    temperature,
    ignore,
    TAIL: tl.constexpr,
    TEMPERED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Write one row's statistics and gradient for a teacher of which ``known`` tokens are known.

    Their logits are taken out of the row, so that what is off them is a sum of its own; their
    gradients are written last. Barriers keep the three from overtaking each other.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    slope_ptr += row * slope_stride
    label = tl.load(labels_ptr + row)
    labelled = label != ignore
    label = tl.where(labelled, label, -1).to(tl.int32)
    own = tl.load(student_ptr + label, mask=labelled, other=0.0)
    entry = tl.arange(0, KNOWN)
    token = tl.load(indices_ptr + row * known + entry, mask=entry < known, other=-1).to(tl.int32)
    there = token >= 0
    logq = tl.load(log_probs_ptr + row * known + entry, mask=there, other=float("-inf"))
    q = tl.exp2(logq * _LOG2E)
    on = tl.load(student_ptr + token, mask=there, other=float("-inf"))
    # the likeliest entry, of equal ones the first
    first = tl.min(tl.where(q == tl.max(q, 0), entry, 0x7FFFFFFF), 0)
    best = tl.sum(tl.where((entry == first) & there, on, 0.0), 0)
    none = tl.sum(there.to(tl.int32), 0) == 0
    best = tl.where(none, tl.load(student_ptr), best)
    tl.debug_barrier()
    tl.store(student_ptr + token, float("-inf"), mask=there)
    tl.debug_barrier()
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    # relative to the largest off the indices, so that no mass is too small a number
    peak = tl.full((), float("-inf"), tl.float32)
    for low in range(0, width, BLOCK):
        column = low + lane
        s = tl.load(student_ptr + column, mask=column < width, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - safe) * (inverse * _LOG2E))
        total += tl.exp2((s - safe) * (inverse * _LOG2E))
        if TEMPERED:
            plain = plain * tl.exp2((peak - safe) * _LOG2E) + tl.exp2((s - safe) * _LOG2E)
        peak = higher
    off_peak = tl.where(peak == float("-inf"), 0.0, peak)
    empty = peak == float("-inf")
    peak = tl.maximum(peak, tl.max(on, 0))
    on -= peak
    drop = tl.where(empty, float("-inf"), off_peak - peak)
    off_sum = tl.where(empty, 1.0, tl.sum(total, 0))
    off_log = tl.log2(off_sum)
    p_sum = off_sum * tl.exp2(drop * (inverse * _LOG2E))
    p_sum += tl.sum(tl.exp2(on * (inverse * _LOG2E)), 0)
    plain_sum = p_sum
    if TEMPERED:
        plain_sum = tl.sum(plain, 0) * tl.exp2(drop * _LOG2E) + tl.sum(tl.exp2(on * _LOG2E), 0)
    p_log = tl.log2(p_sum)
    plain_log = tl.log2(plain_sum)
    logp = on * inverse - p_log / _LOG2E
    log_share = drop * inverse + (off_log - p_log) / _LOG2E
    share = tl.exp2(log_share * _LOG2E)
    mass = tl.sum(q, 0)
    rest = tl.zeros((), tl.float32)
    entropy = tl.zeros((), tl.float32)
    if TAIL:
        # nothing is off the indices of a whole vocabulary, whatever the masses round to
        rest = tl.where(empty, 0.0, tl.maximum(1.0 - mass, 0.0))
        some = rest > 0
        log_rest = tl.where(some, tl.log2(tl.where(some, rest, 1.0)) / _LOG2E, 0.0)
        kl = tl.sum(tl.where(q > 0, q * (logq - logp), 0.0), 0)
        kl += tl.where(some, rest * (log_rest - log_share), 0.0)
        entropy -= tl.sum(tl.where(q > 0, q * logq, 0.0), 0) + rest * log_rest
        mass += rest
    else:
        kl = -tl.sum(tl.where(q > 0, q * logp, 0.0), 0)
    lm = tl.where(labelled, (peak - own) + plain_log / _LOG2E, 0.0)
    tl.store(stats_ptr + row * 4, lm)
    tl.store(stats_ptr + row * 4 + 1, kl)
    tl.store(stats_ptr + row * 4 + 2, entropy)
    tl.store(stats_ptr + row * 4 + 3, (best == peak).to(tl.float32))
    if GRADIENT:
        a = tl.load(lm_ptr + row)
        b = tl.load(kd_ptr + row) * temperature
        # off the indices b (mass p - rest u) with their law u = p / share
        off = b * (mass * share - rest)
        for low in range(0, width, BLOCK):
            column = low + lane
            mask = column < width
            s = tl.load(student_ptr + column, mask=mask, other=0.0)
            g = off * tl.exp2((s - off_peak) * (inverse * _LOG2E) - off_log)
            law = tl.exp2((s - peak) * _LOG2E - plain_log)
            g += a * (law - tl.where(column == label, 1.0, 0.0))
            tl.store(slope_ptr + column, g.to(slope_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        g = b * (mass * tl.exp2(logp * _LOG2E) - q)
        g += a * (tl.exp2(on * _LOG2E - plain_log) - tl.where(token == label, 1.0, 0.0))
        tl.store(slope_ptr + token, g.to(slope_ptr.dtype.element_ty), mask=there)
