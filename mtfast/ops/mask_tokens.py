"""mask_tokens: BERT's masking of a batch in one pass, reproducible token by token."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mtfast.ops import _arguments, _library, _philox

STRATEGIES = ("exact", "bernoulli")
IGNORED = -100
_DTYPES = {"positions": "torch.int64", "cu_seqlens": "torch.int32", "subword": "torch.bool"}
_CHOOSE, _REPLACE = 1, 2  # Purpose in csrc/device/philox.cuh

_library.load()


class MaskedTokens(NamedTuple):
    """What `mask_tokens` returns: both with the shape and the dtype of its input_ids."""

    input_ids: Tensor
    labels: Tensor


def mask_tokens(
    input_ids: Tensor,
    *,
    special_ids: Iterable[int] | Tensor,
    mask_token_id: int,
    vocab_size: int,
    seed: int | Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mlm_probability: float = 0.15,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
    strategy: str = "exact",
    subword: Tensor | None = None,
) -> MaskedTokens:
    """Chooses tokens to predict and hides them: BERT's masking (Devlin et al., 2019, appendix A.1).

    A token's draws depend on (seed, position) alone: not on batch layout, order, rank, threads or device.
    One seed for all epochs gives static masking, a seed for each epoch dynamic masking.

    Args:
        input_ids: int32 or int64, [total] (packed) or [batch, length] (padded), contiguous.
        special_ids: ids never chosen and never put in as a random replacement, [PAD] among them; at most 64
            runs of consecutive ids. A tensor of them had better be on the CPU: a GPU is waited for.
        mask_token_id: the id of [MASK].
        vocab_size: ids are in [0, vocab_size).
        seed: any 64-bit int, or an int64 tensor of one element on input_ids' device, which is read there: a
            captured CUDA graph follows the tensor, while all its replays have the same int.
        positions: int64, the shape of input_ids: the stable identity of each token in the corpus. Default:
            its flat index in the batch.
        cu_seqlens: int32 or int64 [sequences + 1], for packed input: where each sequence begins and, last,
            the total. Without it packed input is one sequence; each row of padded input is one.
        mlm_probability: the share of candidates to choose. A candidate is a token that is not special or,
            with `subword`, a word of such tokens.
        mask_fraction, random_fraction: the shares of the chosen that become [MASK] and a random token.
            Random tokens are uniform over the ids that are not special, to within
            one part in random_fraction * 2**32 / vocab_size.
        strategy: "bernoulli" chooses each candidate with the probability. "exact" chooses
            max(1, floor(mlm_probability * candidates + 1/2)) in each sequence that has a candidate, those
            with the smallest draws; `exact_count` computes that number on the host.
        subword: bool [vocab_size], True for pieces that continue a word. Given, whole words are chosen; each
            of their pieces is replaced by its own draw.

    Returns:
        MaskedTokens(input_ids, labels): labels hold the original id where chosen, -100 elsewhere.

    Raises:
        TypeError: an argument is of a wrong kind: no tensor, no int, no list of ints.
        ValueError: strategy is unknown; an int has more than 64 bits; the seed is on another device.
        RuntimeError: an argument has a wrong device, dtype, shape or value. On a GPU the values of
            input_ids and cu_seqlens are looked at only under MTFAST_CHECK_VALUES=1, since that waits for the
            GPU, and not while a CUDA graph is captured, which cannot. Else ids outside the vocabulary are
            left as they are, and wrong offsets give wrong choices, never an access out of bounds.
    """
    _arguments.check_choice("strategy", strategy, STRATEGIES)
    _arguments.check_tensor("input_ids", input_ids, "torch.int64")
    # Here, since torch chooses the implementation by all arguments' devices.
    for name, x in (("positions", positions), ("cu_seqlens", cu_seqlens), ("subword", subword)):
        if x is None:
            continue
        _arguments.check_tensor(name, x, _DTYPES[name])
        if x.device != input_ids.device:
            raise RuntimeError(
                f"mask_tokens: {name} must be on the device of input_ids, {input_ids.device}, "
                f"found {x.device}"
            )
    if _library.CHECK_VALUES and input_ids.is_cuda and not _library.captured(input_ids.device):
        _library.check_range("mask_tokens", "input_ids", input_ids, vocab_size)
        if cu_seqlens is not None:
            _library.check_cu_seqlens("mask_tokens", cu_seqlens, input_ids.numel())
    if cu_seqlens is not None:
        cu_seqlens = _arguments.int32_offsets(cu_seqlens)
    seed = _library.checked_seed(seed, "input_ids", input_ids)
    on_host = not isinstance(seed, Tensor)
    output, labels = torch.ops.mtfast.mask_tokens(
        input_ids,
        positions,
        cu_seqlens,
        subword,
        _arguments.integers("special_ids", special_ids),
        _arguments.int64("mask_token_id", mask_token_id),
        _arguments.int64("vocab_size", vocab_size),
        seed if on_host else 0,
        None if on_host else seed,
        _arguments.real("mlm_probability", mlm_probability),
        _arguments.real("mask_fraction", mask_fraction),
        _arguments.real("random_fraction", random_fraction),
        strategy == "exact",
    )
    return MaskedTokens(output, labels)


def mask_tokens_ref(
    input_ids: Tensor,
    *,
    special_ids: Iterable[int] | Tensor,
    mask_token_id: int,
    vocab_size: int,
    seed: int | Tensor,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mlm_probability: float = 0.15,
    mask_fraction: float = 0.8,
    random_fraction: float = 0.1,
    strategy: str = "exact",
    subword: Tensor | None = None,
) -> MaskedTokens:
    """`mask_tokens` in eager PyTorch, bit for bit, without its argument checks."""
    device = input_ids.device
    ids = input_ids.reshape(-1).long()
    index = torch.arange(ids.numel(), device=device)
    position = index if positions is None else positions.reshape(-1)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    else:
        sequence = index // max(1, input_ids.size(-1))

    ordinary_ids = torch.ones(vocab_size, dtype=torch.bool, device=device)
    ordinary_ids[torch.tensor(list(special_ids), dtype=torch.long, device=device)] = False
    ordinary = ordinary_ids[ids]
    starts = ordinary.clone()
    if subword is not None:
        goes_on = subword[ids[1:]] & ordinary[:-1] & (sequence[1:] == sequence[:-1])
        starts[1:] &= ~goes_on

    seed = int(seed)
    draw = _philox.draw(seed, _CHOOSE, position)
    if strategy == "bernoulli":
        chosen = starts & (draw < _philox.threshold(mlm_probability))
    else:
        order = (draw + (~starts).long() * 2**32).argsort(stable=True)
        order = order[sequence[order].argsort(stable=True)]
        first = torch.searchsorted(sequence, sequence)  # of each token's sequence
        rank = torch.empty_like(index)
        rank[order] = index - first
        counts = exact_count(torch.bincount(sequence[starts], minlength=1), mlm_probability)
        chosen = starts & (rank < counts[sequence.clamp(max=len(counts) - 1)])
    if subword is not None:
        start = torch.where(starts, index, -1).cummax(0).values
        chosen = ordinary & chosen[start]

    draw = _philox.draw(seed, _REPLACE, position)
    mask_below = _philox.threshold(mask_fraction)
    random_below = min(mask_below + _philox.threshold(random_fraction), 2**32)
    ordinary_table = ordinary_ids.nonzero().squeeze(1)
    shift = 63 - len(ordinary_table).bit_length()
    scale = (len(ordinary_table) << shift) // max(1, random_below - mask_below)
    scaled = (draw - mask_below) * scale >> shift
    is_random = chosen & (draw >= mask_below) & (draw < random_below)
    output = torch.where(chosen & (draw < mask_below), mask_token_id, ids)
    output[is_random] = ordinary_table[scaled[is_random]]
    labels = torch.where(chosen, ids, IGNORED)
    return MaskedTokens(
        output.view_as(input_ids).to(input_ids.dtype), labels.view_as(input_ids).to(input_ids.dtype)
    )


def exact_count(candidates: Tensor, mlm_probability: float = 0.15) -> Tensor:
    """How many of each sequence's candidates "exact" chooses: int64, the shape of the integer `candidates`.

    Candidates are the tokens that are not in special_ids (words, with `subword`). Computed on the host, the
    sum over a batch is the size that `torch.nonzero_static` needs to find the chosen tokens without a sync:
    `torch.nonzero_static(masked.labels != -100, size=int(exact_count(candidates).sum()))`.
    """
    _arguments.check_tensor("candidates", candidates, "torch.int64")
    return (mlm_probability * candidates.double() + 0.5).floor().long().clamp(min=1).where(candidates > 0, 0)


@torch.library.register_fake("mtfast::mask_tokens")
def _(input_ids: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input_ids), torch.empty_like(input_ids)
