"""WKV6 as a few large matrix products over chunks of tokens, in plain PyTorch.

It computes what `torch_rwkv6.reference` does, on every device and in every dtype, can be
differentiated any number of times and is understood by every `torch.func` transform. It serves
whatever has no kernel; the recurrence serves where tokens are too few for it to pay.

With l_t = -exp(w_t), the log of the decay, token t sees token s < t through

    sum_i r_t[i] k_s[i] exp(l_{s+1}[i] + ... + l_{t-1}[i])

Runs of 1, 2, 4, ... tokens are joined in pairs until one run is the chunk. Each token of a pair's
second run sees each of its first, by a product of r, decayed from the border between them, and k,
decayed up to it. In the end r is decayed from the start of the chunk, where it meets the state, and
k up to its end, where it is added to the state.

The gradients are products of the same kind: that of the state is carried backward over the chunks,
then each run of tokens is parted into the two that it was joined from, the longest runs first.

Every exponent is a sum of log decays and never a difference of running sums, so none is positive
and none cancels: nothing overflows, whatever w is. Nothing is masked by a product with zero, so a
NaN or an infinity reaches what it reaches in the recurrence. Padding lies before the tokens of a
sequence, which see nothing in it; behind them it would see theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_rwkv6 import reference
from torch_rwkv6._torch_private import forward_mode_active, transforms_active
from torch_rwkv6.arguments import needs_grad

__all__ = ["wkv", "wkv_backward", "wkv_final_state"]

SHORT = 16  # fewer tokens go by the recurrence: docs/operator.md has the measurement
CHUNK = 64  # tokens, a power of two
SEGMENT = 1 << 17  # elements of r computed at a time, so that what is made of them stays in cache


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B or M, H, N, N]
    """`torch.ops.rwkv6.wkv` by chunks. A state_map entry out of range gives NaN."""
    B, T, _, _ = _sizes(r)
    if T < SHORT:
        return reference.wkv(r, k, v, w, u, initial_state, state_map, cu_seqlens)
    with _without_autocast(r):
        initial = reference.initial_states(r, initial_state, state_map, cu_seqlens)
        uf, state = u.to(initial.dtype), initial[:B]
        packing, segments = _segments(r, k, v, w, initial, cu_seqlens)
        outputs, ends = [], []
        for segment in segments:
            y, after = _forward(segment, uf, state)
            state = after[-1]
            outputs.append(y)
            if packing is not None:
                ends += after
        if packing is not None:
            state = torch.cat(ends).index_select(0, packing.last)
        return _in_line(outputs, T, packing).to(r.dtype), state


def wkv_final_state(
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> Tensor:  # [B or M, H, N, N]
    """`torch.ops.rwkv6.wkv_final_state` by chunks: the final state of `wkv` without its y."""
    B, T, H, N = _sizes(k)
    if T < SHORT:
        u = k.new_zeros(H, N)
        return reference.wkv(k, k, v, w, u, initial_state, state_map, cu_seqlens)[1]
    with _without_autocast(k):
        initial = reference.initial_states(k, initial_state, state_map, cu_seqlens)
        packing, segments = _segments(k, k, v, w, initial, cu_seqlens)
        state, ends = initial[:B], []
        for segment in segments:
            after = _after(segment, state)
            state = after[-1]
            if packing is not None:
                ends += after
        return state if packing is None else torch.cat(ends).index_select(0, packing.last)


def wkv_backward(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_final_state: Tensor | None,  # [B or M, H, N, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.rwkv6.wkv_backward` by chunks: the gradients of `wkv`, the last segment first.

    So the intermediate results of no more than one segment are in memory.
    """
    B, T, _, _ = _sizes(r)
    if T < SHORT or (grad_y is None and grad_final_state is None):
        return reference.wkv_backward(
            grad_y, grad_final_state, r, k, v, w, u, initial_state, state_map, cu_seqlens
        )
    with _without_autocast(r):
        initial = reference.initial_states(r, initial_state, state_map, cu_seqlens)
        uf, state = u.to(initial.dtype), initial[:B]
        packing, segments = _segments(r, k, v, w, initial, cu_seqlens)
        states = [state]  # before each segment
        for segment in segments[:-1]:
            states.append(_after(segment, states[-1])[-1])
        sent: Any = [None] * len(segments)
        if grad_y is not None:
            _, size, chunk, _, _ = segments[0].r.shape
            sent = _in_chunks(grad_y.to(initial.dtype), chunk, packing).split(size, 1)
        if grad_final_state is None:
            final = torch.zeros_like(initial)
        else:
            final = grad_final_state.to(initial.dtype)
        grad_state, begins = final[:B], []
        grads, grad_u = [], torch.zeros_like(uf)
        for segment, state, grad in reversed(list(zip(segments, states, sent, strict=True))):
            closed = None
            if grad_final_state is None and (packing or segment is segments[-1]):
                closed = segment.end()
            found, gu, before = _backward(segment, uf, state, grad, grad_state, final, closed)
            grad_state = before[-1]
            grads.append(found)
            grad_u = grad_u + gu
            if packing is not None:
                begins += before
        if packing is not None:
            grad_state = torch.cat(begins[::-1]).index_select(0, packing.first)
        gr, gk, gv, gw = (_in_line(x, T, packing) for x in zip(*reversed(grads), strict=True))
        return (
            gr.to(r.dtype),
            gk.to(k.dtype),
            gv.to(v.dtype),
            gw.to(w.dtype),
            grad_u.to(u.dtype),
            reference.grad_initial_state(grad_state, initial_state, state_map),
        )


