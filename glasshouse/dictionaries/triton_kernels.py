"""Triton kernels of a dictionary's training step on a GPU: decode and residual by row, then each latent's gradients fused with Adam.

They follow `kernels.cpp`, with float32 sums whatever the rows they gather are stored in. Every row and every latent is summed by one program in
a fixed order (a latent with very many entries in parts, again in order), so there are no atomics and runs repeat bit for bit. Selection
and sorting are torch's (`gpu.py`, which alone imports this file: it needs triton).
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr, tensor


@triton.jit
def decode_rows(
    x: tensor, y: tensor, w_enc: tensor, b_enc: tensor, w_dec: tensor, b_dec: tensor, norms: tensor,
    chosen: tensor, row_ptr: tensor, level_end: tensor, value: tensor, slope: tensor, kept: tensor, residual: tensor, error: tensor,
    d_in: tensor, d_out: tensor, width: tensor, twice_share: tensor,
    LEVELS: constexpr, ENTRIES: constexpr, TILE_IN: constexpr, TILE_OUT: constexpr,
) -> None:  # fmt: skip
    """One program a row: `value` of its entries in float32, `residual` [levels d_out] (the gradient of the reconstructions), `slope` of the loss.

    Entries whose score (times norm) is not positive get value 0 and the latent `width` in `kept`. `error`: squared error of the whole.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        held = place < end
        latent = tl.load(chosen + place, mask=held, other=0).to(tl.int64)
        score = tl.load(b_enc + latent, mask=held, other=0.0)
        for tile in range(0, d_in, TILE_IN):
            column = tile + tl.arange(0, TILE_IN)
            inside = column < d_in
            here = tl.load(x + row * d_in + column, mask=inside, other=0.0)
            weight = tl.load(w_enc + latent[:, None] * d_in + column[None, :], mask=held[:, None] & inside[None, :], other=0.0)
            score += tl.sum(weight * here[None, :], axis=1)
        on = score * tl.load(norms + latent, mask=held, other=0.0) > 0
        tl.store(value + place, tl.where(on, score, 0.0), mask=held)
        tl.store(kept + place, tl.where(on, latent, width).to(tl.int32), mask=held)
    tl.debug_barrier()  # what some threads stored, others now load
    squares = 0.0
    for tile in range(0, d_out, TILE_OUT):
        column = tile + tl.arange(0, TILE_OUT)
        inside = column < d_out
        out = tl.load(b_dec + column, mask=inside, other=0.0) - tl.load(y + row * d_out + column, mask=inside, other=0.0)
        lower = 0
        for level in tl.static_range(LEVELS):
            upper = tl.load(level_end + level)
            for start in range(begin, end, ENTRIES):
                place = start + tl.arange(0, ENTRIES)
                latent = tl.load(kept + place, mask=place < end, other=width).to(tl.int64)
                mine = (latent >= lower) & (latent < upper)
                factor = tl.load(value + place, mask=mine, other=0.0)
                weight = tl.load(w_dec + latent[:, None] * d_out + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0).to(tl.float32)
                out += tl.sum(weight * factor[:, None], axis=0)
            tl.store(residual + (row * LEVELS + level) * d_out + column, twice_share * out, mask=inside)
            lower = upper
        squares += tl.sum(out * out)
        later = twice_share * out
        for back in tl.static_range(1, LEVELS):  # a latent of an early level is seen by all later reconstructions
            at = residual + (row * LEVELS + LEVELS - 1 - back) * d_out + column
            later += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, later, mask=inside)
    tl.store(error + row, squares)
    tl.debug_barrier()
    _slopes(residual + row * LEVELS * d_out, w_dec, kept, level_end, slope, begin, end, d_out, width, LEVELS, ENTRIES, TILE_OUT)


@triton.jit
def _slopes(
    residual: tensor, w_dec: tensor, kept: tensor, level_end: tensor, slope: tensor, begin: tensor, end: tensor, d_out: tensor, width: tensor,
    LEVELS: constexpr, ENTRIES: constexpr, TILE: constexpr,
) -> None:  # fmt: skip
    """Inner products of a row's entries' decoder rows with the residual of their level."""
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        latent = tl.load(kept + place, mask=place < end, other=width).to(tl.int64)
        mine = latent < width
        depth = tl.zeros([ENTRIES], dtype=tl.int64)
        for level in tl.static_range(LEVELS - 1):
            depth += (latent >= tl.load(level_end + level)).to(tl.int64)
        total = tl.zeros([ENTRIES], dtype=tl.float32)
        for tile in range(0, d_out, TILE):
            column = tile + tl.arange(0, TILE)
            both = mine[:, None] & (column < d_out)[None, :]
            weight = tl.load(w_dec + latent[:, None] * d_out + column[None, :], mask=both, other=0.0).to(tl.float32)
            if LEVELS == 1:
                above = tl.load(residual + column, mask=column < d_out, other=0.0).to(tl.float32)[None, :]
            else:
                above = tl.load(residual + depth[:, None] * d_out + column[None, :], mask=both, other=0.0).to(tl.float32)
            total += tl.sum(weight * above, axis=1)
        tl.store(slope + place, total, mask=place < end)


