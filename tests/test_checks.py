"""What is refused does not depend on who computes: the kernel library checks its arguments in C++,
the pure PyTorch fallback in Python (torch_rwkv6/checks.py), and both refuse the same calls by the
same argument's name."""

import pytest
import torch
from samples import random_call

import torch_rwkv6
from torch_rwkv6.registration import fallback

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not torch_rwkv6.has_kernels, reason="there is only one implementation"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)


def wkv_arguments(**options):
    call = random_call(**({"B": 3, "T": 4, "H": 2, "N": 3, "states": 3} | options))
    names = ("r", "k", "v", "w", "u", "initial_state", "state_map", "cu_seqlens")
    return call, dict(zip(names, call.args(), strict=True))


def wkv(**options):
    return wkv_arguments(**options)[1]


def wkv_in_place(**options):
    arguments = wkv(**options)
    arguments["state"] = arguments.pop("initial_state")
    order = ("r", "k", "v", "w", "u", "state", "state_map", "cu_seqlens")
    return {name: arguments[name] for name in order}


def wkv_backward(**options):
    call, arguments = wkv_arguments(**options)
    grad_y, grad_state = call.grad_outputs()
    return {"grad_y": grad_y, "grad_final_state": grad_state} | arguments


def wkv4():
    k, v, w, u = (torch.randn(shape) for shape in ((2, 4, 5), (2, 4, 5), (5,), (5,)))
    state = torch.rand(2, 3, 5)
    return {"k": k, "v": v, "w": w, "u": u, "initial_state": state}


def wkv4_in_place():
    arguments = wkv4()
    return arguments | {"state": arguments.pop("initial_state")}


def wkv4_backward():
    arguments = wkv4()
    return {
        "grad_y": torch.randn_like(arguments["k"]),
        "grad_final_state": torch.randn(2, 3, 5),
    } | arguments


def matvec():
    return {"x": torch.randn(2, 5), "weight": torch.randn(4, 5)}


def matvec_int8():
    numbers = torch.randint(-128, 128, (4, 5), dtype=torch.int8)
    return {"x": torch.randn(2, 5), "weight": numbers, "scale": torch.rand(4)}


MAPPED = {"state_map": torch.tensor([1, 0, 2])}
PACKED = {"B": 1, "cu_seqlens": [0, 1, 1, 4]}

# operator, its arguments
CALLS = {
    "wkv": ("wkv", wkv),
    "wkv mapped": ("wkv", lambda: wkv() | MAPPED),
    "wkv packed": ("wkv", lambda: wkv(**PACKED)),
    "wkv without state": ("wkv", lambda: wkv(states=None)),
    "wkv_backward": ("wkv_backward", wkv_backward),
    "wkv_backward mapped": ("wkv_backward", lambda: wkv_backward() | MAPPED),
    "wkv_backward packed": ("wkv_backward", lambda: wkv_backward(**PACKED)),
    "wkv_update": ("wkv_update", wkv_in_place),
    "wkv_update mapped": ("wkv_update", lambda: wkv_in_place() | MAPPED),
    "wkv_update packed": ("wkv_update", lambda: wkv_in_place(**PACKED)),
    "wkv4": ("wkv4", wkv4),
    "wkv4_backward": ("wkv4_backward", wkv4_backward),
    "wkv4_update": ("wkv4_update", wkv4_in_place),
    "matvec": ("matvec", matvec),
    "matvec_int8": ("matvec_int8", matvec_int8),
}


