"""A whole model over many processes: data, context and tensor parallel, in any combination."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torch_rwkv6._torch_private import flat_mesh, joined_mesh
from torch_rwkv6.checks import check_offsets
from torch_rwkv6.nn import RWKV
from torch_rwkv6.nn.multi_head import MultiHeadTimeMix
from torch_rwkv6.nn.sharded import TENSOR_PARALLEL, is_dtensor
from torch_rwkv6.parallel.ranks import Ranks
from torch_rwkv6.parallel.token_shift import token_shift_of_piece
from torch_rwkv6.parallel.wkv import wkv_of_piece

REPLICATE, SHARD, CONTEXT = "dp_replicate", "dp_shard", "cp"
DIMENSIONS = (REPLICATE, SHARD, CONTEXT, TENSOR_PARALLEL)


def parallelize(model: RWKV, mesh: DeviceMesh, **options: Any) -> RWKV:
    """Spreads a model over the processes of a mesh, in place, by the names of its dimensions.

    - ``tp``: the heads of every layer, the hidden channels of its channel mixing, the columns of
      the embedding and the rows of the head (tensor parallel). All processes of it are given the
      same tokens.
    - ``cp``: the tokens of every sequence (context parallel). Each process is given its own piece,
      the first one the first tokens; pieces may have different lengths. ``cu_seqlens`` are those
      of all pieces joined, the same on each process.
    - ``dp_shard``: the parameters, each block being a unit of ``fully_shard`` (FSDP2), and the
      sequences of a batch. Parameters are sharded over ``cp`` as well.
    - ``dp_replicate``: whole groups of the above (HSDP).

    Build the optimiser afterwards. Gradients are those of the mean of the losses of all processes
    of ``dp_replicate``, ``dp_shard`` and ``cp``: each has the mean over its own tokens as its loss,
    where all have as many.

    Args:
        model: a `torch_rwkv6.nn.RWKV6` or RWKV5; an RWKV4 over ``dp_replicate`` and ``dp_shard``
            alone. It may be on the meta device: see ``reset_parameters``.
        mesh: a ``torch.distributed.device_mesh.DeviceMesh`` with these names, as torchtitan gives
            them; those that are not needed may be absent.
        options: of ``torch.distributed.fsdp.fully_shard``, for every block and the model, such as
            ``mp_policy``.

    Returns:
        The model. Its parameters are DTensors. Its states are plain tensors: under ``tp`` with this
        process's heads; under ``cp`` those of whole sequences, the same on every process.

    Raises:
        TypeError: no RWKV, no DeviceMesh, an RWKV4 over ``tp`` or ``cp``, or, over ``tp``, a matrix
            that is no nn.Linear, such as one with a LoRA or of int8.
        ValueError: a dimension of another name; ``dp_replicate`` without ``dp_shard`` or ``cp``;
            heads or hidden channels that ``tp`` does not divide; an embedding that is the head as
            well, over ``tp``; options without any dimension that ``fully_shard`` is for; or a model
            that is sharded already.
    """
    names = _checked(model, mesh, options)
    if TENSOR_PARALLEL in names:
        from torch_rwkv6.parallel.heads import share_heads  # slow to import, as fully_shard is

        share_heads(model, mesh[TENSOR_PARALLEL])
    if CONTEXT in names:
        _cut_sequences(model, Ranks(mesh[CONTEXT].get_group()))
    data = _data_mesh(mesh, names)
    if data is not None:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=data, **options)
        fully_shard(model, mesh=data, **options)
    return model


def _checked(model: RWKV, mesh: DeviceMesh, options: dict[str, Any]) -> tuple[str, ...]:
    """The names of the mesh's dimensions."""
    if not isinstance(model, RWKV):
        raise TypeError(f"model: expected an RWKV, got {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}"
        )
    names = mesh.mesh_dim_names or ()
    known = ", ".join(DIMENSIONS)
    if not names:
        raise ValueError(
            f"mesh: expected dimensions named as some of {known} "
            f"(mesh_dim_names of init_device_mesh), got {mesh.ndim} without names"
        )
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(f"mesh: expected dimensions named as some of {known}, got {name!r}")
    if REPLICATE in names and not {SHARD, CONTEXT} & set(names):
        raise ValueError(
            f"mesh: expected {SHARD} or {CONTEXT} beside {REPLICATE}, got {', '.join(names)}; a "
            f"{SHARD} of size 1 will do"
        )
    if options and not {SHARD, CONTEXT} & set(names):
        raise ValueError(
            f"{next(iter(options))}: it is for fully_shard, which is used for {SHARD} and "
            f"{CONTEXT}, got a mesh of {', '.join(names)}"
        )
    if any(is_dtensor(p) for p in model.parameters()):
        raise ValueError("model: expected plain parameters, got DTensors: it is sharded already")
    heads = all(isinstance(block.att, MultiHeadTimeMix) for block in model.blocks)
    for name in (TENSOR_PARALLEL, CONTEXT):
        if name in names and not heads:
            raise TypeError(
                f"model: expected an RWKV6 or RWKV5 for the mesh's {name}, got an "
                f"RWKV-{model.version}, which has no heads"
            )
    return names


# ---- context parallel


def _cut_sequences(model: RWKV, ranks: Ranks) -> None:
    """Has the layers take the tokens that they are given as this process's piece."""
    shift = partial(token_shift_of_piece, ranks=ranks)
    for block in model.blocks:
        block.att.token_shift, block.ffn.token_shift = shift, shift
        block.att.wkv = partial(wkv_of_piece, ranks=ranks)
    model.register_forward_pre_hook(partial(_own_piece, ranks=ranks), with_kwargs=True)


def _own_piece(
    model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], *, ranks: Ranks
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with cu_seqlens of this process's tokens in place of those of all.

    Raises RuntimeError for a call that is not made for pieces.
    """
    if options.get("update"):
        raise RuntimeError(
            f"forward_ and generate continue a sequence on one process, got a model whose "
            f"sequences are cut over the mesh's {CONTEXT}: call it as model(tokens, state), and "
            "let a model that is not cut go on from the state that it returns"
        )
    cu_seqlens = options.get("cu_seqlens")
    tokens = args[0] if args else options.get("tokens")
    if cu_seqlens is None or not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return args, options  # what is wrong with tokens, the model says
    check_offsets(cu_seqlens, "tokens", tokens)
    return args, options | {"cu_seqlens": ranks.own_offsets(cu_seqlens, tokens.shape[1])}


# ---- data parallel


def _data_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh | None:
    """What fully_shard is given: [shards], or [replicas, shards]; None where nothing is sharded."""
    sharding = tuple(name for name in (SHARD, CONTEXT) if name in names)
    if not sharding:
        return None
    shards = mesh[sharding]
    if len(sharding) > 1:
        shards = flat_mesh(shards, "_".join(sharding))
    return joined_mesh([mesh[REPLICATE], shards]) if REPLICATE in names else shards