class _Packing(NamedTuple):
    """Where packed sequences of T tokens lie in chunks of C.

    Each ends with a chunk and begins, behind padding, in a chunk of its own. There are as many
    chunks as the numbers of tokens and sequences can make necessary: no value is read on the host.
    """

    token: Tensor  # [count * C], the token at each place
    padding: Tensor  # [count * C], whether there is none
    place: Tensor  # [T], where each token is
    sequence: Tensor  # [count], whose chunk it is
    first: Tensor  # [M], each sequence's first chunk
    last: Tensor  # [M], its last one


def _pack(T: int, chunk: int, cu_seqlens: Tensor) -> _Packing:
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    M, device = starts.shape[0], starts.device
    chunks = (stops - starts) // chunk + 1  # of each sequence
    count = T // chunk + M  # the first sequence begins with those that are too many
    last = (chunks.cumsum(0) + (count - 1 - chunks.sum())).clamp(0, count - 1)
    first = torch.cat((last.new_zeros(1), last[:-1] + 1)).clamp(max=count - 1)
    sequence = torch.searchsorted(last, torch.arange(count, device=device)).clamp(max=M - 1)
    shift = (last + 1) * chunk - stops  # from a token's number to its place
    whose = sequence.repeat_interleave(chunk)
    token = torch.arange(count * chunk, device=device) - shift.index_select(0, whose)
    padding = token < starts.index_select(0, whose)
    tokens = torch.arange(T, device=device)
    owner = (torch.searchsorted(stops, tokens, right=True)).clamp(max=M - 1)
    place = (tokens + shift.index_select(0, owner)).clamp(0, count * chunk - 1)
    return _Packing(token.clamp(0, T - 1), padding, place, sequence, first, last)


class _Border(NamedTuple):
    """Where packed sequences begin and end among the n chunks of a segment."""

    sequence: Tensor  # [n], whose chunk it is
    first: Tensor  # [n], whether it is the first of its sequence
    last: Tensor  # [n]


# k, log decay and decay of runs, as `_runs` makes them
_Runs = tuple[Tensor, Tensor, Tensor]
_Step = tuple[Tensor, Tensor, Tensor]  # added [B, H, N, N]; decay and what it lost [B, H, N, 1]
_Rows = tuple[tuple[Tensor, Tensor], ...]  # of each chunk a condition and [1, H, N, N]