def variants(x):
    """(what, x changed) for every change worth telling apart."""
    holds_values = x.dtype not in (torch.int32, torch.int64)  # and no indices
    for dtype in DTYPES:
        yield f"as {dtype}", x.to(dtype)
    for d in range(x.dim()):
        yield f"without dimension {d}", x.select(d, 0) if x.shape[d] else x.sum(d)
        yield f"dimension {d} longer", torch.cat((x, x.narrow(d, 0, min(1, x.shape[d]))), d)
        yield f"dimension {d} of 0", x.narrow(d, 0, 0)
        yield f"dimension {d} of 1", x.narrow(d, 0, min(1, x.shape[d]))
        if holds_values:
            once = x.narrow(d, 0, min(1, x.shape[d]))
            yield f"dimension {d} expanded", once.expand(x.shape)
            room = torch.stack((x, x), d + 1).flatten(d, d + 1)  # twice as long
            yield f"dimension {d} with gaps", room[(slice(None),) * d + (slice(None, None, 2),)]
    yield "one more dimension", x.unsqueeze(0)
    yield "empty", x.new_empty(0)
    if holds_values:
        yield "transposed", x.mT.contiguous().mT if x.dim() > 1 else x
        strides = [1] * x.dim()  # rows that overlap
        yield "overlapping", torch.cat([x.flatten()] * 2).as_strided(x.shape, strides)
    else:
        for value in (-1, 1, 2, 3, 4, 5, 2**31 - 1):
            for at in range(x.numel()):
                changed = x.clone()
                changed[at] = value
                yield f"entry {at} = {value}", changed


def outcome(function, arguments):
    """The results, and the name of the argument that was refused; one of them is None."""
    arguments = {n: x.clone() if n == "state" and not odd(x) else x for n, x in arguments.items()}
    try:
        result = function(*arguments.values())
    except (RuntimeError, TypeError, ValueError) as error:
        return None, str(error).split(":")[0], str(error)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    return [*results, arguments["state"]] if "state" in arguments else results, None, ""


def odd(x):
    """Whether a copy of x would lie differently in memory."""
    return not x.is_contiguous()


@pytest.mark.parametrize("case", CALLS)
def test_both_refuse_the_same_calls(case):
    name, make = CALLS[case]
    native = getattr(torch.ops.rwkv6, name).default
    in_python = fallback.KERNELS[name]
    refused = accepted = 0
    for argument in make():
        value = make()[argument]
        changes = [("None", None)] if "initial" in argument or "grad" in argument else []
        changes += [] if value is None else list(variants(value))
        for what, _ in changes:
            # anew for each of the two, which may write into it
            def arguments(argument=argument, what=what):
                torch.manual_seed(0)
                call = make()
                torch.manual_seed(0)
                changed = dict(variants(call[argument])) if what != "None" else {"None": None}
                return call | {argument: changed[what]}

            where = f"{case}, {argument} {what}"
            found, named, text = outcome(native, arguments())
            expected, named_in_python, text_in_python = outcome(in_python, arguments())
            assert named == named_in_python, f"{where}: {text!r} and {text_in_python!r}"
            if named is not None:
                assert named in arguments(), f"{where}: {text}"
                refused += 1
                continue
            accepted += 1
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype, where
                tolerance = {"rtol": 3e-2, "atol": 3e-2} if a.element_size() == 2 else {}
                torch.testing.assert_close(a, b, equal_nan=True, msg=where, **tolerance)
    assert refused > 10
    assert accepted > 5


@pytest.mark.parametrize("function", ["wkv", "wkv_backward", "wkv_update"])
def test_messages_of_long_lists_are_short(function):
    """A wrong entry among 100,000 is named, the others are not listed."""
    M = 100_000
    call = random_call(B=M, T=1, H=1, N=1, states=2)
    state_map = torch.arange(M) % 2 if function != "wkv_update" else torch.arange(M)
    state_map[7] = -5 if function != "wkv_update" else 2
    gradients = call.grad_outputs() if function == "wkv_backward" else ()
    arguments = (*gradients, *call.floats(), state_map, None)
    for implementation in (getattr(torch.ops.rwkv6, function), fallback.KERNELS[function]):
        with pytest.raises(RuntimeError, match="state_map: ") as raised:
            implementation(*arguments)
        assert len(str(raised.value)) < 200