@triton.jit
def _sum_rows(
    rows: tensor, stride: tensor, row_of: tensor, factor: tensor, begin: tensor, end: tensor, column: tensor, inside: tensor,
    ENTRIES: constexpr, TILE: constexpr,
) -> tensor:  # fmt: skip
    """The sum of factor times row over entries begin .. end, for some columns."""
    total = tl.zeros([TILE], dtype=tl.float32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        held = place < end
        row = tl.load(row_of + place, mask=held, other=0).to(tl.int64)
        weight = tl.load(factor + place, mask=held, other=0.0)
        part = tl.load(rows + row[:, None] * stride + column[None, :], mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(part * weight[:, None], axis=0)
    return total


@triton.jit
def _sum_parts(partial: tensor, stride: tensor, first: tensor, last: tensor, column: tensor, inside: tensor, TILE: constexpr) -> tensor:
    """The sum of rows first .. last of `partial`, in order."""
    total = tl.zeros([TILE], dtype=tl.float32)
    for part in range(first, last):
        total += tl.load(partial + part * stride + column, mask=inside, other=0.0)
    return total


@triton.jit
def sum_long(
    part_begin: tensor, part_end: tensor, part_depth: tensor, row_of: tensor, value: tensor, slope: tensor, residual: tensor, x: tensor,
    partial: tensor, d_in: tensor, d_out: tensor,
    LEVELS: constexpr, ENTRIES: constexpr, TILE_IN: constexpr, TILE_OUT: constexpr,
) -> None:  # fmt: skip
    """One program a part of a latent with very many entries: its sums, [d_out + d_in], for `sum_latents` to add up."""
    part = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(part_begin + part), tl.load(part_end + part)
    if begin < end:
        mine = partial + part * (d_in + d_out)
        above = residual + tl.load(part_depth + part) * d_out
        for tile in range(0, d_out, TILE_OUT):
            column = tile + tl.arange(0, TILE_OUT)
            inside = column < d_out
            tl.store(mine + column, _sum_rows(above, LEVELS * d_out, row_of, value, begin, end, column, inside, ENTRIES, TILE_OUT), mask=inside)
        for tile in range(0, d_in, TILE_IN):
            column = tile + tl.arange(0, TILE_IN)
            inside = column < d_in
            tl.store(mine + d_out + column, _sum_rows(x, d_in, row_of, slope, begin, end, column, inside, ENTRIES, TILE_IN), mask=inside)


@triton.jit
def sum_latents(
    col_ptr: tensor, row_of: tensor, value: tensor, slope: tensor, residual: tensor, x: tensor, level_end: tensor, part_ptr: tensor, partial: tensor,
    aux_row: tensor, aux_dec: tensor, aux_enc: tensor, aux_b: tensor, w_dec: tensor, m_dec: tensor, v_dec: tensor, w_enc: tensor, m_enc: tensor,
    v_enc: tensor, b_enc: tensor, m_b: tensor, v_b: tensor, low_dec: tensor, low_enc: tensor, low_b: tensor, norms: tensor, rates: tensor,
    d_in: tensor, d_out: tensor, sites: tensor,
    APPLY: constexpr, LOW: constexpr, AUX: constexpr, SPLIT: constexpr, LEVELS: constexpr, ENTRIES: constexpr,
    TILE_IN: constexpr, TILE_OUT: constexpr,
) -> None:  # fmt: skip
    """One program a latent: its gradients, summed over its entries (and AuxK's), go into Adam at once; or with APPLY off into w_dec, w_enc, b_enc.

    `aux_row`: the row of AuxK's gradients that is added; row 0 is zero, for latents that are not dead.
    """
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(col_ptr + latent), tl.load(col_ptr + latent + 1)
    last, part, parts = end, begin, begin
    if SPLIT:
        part, parts = tl.load(part_ptr + latent), tl.load(part_ptr + latent + 1)
        last = tl.where(parts > part, begin, end)
    depth = tl.zeros([], dtype=tl.int64)
    for level in tl.static_range(LEVELS - 1):
        depth += (latent >= tl.load(level_end + level)).to(tl.int64)
    aux = tl.load(aux_row + latent).to(tl.int64) if AUX else 0
    above, site, total = residual + depth * d_out, d_out // sites, 0.0
    for where in range(sites):
        squares = 0.0
        for tile in range(0, site, TILE_OUT):
            inside = tile + tl.arange(0, TILE_OUT) < site
            column = where * site + tile + tl.arange(0, TILE_OUT)
            gradient = _sum_rows(above, LEVELS * d_out, row_of, value, begin, last, column, inside, ENTRIES, TILE_OUT)
            if SPLIT:
                gradient += _sum_parts(partial, d_in + d_out, part, parts, column, inside, TILE_OUT)
            if AUX:
                gradient += tl.load(aux_dec + aux * d_out + column, mask=inside, other=0.0)
            new = _take(w_dec, m_dec, v_dec, latent * d_out + column, inside, gradient, rates, APPLY)
            squares += tl.sum(new * new)
            if LOW:
                tl.store(low_dec + latent * d_out + column, new, mask=inside)
        total += tl.sqrt_rn(squares)
    for tile in range(0, d_in, TILE_IN):
        column = tile + tl.arange(0, TILE_IN)
        inside = column < d_in
        gradient = _sum_rows(x, d_in, row_of, slope, begin, last, column, inside, ENTRIES, TILE_IN)
        if SPLIT:
            gradient += _sum_parts(partial + d_out, d_in + d_out, part, parts, column, inside, TILE_IN)
        if AUX:
            gradient += tl.load(aux_enc + aux * d_in + column, mask=inside, other=0.0)
        new = _take(w_enc, m_enc, v_enc, latent * d_in + column, inside, gradient, rates, APPLY)
        if LOW:
            tl.store(low_enc + latent * d_in + column, new * total, mask=inside)
    _bias(begin, end, slope, aux, aux_b, b_enc, m_b, v_b, low_b, norms, rates, latent, total, APPLY, LOW, AUX)


@triton.jit
def _bias(
    begin: tensor, end: tensor, slope: tensor, aux: tensor, aux_b: tensor, b_enc: tensor, m_b: tensor, v_b: tensor, low_b: tensor, norms: tensor,
    rates: tensor, latent: tensor, norm: tensor,
    APPLY: constexpr, LOW: constexpr, AUX: constexpr,
) -> None:  # fmt: skip
    """The same for a latent's bias, and its new norm."""
    sums = tl.zeros([128], dtype=tl.float32)
    for start in range(begin, end, 128):
        place = start + tl.arange(0, 128)
        sums += tl.load(slope + place, mask=place < end, other=0.0)
    gradient = tl.sum(sums)
    if AUX:
        gradient += tl.load(aux_b + aux)
    new = _take(b_enc, m_b, v_b, latent, latent >= 0, gradient, rates, APPLY)
    if APPLY:
        tl.store(norms + latent, norm)
    if LOW:
        tl.store(low_b + latent, new * norm)


@triton.jit
def _take(value: tensor, first: tensor, second: tensor, at: tensor, inside: tensor, gradient: tensor, rates: tensor, APPLY: constexpr) -> tensor:
    """Adam from a gradient; or with APPLY off the gradient itself into `value`. Returns what was stored."""
    new = gradient
    if APPLY:
        m = tl.load(rates + 2) * tl.load(first + at, mask=inside, other=0.0) + tl.load(rates + 3) * gradient
        v = tl.load(rates + 4) * tl.load(second + at, mask=inside, other=0.0) + tl.load(rates + 5) * gradient * gradient
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        move = tl.load(rates) * m / (tl.sqrt_rn(v) * tl.load(rates + 1) + tl.load(rates + 6))
        new = tl.load(value + at, mask=inside, other=0.0) - move
    tl.store(value + at, new, mask=inside)
    return new


@triton.jit
def apply_gradients(
    g_dec: tensor, g_enc: tensor, g_b: tensor, factor: tensor, w_dec: tensor, m_dec: tensor, v_dec: tensor, w_enc: tensor, m_enc: tensor,
    v_enc: tensor, b_enc: tensor, m_b: tensor, v_b: tensor, low_dec: tensor, low_enc: tensor, low_b: tensor, norms: tensor, rates: tensor,
    d_in: tensor, d_out: tensor, sites: tensor,
    LOW: constexpr, TILE_IN: constexpr, TILE_OUT: constexpr,
) -> None:  # fmt: skip
    """Adam from gradients that `sum_latents` stored (and others may have summed since), each times `factor`."""
    latent = tl.program_id(0).to(tl.int64)
    times, site, total = tl.load(factor), d_out // sites, 0.0
    for where in range(sites):
        squares = 0.0
        for tile in range(0, site, TILE_OUT):
            inside = tile + tl.arange(0, TILE_OUT) < site
            at = latent * d_out + where * site + tile + tl.arange(0, TILE_OUT)
            new = _take(w_dec, m_dec, v_dec, at, inside, times * tl.load(g_dec + at, mask=inside, other=0.0), rates, True)
            squares += tl.sum(new * new)
            if LOW:
                tl.store(low_dec + at, new, mask=inside)
        total += tl.sqrt_rn(squares)
    for tile in range(0, d_in, TILE_IN):
        inside = tile + tl.arange(0, TILE_IN) < d_in
        at = latent * d_in + tile + tl.arange(0, TILE_IN)
        new = _take(w_enc, m_enc, v_enc, at, inside, times * tl.load(g_enc + at, mask=inside, other=0.0), rates, True)
        if LOW:
            tl.store(low_enc + at, new * total, mask=inside)
    new_bias = _take(b_enc, m_b, v_b, latent, latent >= 0, times * tl.load(g_b + latent), rates, True)
    tl.store(norms + latent, total)
    if LOW:
        tl.store(low_b + latent, new_bias * total)