class _Segment(NamedTuple):
    """Chunks that are computed at a time: n of them, each of C tokens."""

    r: Tensor  # [B, n, C, H, N]
    k: Tensor  # [B, n, C, H, N]
    v: Tensor  # [B, n, C, H, N]
    log_decay: Tensor  # [B, n, C, H, N]
    initial: Tensor  # [B or M, H, N, N]
    border: _Border | None  # of packed sequences

    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, k, v and the log decay, in the dtype that is computed in."""
        r, k, v, log_decay = (x.to(self.initial.dtype) for x in self[:4])
        return r, k, v, log_decay

    def begins(self) -> _Rows:
        """For packed sequences whether each chunk is the first of one, and its initial state."""
        return self._rows(self.border.first, self.initial) if self.border else ()

    def ends(self, final: Tensor) -> _Rows:
        """Whether each is the last of one, and the row of `final`, [M, H, N, N], the last first."""
        return self._rows(self.border.last, final)[::-1] if self.border else ()

    def _rows(self, where: Tensor, rows: Tensor) -> _Rows:
        assert self.border is not None
        rows = rows.index_select(0, self.border.sequence).unsqueeze(1)
        return tuple(zip(where.unbind(), rows.unbind(), strict=True))

    def end(self) -> Tensor:
        """Whether a token is the last of its sequence, [n, 1, 1, C, 1]."""
        n, C = self.r.shape[1:3]
        token = torch.arange(n * C, device=self.r.device).reshape(n, C) + 1
        if self.border is None:
            end = token == n * C
        else:
            end = (token % C == 0) & self.border.last[:, None]
        return end[:, None, None, :, None]


def _segments(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    initial: Tensor,  # [B or M, H, N, N]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> tuple[_Packing | None, list[_Segment]]:
    B, T, H, N = _sizes(r)
    sequences = 1 if cu_seqlens is None else max(1, cu_seqlens.shape[0] - 1)
    chunk = CHUNK
    while chunk >= 2 * max(1, T // sequences):
        chunk //= 2
    packing = None if cu_seqlens is None else _pack(T, chunk, cu_seqlens)
    log_decay = reference.log_decay(w.to(initial.dtype))
    # Padding is zeros: log decays of 0 leave the state as it is.
    tokens = [_in_chunks(x, chunk, packing) for x in (r, k, v, log_decay)]
    size = max(1, SEGMENT // max(1, B * chunk * H * N))
    borders: list[_Border | None] = [None] * -(-tokens[0].shape[1] // size)
    if packing is not None:
        edge = packing.sequence.diff() != 0
        always = edge.new_ones(1)
        whole = (packing.sequence, torch.cat((always, edge)), torch.cat((edge, always)))
        borders = [_Border(*x) for x in zip(*(x.split(size) for x in whole), strict=True)]
    parts: Any = zip(*(x.split(size, 1) for x in tokens), borders, strict=True)
    return packing, [_Segment(r, k, v, d, initial, border) for r, k, v, d, border in parts]


def _in_chunks(
    x: Tensor,  # [B, T, H, N]
    chunk: int,
    packing: _Packing | None,
) -> Tensor:  # [B, count, C, H, N]
    if packing is not None:
        x = x.index_select(1, packing.token)
        x = torch.where(packing.padding[:, None, None], 0.0, x)
    elif missing := -x.shape[1] % chunk:
        x = pad(x, (0, 0, 0, 0, missing, 0))
    return x.unflatten(1, (-1, chunk))


def _in_line(
    parts: Sequence[Tensor],  # each [B, n, C, H, N]
    T: int,
    packing: _Packing | None,
) -> Tensor:  # [B, T, H, N]
    x = torch.cat(tuple(parts), 1).flatten(1, 2)
    if packing is not None:
        return x.index_select(1, packing.place)
    return x[:, x.shape[1] - T :].contiguous()


def _forward(
    segment: _Segment,
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, list[Tensor]]:  # y [B, n, C, H, N], the state after each chunk [B, H, N, N]
    recorded = _recorded(*segment[:5], u, state)
    r, k, v, log_decay = map(_by_chunk, segment.tokens())
    shape = r.shape
    y = (r * u[:, None] * k).sum(-1, keepdim=True) * v  # the token itself
    r, y = (x.reshape(-1, 1, shape[-1]) for x in (r, y))
    for whole in _runs(k, log_decay, recorded):
        run_k, _, decay = whole
        if run_k.shape[1] == shape[-2]:
            break
        seen = _pairs(r)[1] @ _pairs(run_k)[0].mT  # [pairs, length, length]
        y = _plus_product(y, 1, seen, _pairs(v.reshape(run_k.shape))[0], recorded)
        r = _decayed(r, 1, _pairs(decay)[0], recorded)
        y, r = _twice_as_long(y), _twice_as_long(r)
    starts, ends = _walk(_steps(whole, v), state, segment.begins())
    y = torch.baddbmm(y, r, torch.stack(starts).flatten(0, 2))
    return _in_order(y.reshape(shape)), ends


def _after(
    segment: _Segment,
    state: Tensor,  # [B, H, N, N]
) -> list[Tensor]:
    """The state after each chunk, [B, H, N, N]."""
    k, v, log_decay = map(_by_chunk, segment.tokens()[1:])
    *_, whole = _runs(k, log_decay, _recorded(k, log_decay))
    return _walk(_steps(whole, v), state, segment.begins())[1]


def _backward(
    segment: _Segment,
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
    grad_y: Tensor | None,  # [B, n, C, H, N]
    grad_state: Tensor,  # [B, H, N, N], of the state after it
    final: Tensor,  # [M, H, N, N], of the states after packed sequences
    closed: Tensor | None,  # [n, 1, 1, C, 1], tokens after which nothing depends on the state
) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """The gradients of r, k, v, w [B, n, C, H, N] and u, and those of the state [B, H, N, N].

    The latter is carried backward from chunk to chunk as the state is forward: before each of them,
    the last one first. Then the runs are parted again that `_forward` has joined. It is written
    out because autograd, which may record it, takes twice as long.
    """
    recorded = _recorded(*segment[:5], u, state, grad_y, grad_state, final)
    r, k, v, log_decay = map(_by_chunk, segment.tokens())
    g = None if grad_y is None else _by_chunk(grad_y)
    shape = r.shape
    kept = log_decay  # or a decay of 1, as a gradient of zero would spread a NaN
    if closed is not None:
        kept = torch.where(closed, 0.0, log_decay)
    pairs = []  # of the runs of each length: r of the second, k of the first, and their decays
    run_r = r.clone().reshape(-1, 1, shape[-1])
    for whole in _runs(k.clone(), kept, recorded):
        run_k, _, decay = whole
        if run_k.shape[1] == shape[-2]:
            break
        r2, k1 = _pairs(run_r)[1], _pairs(run_k)[0]
        if not recorded:  # they will change
            r2, k1 = r2.clone(), k1.clone()
        pairs.append((r2, k1, *_pairs(decay)))
        run_r = _twice_as_long(_decayed(run_r, 1, _pairs(decay)[0], recorded))
    run_r, run_k = run_r.reshape(shape), run_k.reshape(shape)
    steps = _steps(whole, v)
    starts = torch.stack(_walk(steps, state, segment.begins())[0])
    added = [state.new_zeros(())] * len(steps) if g is None else list((run_r.mT @ g).unbind())
    steps = [(x, d, lost) for x, (_, d, lost) in zip(added, steps, strict=True)]
    after, before = _walk(steps[::-1], grad_state, segment.ends(final))
    grad_ends = torch.stack(after[::-1])

    gr = torch.zeros_like(r) if g is None else g @ starts.mT
    gk = v @ grad_ends.mT
    gv = run_k @ grad_ends
    gl = decay * (starts * grad_ends).sum(-1).reshape(decay.shape)
    for r2, k1, first_decay, second_decay in reversed(pairs):
        gr, gk, gv = (x.reshape(-1, *r2.shape[1:]) for x in (gr, gk, gv))
        gk = _decayed(gk, 0, second_decay, recorded)
        gl1, gl2 = gl, gl + (_pairs(gk)[0] * k1).sum(1, keepdim=True)
        if g is not None:
            gr = _decayed(gr, 1, first_decay, recorded)
            gl1 = gl + (_pairs(gr)[1] * r2).sum(1, keepdim=True)
            v1, g2 = _pairs(v.reshape(gv.shape))[0], _pairs(g.reshape(gv.shape))[1]
            seen, sent = r2 @ k1.mT, g2 @ v1.mT  # [pairs, length, length]
            gr = _plus_product(gr, 1, sent, k1, recorded)
            gk = _plus_product(gk, 0, sent.mT, r2, recorded)
            gv = _plus_product(gv, 0, seen.mT, g2, recorded)
        gl = torch.stack((gl1, gl2), 1).reshape(-1, 1, shape[-1])
    gr, gk, gv, gl = (x.reshape(shape) for x in (gr, gk, gv, gl))
    if closed is not None:
        gk, gv, gl = (torch.where(closed, 0.0, x) for x in (gk, gv, gl))
    gu = torch.zeros_like(u)
    if g is not None:  # the token itself
        ru, vg = r * u[:, None], (v * g).sum(-1, keepdim=True)
        gr = torch.addcmul(gr, k * u[:, None], vg)
        gk = torch.addcmul(gk, ru, vg)
        gv = torch.addcmul(gv, (ru * k).sum(-1, keepdim=True), g)
        gu = (r * k * vg).sum(3).sum((0, 1))
    # log_decay is its own derivative
    return tuple(map(_in_order, (gr, gk, gv, gl * log_decay))), gu, before


def _by_chunk(x: Tensor) -> Tensor:  # [B, n, C, H, N] -> [n, B, H, C, N]
    # a copy even where a view would do: r and k are changed in place
    return x.permute(1, 0, 3, 2, 4).clone(memory_format=torch.contiguous_format)


def _in_order(x: Tensor) -> Tensor:  # [n, B, H, C, N] -> [B, n, C, H, N]
    return x.permute(1, 0, 3, 2, 4)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:  # [2 * pairs, ...] -> two [pairs, ...]
    first, second = x.reshape(-1, 2, *x.shape[1:]).unbind(1)
    return first, second


def _twice_as_long(x: Tensor) -> Tensor:  # [2 * pairs, length, N] -> [pairs, 2 * length, N]
    return x.reshape(-1, 2 * x.shape[1], x.shape[2])


def _decayed(
    x: Tensor,  # [2 * pairs, length, N]
    i: int,
    decay: Tensor,  # [pairs, 1, N]
    recorded: bool,
) -> Tensor:
    """x, the first (i = 0) or second (i = 1) runs of pairs decayed: in place if not recorded."""
    runs = _pairs(x)
    if recorded:
        return _replaced(runs, i, runs[i] * decay)
    runs[i].mul_(decay)
    return x


def _plus_product(
    y: Tensor,  # [2 * pairs, length, N]
    i: int,
    seen: Tensor,  # [pairs, length, length]
    v: Tensor,  # [pairs, length, N]
    recorded: bool,
) -> Tensor:
    """y, plus seen @ v in the runs i of pairs: in place if not recorded."""
    runs = _pairs(y)
    run, length = runs[i], seen.shape[-1]
    if length > 2:
        run = torch.baddbmm(run, seen, v) if recorded else run.add_(seen @ v)
    else:  # too small for a matrix product
        add = torch.addcmul if recorded else Tensor.addcmul_
        for j in range(length):
            run = add(run, seen[:, :, j, None], v[:, None, j])
    return _replaced(runs, i, run) if recorded else y


def _replaced(runs: tuple[Tensor, Tensor], i: int, run: Tensor) -> Tensor:
    pair = (run, runs[1]) if i == 0 else (runs[0], run)
    return torch.stack(pair, 1).flatten(0, 1)


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether a derivative or a transform needs every intermediate result as it was."""
    if transforms_active() or forward_mode_active():
        return True
    return needs_grad(*tensors)


