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

__all__ = ["wkv", "wkv_backward"]

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
            y, end = _compute(segment, *segment.tokens(), uf, state, *segment.given())
            state = end[-1]
            outputs.append(y)
            ends.append(end)
        if packing is not None:
            state = torch.cat(ends).squeeze(1).index_select(0, packing.last)
        return _in_line(outputs, T, packing).to(r.dtype), state


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
    """`torch.ops.rwkv6.wkv_backward` by chunks: the derivative of `wkv`, the last segment first.

    So the intermediate results of no more than one segment are in memory.
    """
    B, T, _, _ = _sizes(r)
    if T < SHORT:
        return reference.wkv_backward(
            grad_y, grad_final_state, r, k, v, w, u, initial_state, state_map, cu_seqlens
        )
    with _without_autocast(r):
        initial = reference.initial_states(r, initial_state, state_map, cu_seqlens)
        uf, state = u.to(initial.dtype), initial[:B]
        packing, segments = _segments(r, k, v, w, initial, cu_seqlens)
        states = [state]  # before each segment
        for segment in segments[:-1]:
            _, keys, values, log_decay = map(_by_chunk, segment.tokens())
            *_, joined = _runs(keys, log_decay, _recorded(keys, log_decay))
            state = _walk(segment, *joined, values, state, *segment.given())[1][-1]
            states.append(state)
        grads: list[tuple[Tensor, ...]] = []
        grad_u = torch.zeros_like(uf)
        carried: Any = None  # the gradient of the state at the end of the segment
        sent = _sent(grad_y, grad_final_state, initial.dtype, packing, segments)
        for segment, state, (g_y, g_end) in reversed(list(zip(segments, states, sent))):
            closed = g_end is None and (carried is None or packing is not None)
            if carried is not None:
                carried = pad(carried[None], (0,) * 8 + (segment.ends - 1, 0))
                g_end = carried if g_end is None else g_end + carried
            primals = (*segment.tokens(), uf, state, *segment.given())
            gr, gk, gv, gl, gu, carried, *given = _vjp(segment, closed, primals, (g_y, g_end))
            # log_decay is its own derivative. Were w among the primals, a NaN would become 0 where
            # w is clamped, which it is not in the recurrence.
            grads.append((gr, gk, gv, gl * primals[3], *given))
            grad_u = grad_u + gu
        whole_r, whole_k, whole_v, whole_w, *whole = zip(*reversed(grads), strict=True)
        if packing is not None:
            carried = torch.cat(whole[0]).squeeze(1).index_select(0, packing.first)
        return (
            _in_line(whole_r, T, packing).to(r.dtype),
            _in_line(whole_k, T, packing).to(k.dtype),
            _in_line(whole_v, T, packing).to(v.dtype),
            _in_line(whole_w, T, packing).to(w.dtype),
            grad_u.to(u.dtype),
            reference.grad_initial_state(carried, initial_state, state_map),
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


class _Segment(NamedTuple):
    """Chunks that are computed at a time: n of them, each of C tokens."""

    r: Tensor  # [B, n, C, H, N]
    k: Tensor  # [B, n, C, H, N]
    v: Tensor  # [B, n, C, H, N]
    w: Tensor  # [B, n, C, H, N]
    initial: Tensor  # [B or M, H, N, N]
    border: _Border | None  # of packed sequences

    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, k, v and the log decay, in the dtype that is computed in."""
        r, k, v, w = (x.to(self.initial.dtype) for x in self[:4])
        return r, k, v, reference.log_decay(w)

    def given(self) -> tuple[Tensor, ...]:
        """For packed sequences the initial state of each chunk's sequence, [n, 1, H, N, N]."""
        if self.border is None:
            return ()
        return (self.initial.index_select(0, self.border.sequence).unsqueeze(1),)

    def end(self) -> Tensor:
        """Whether a token is the last of its sequence, [n, 1, 1, C, 1]."""
        n, C = self.r.shape[1:3]
        token = torch.arange(n * C, device=self.r.device).reshape(n, C) + 1
        if self.border is None:
            end = token == n * C
        else:
            end = (token % C == 0) & self.border.last[:, None]
        return end[:, None, None, :, None]

    @property
    def ends(self) -> int:
        """The number of chunks behind which a sequence may end."""
        return 1 if self.border is None else self.r.shape[1]


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
    # a decay of 1 leaves the state as it is
    tokens = [_in_chunks(x, chunk, packing, 0.0) for x in (r, k, v)]
    tokens.append(_in_chunks(w, chunk, packing, -torch.inf))
    size = max(1, SEGMENT // max(1, B * chunk * H * N))
    borders: list[_Border | None] = [None] * -(-tokens[0].shape[1] // size)
    if packing is not None:
        edge = packing.sequence.diff() != 0
        always = edge.new_ones(1)
        whole = (packing.sequence, torch.cat((always, edge)), torch.cat((edge, always)))
        borders = [_Border(*x) for x in zip(*(x.split(size) for x in whole), strict=True)]
    parts: Any = zip(*(x.split(size, 1) for x in tokens), borders, strict=True)
    return packing, [_Segment(r, k, v, w, initial, border) for r, k, v, w, border in parts]


def _in_chunks(
    x: Tensor,  # [B, T, H, N]
    chunk: int,
    packing: _Packing | None,
    padding: float = 0.0,
) -> Tensor:  # [B, count, C, H, N]
    if packing is not None:
        x = x.index_select(1, packing.token)
        x = torch.where(packing.padding[:, None, None], padding, x)
    elif missing := -x.shape[1] % chunk:
        x = pad(x, (0, 0, 0, 0, missing, 0), value=padding)
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


def _sent(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_final_state: Tensor | None,  # [B or M, H, N, N]
    acc: torch.dtype,
    packing: _Packing | None,
    segments: Sequence[_Segment],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each segment the gradients of what `_compute` returns, as far as they are given."""
    ys: Any = [None] * len(segments)
    ends: list[Tensor | None] = [None] * len(segments)
    if grad_y is not None:
        _, size, chunk, _, _ = segments[0].r.shape
        ys = _in_chunks(grad_y.to(acc), chunk, packing).split(size, 1)
    if grad_final_state is not None:
        grad_final_state = grad_final_state.to(acc)
        ends[-1] = grad_final_state[None]
        for i, segment in enumerate(segments):
            if segment.border is not None:
                rows = grad_final_state.index_select(0, segment.border.sequence)
                rows = torch.where(segment.border.last[:, None, None, None], rows, 0.0)
                ends[i] = rows.unsqueeze(1)
    return list(zip(ys, ends, strict=True))


def _vjp(
    segment: _Segment,
    closed: bool,  # see `_compute`
    primals: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """The gradients of `_compute`, without those results that have none themselves."""
    given = tuple(g for g in grads if g is not None)
    if not given:
        return tuple(torch.zeros_like(x) for x in primals)

    def results(*primals: Tensor) -> tuple[Tensor, ...]:
        found = _compute(segment, *primals, closed=closed)
        return tuple(x for x, g in zip(found, grads, strict=True) if g is not None)

    # not autograd.grad, which cannot be called below autograd, where kernels run
    vjp: Any = torch.func.vjp(results, *primals)[1]
    found: tuple[Tensor, ...] = vjp(given)
    return found


def _compute(
    segment: _Segment,
    r: Tensor,  # [B, n, C, H, N]
    k: Tensor,  # [B, n, C, H, N]
    v: Tensor,  # [B, n, C, H, N]
    log_decay: Tensor,  # [B, n, C, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
    *given: Tensor,  # [n, 1, H, N, N] of packed sequences
    closed: bool = False,
) -> tuple[Tensor, Tensor]:  # y [B, n, C, H, N], states at ends [1 or n, B, H, N, N]
    """y, and the state after the last chunk, or after each chunk of packed sequences.

    closed: nothing depends on a state behind the last token of a sequence, which is in the last
    chunk or where packed sequences end. The token is kept out of the state then, because gradients
    of zero would spread a NaN.
    """
    r, k, v, log_decay = map(_by_chunk, (r, k, v, log_decay))  # [n, B, H, C, N]
    shape = r.shape
    y = (r * u[:, None] * k).sum(-1, keepdim=True) * v  # the token itself
    if closed:
        end = segment.end()
        k, v, log_decay = (torch.where(end, 0.0, x) for x in (k, v, log_decay))
    recorded = _recorded(r, k, v, log_decay, u, state, *given)
    r, y = (x.reshape(-1, 1, shape[-1]) for x in (r, y))
    for joined_k, joined_decay in _runs(k, log_decay, recorded):
        if joined_k.shape[1] == shape[-2]:
            break
        first_k, _ = _pairs(joined_k)
        first_v, _ = _pairs(v.reshape(joined_k.shape))
        first_decay, _ = _pairs(joined_decay)
        first_y, second_y = _pairs(y)
        seen = _pairs(r)[1] @ first_k.mT  # [pairs, length, length]
        second_y = _plus_product(second_y, seen, first_v, recorded)
        y = torch.cat((first_y, second_y), 1) if recorded else _twice_as_long(y)
        r = _decayed(r, 1, torch.exp(first_decay), recorded)
    starts, ends = _walk(segment, joined_k, joined_decay, v, state, *given)
    y = torch.baddbmm(y, r, torch.stack(starts).flatten(0, 2))
    ends = ends if given else ends[-1:]
    return y.reshape(shape).permute(1, 0, 3, 2, 4), torch.stack(ends)


def _by_chunk(x: Tensor) -> Tensor:  # [B, n, C, H, N] -> [n, B, H, C, N]
    # a copy even where a view would do: r and k are changed in place
    return x.permute(1, 0, 3, 2, 4).clone(memory_format=torch.contiguous_format)


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
) -> Tensor:  # [pairs, 2 * length, N]
    """Pairs of runs joined, the first (i = 0) or second ones decayed: in place if not recorded."""
    runs = list(_pairs(x))
    if recorded:
        runs[i] = runs[i] * decay
        return torch.cat(runs, 1)
    runs[i].mul_(decay)
    return _twice_as_long(x)


def _plus_product(
    y: Tensor,  # [pairs, length, N]
    seen: Tensor,  # [pairs, length, length]
    v: Tensor,  # [pairs, length, N]
    recorded: bool,
) -> Tensor:
    """y + seen @ v, in place if not recorded."""
    length = seen.shape[-1]
    if length > 2:
        return torch.baddbmm(y, seen, v) if recorded else y.add_(seen @ v)
    add = torch.addcmul if recorded else Tensor.addcmul_
    for i in range(length):  # too small for a matrix product
        y = add(y, seen[:, :, i, None], v[:, None, i])
    return y


def _recorded(*tensors: Tensor) -> bool:
    """Whether a derivative or a transform needs every intermediate result as it was."""
    if transforms_active() or forward_mode_active():
        return True
    return needs_grad(*tensors)


def _runs(
    k: Tensor,  # [n, B, H, C, N]
    log_decay: Tensor,  # [n, B, H, C, N]
    recorded: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of 1, 2, 4, ... C tokens.

    Of each, k [runs, length, N], decayed up to the end of its run, and the sum of the run's log
    decays [runs, 1, N]. If not recorded, the next runs are made in the memory of k.
    """
    C, N = k.shape[-2:]
    k, log_decay = (x.reshape(-1, 1, N) for x in (k, log_decay))
    yield k, log_decay
    while k.shape[1] < C:
        first, second = _pairs(log_decay)
        k = _decayed(k, 0, torch.exp(second), recorded)
        log_decay = first + second
        yield k, log_decay


def _walk(
    segment: _Segment,
    k: Tensor,  # [n * B * H, C, N], decayed up to the end of its chunk
    log_decay: Tensor,  # [n * B * H, 1, N], of the whole chunk
    v: Tensor,  # [n, B, H, C, N]
    state: Tensor,  # [B, H, N, N]
    *given: Tensor,  # [n, 1, H, N, N] of packed sequences
) -> tuple[list[Tensor], list[Tensor]]:  # n times [B, H, N, N]
    """The state before each chunk, and after each."""
    shape = v.shape[:3]
    k = k.reshape(v.shape)
    log_decay = log_decay.reshape(*shape, 1, v.shape[-1])
    decay, lost = reference.decay_and_lost(log_decay.mT)
    before, after = [], []
    firsts = () if segment.border is None else segment.border.first.unbind()
    for i, (added, d, e) in enumerate(zip((k.mT @ v).unbind(), decay.unbind(), lost.unbind())):
        if firsts:
            state = torch.where(firsts[i], given[0][i], state)
        before.append(state)
        state = torch.addcmul(torch.addcmul(added, e, state), d, state)
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
