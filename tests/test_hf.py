"""attn_implementation="mtfast" against transformers' own SDPA, in models of transformers."""

from __future__ import annotations

import csv

import pytest
import torch
import transformers
from torch import Tensor

from mtfast import hf
from mtfast.hf import register_attention, sequences_of_mask

register_attention()
TOLERANCE = 2e-5
LENGTHS = (9, 1, 30, 17)
KINDS = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
}


def small_config(kind: str = "bert", **changes):
    shape = dict(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    if kind == "distilbert":
        shape = dict(dim=64, n_layers=2, n_heads=2, hidden_dim=96)
    return KINDS[kind][0](**shape | {"vocab_size": 99, "initializer_range": 0.1} | changes)


def pair_of(kind: str = "bert", **changes):
    """A model with SDPA and one with packed attention, with the same weights and without dropout."""
    torch.manual_seed(0)
    names = ("sdpa", "mtfast")
    # Of each its own configuration, which is where the name of the attention stays.
    models = [
        KINDS[kind][1]._from_config(small_config(kind, **changes), attn_implementation=name) for name in names
    ]
    assert tuple(model.config._attn_implementation for model in models) == names
    models[1].load_state_dict(models[0].state_dict())
    return [model.eval() for model in models]


def padded_batch(lengths=LENGTHS, side: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    place = torch.arange(longest)
    mask = place < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    ids = torch.randint(3, 99, (len(lengths), longest), generator=generator)
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def packed_batch(padded: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, int]:
    """Without padding: ids and positions [1, total]; cu_seqlens, max_seqlen."""
    mask = padded["attention_mask"].bool()
    lengths = mask.sum(1)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    batch = {"input_ids": padded["input_ids"][mask][None], "position_ids": positions[None]}
    return batch, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


def results(model, batch: dict[str, Tensor], inside: Tensor, **options) -> list[Tensor]:
    """States of the tokens, and the gradients of all weights by a loss of those states."""
    model.zero_grad()
    states = model(**batch, **options).last_hidden_state[inside]
    weights = torch.linspace(-1, 1, states.numel()).view_as(states)
    (states * weights).mean().backward()
    return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch(side, kind):
    sdpa, ours = pair_of(kind)
    batch = padded_batch(side=side)
    inside = batch["attention_mask"].bool()
    assert_close(results(ours, batch, inside), results(sdpa, batch, inside))


@pytest.mark.parametrize("lengths", [(5, 5, 5), (7,)])
def test_a_batch_without_a_mask(lengths):
    sdpa, ours = pair_of()
    batch = padded_batch(lengths)
    inside = batch.pop("attention_mask").bool()
    assert_close(results(ours, batch, inside), results(sdpa, batch, inside))


@pytest.mark.parametrize("by_positions", [False, True])
def test_a_batch_without_padding(by_positions):
    sdpa, ours = pair_of()
    padded = padded_batch()
    inside = padded["attention_mask"].bool()
    batch, cu_seqlens, max_seqlen = packed_batch(padded)
    said = {} if by_positions else {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen}
    assert_close(
        results(ours, batch, torch.ones_like(batch["input_ids"]).bool(), **said),
        results(sdpa, padded, inside),
    )


def test_what_the_flattening_collator_makes():
    sdpa, ours = pair_of()
    padded = padded_batch()
    inside = padded["attention_mask"].bool()
    rows = [
        {"input_ids": ids[there].tolist()} for ids, there in zip(padded["input_ids"], inside, strict=True)
    ]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    batch.pop("labels")
    everywhere = torch.ones_like(batch["input_ids"]).bool()
    assert_close(results(ours, batch, everywhere), results(sdpa, padded, inside))


def test_real_sentences(data_dir, checkpoint_dir):
    """Of SST, in a trained BERT: padded, and without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_dir)
    with open(data_dir / "cs224n" / "ids-sst-dev.csv", newline="", encoding="utf-8") as file:
        texts = [row["sentence"] for row in csv.DictReader(file, delimiter="\t")][:64]
    sdpa, ours = (
        transformers.AutoModel.from_pretrained(checkpoint_dir, attn_implementation=name).eval()
        for name in ("sdpa", "mtfast")
    )
    padded = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    padded.pop("token_type_ids", None)
    inside = padded["attention_mask"].bool()
    wanted = results(sdpa, padded, inside)
    assert_close(results(ours, padded, inside), wanted)
    batch, cu_seqlens, max_seqlen = packed_batch(padded)
    said = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen}
    assert_close(results(ours, batch, torch.ones_like(batch["input_ids"]).bool(), **said), wanted)


def test_heads_of_any_width():
    sdpa, ours = pair_of(hidden_size=160)
    batch = padded_batch()
    inside = batch["attention_mask"].bool()
    assert_close(results(ours, batch, inside), results(sdpa, batch, inside))


def test_an_empty_row_is_no_sequence():
    _, ours = pair_of()
    batch = padded_batch()
    whole = ours(**batch).last_hidden_state
    batch["attention_mask"][1] = 0
    inside = batch["attention_mask"].bool()
    assert torch.equal(ours(**batch).last_hidden_state[inside], whole[inside])


def test_dropout_follows_torchs_seed():
    _, ours = pair_of(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    batch = padded_batch()

    def states(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours.train()(**batch).last_hidden_state[batch["attention_mask"].bool()]

    assert torch.equal(states(1), states(1)) and not torch.equal(states(1), states(2))


def test_bfloat16_is_as_near_as_sdpa():
    exact, _ = pair_of()
    sdpa, ours = (model.to(torch.bfloat16) for model in pair_of())
    batch = padded_batch()
    inside = batch["attention_mask"].bool()
    wanted = exact.double()(**batch).last_hidden_state[inside]
    errors = [(m(**batch).last_hidden_state[inside].double() - wanted).norm() for m in (ours, sdpa)]
    assert errors[0] <= 2 * errors[1]


def test_padding_lies_in_sequences_of_its_own():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    cu_seqlens = sequences_of_mask(
        mask_function=transformers.masking_utils.bidirectional_mask_function, attention_mask=mask
    )
    assert cu_seqlens.tolist() == [0, 1, 3, 4, 4, 8, 8, 8, 8, 12] and cu_seqlens.dtype == torch.int32


def test_a_mask_with_a_gap_is_refused():
    _, ours = pair_of()
    batch = padded_batch()
    batch["attention_mask"][2, 4] = 0
    with pytest.raises(ValueError, match="attention_mask has a gap in row 2"):
        ours(**batch)


def test_another_attention_is_refused():
    batch = padded_batch()
    states, mask = torch.zeros(4, 30, 64), batch["attention_mask"]
    decoder = transformers.BertModel._from_config(small_config(is_decoder=True), attn_implementation="mtfast")
    with pytest.raises(ValueError, match="hides keys from queries"):
        decoder(**batch)
    crossing = transformers.BertModel._from_config(
        small_config(is_decoder=True, add_cross_attention=True), attn_implementation="mtfast"
    )
    with pytest.raises(ValueError, match="hides keys from queries"):
        crossing(**batch, encoder_hidden_states=states, encoder_attention_mask=mask)
    attend = transformers.AttentionInterface()["mtfast"]
    q = torch.zeros(1, 4, 5, 32)
    with pytest.raises(ValueError, match="as many heads in keys"):
        attend(torch.nn.Identity(), q, q[:, :2], q[:, :2], None)
    for option in (
        {"softcap": 30.0},
        {"sliding_window": 64},
        {"is_causal": True},
        {"output_attentions": True},
    ):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"has no {name}, found {value}"):
            attend(torch.nn.Identity(), q, q, q, None, **option)
    with pytest.raises(ValueError, match="cu_seq_lens_q comes without max_length_q"):
        attend(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 5]).int())


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setattr(hf.transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"4\.57\.1 .* needs transformers 5\.0"):
        register_attention()