def _runs(
    k: Tensor,  # [n, B, H, C, N]
    log_decay: Tensor,  # [n, B, H, C, N]
    recorded: bool,
) -> Iterator[_Runs]:
    """Runs of 1, 2, 4, ... C tokens.

    Of each, k [runs, length, N], decayed up to the end of its run, the sum of the run's log decays
    [runs, 1, N] and its exponential. If not recorded, the next runs are made in the memory of k.
    """
    C, N = k.shape[-2:]
    k, log_decay = (x.reshape(-1, 1, N) for x in (k, log_decay))
    while True:
        decay = torch.exp(log_decay)
        yield k, log_decay, decay
        if k.shape[1] == C:
            return
        k = _twice_as_long(_decayed(k, 0, _pairs(decay)[1], recorded))
        log_decay = torch.add(*_pairs(log_decay))


def _steps(
    whole: _Runs,  # the chunks
    v: Tensor,  # [n, B, H, C, N]
) -> list[_Step]:
    """What each chunk makes of the state."""
    k, log_decay, _ = whole
    added = k.reshape(v.shape).mT @ v
    log_decay = log_decay.reshape(*v.shape[:3], v.shape[-1], 1)
    decay, lost = reference.decay_and_lost(log_decay)
    return list(zip(added.unbind(), decay.unbind(), lost.unbind(), strict=True))


def _walk(
    steps: Sequence[_Step],  # n
    state: Tensor,  # [B, H, N, N]
    borders: _Rows,  # of packed sequences: where another state takes the place of this one
) -> tuple[list[Tensor], list[Tensor]]:  # n times [B, H, N, N]
    """The state before each step, and after each."""
    before, after = [], []
    for i, (added, decay, lost) in enumerate(steps):
        if borders:
            state = torch.where(borders[i][0], borders[i][1], state)
        before.append(state)
        state = torch.addcmul(torch.addcmul(added, lost, state), decay, state)
        after.append(state)
    return before, after


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The shape as numbers, also where it is traced: a graph is for one shape.

    The loops over segments, chunks and runs depend on it anyway, and symbols take minutes.
    """
    return tuple(int(size) for size in x.shape)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the operands of products, where a call or a backward pass lies in it."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
