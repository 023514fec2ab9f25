"""The packed encoder and the pre-training heads against Hugging Face's BERT in the same weights."""

import copy
import csv
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bert_twins import load_twin, pack, pad, random_sentences, relative_difference, small_config
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForPreTraining, BertModel

from mtfast.models.bert import PackedBert, flops_per_token, mean_seqlen
from mtfast.models.checkpoint import hf_state_dict, load_bert_config, load_pretrained, load_tokenizer
from mtfast.models.dropout import dropout
from mtfast.models.pretraining import build_pretrain_model

LENGTHS = [3, 512, 17, 4, 9, 26, 131, 3, 60, 8]


def real_sentences(data_dir, tokenizer, full_sweep) -> list[list[int]]:
    """64 real sentences of 1 to 510 word pieces: 48 of SST, and reviews cut to a spread of lengths. Sixteen
    of them unless the sweep is full."""
    with open(data_dir / "cs224n" / "ids-sst-dev.csv", newline="", encoding="utf-8") as file:
        texts = [row["sentence"] for row in csv.DictReader(file, delimiter="\t")][: 48 if full_sweep else 11]
    sentences = [tokenizer(text)["input_ids"] for text in texts]
    reviews = pq.read_table(data_dir / "imdb" / "test.parquet", columns=["text"])["text"].to_pylist()
    lengths = [1, 2, *range(60, 396, 28), 509, 510] if full_sweep else [1, 2, 60, 228, 510]
    for text, pieces in zip(sorted(reviews, key=len)[-len(lengths) :], lengths, strict=True):
        sentences.append(tokenizer(text, truncation=True, max_length=pieces + 2)["input_ids"])
    sizes = [len(tokens) for tokens in sentences]
    assert len(sizes) == (64 if full_sweep else 16) and min(sizes) == 3 and max(sizes) == 512
    return sentences


def compare_with_hugging_face(model, twin, sentences, first_segments) -> None:
    packed = pack(sentences, first_segments)
    total = len(packed["input_ids"])
    generator = torch.Generator().manual_seed(0)
    masked = torch.randperm(total, generator=generator)[: total // 7].sort().values
    words = torch.randint(0, model.encoder.config.vocab_size, (len(masked),), generator=generator)
    follows = torch.randint(0, 2, (len(sentences),), generator=generator)
    model.eval(), twin.eval()

    # Hugging Face, a few sentences of like length at a time, so that padding stays small.
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    hidden = torch.empty(total, model.encoder.config.hidden_size)
    nsp = torch.empty(len(sentences), 2)
    mlm = torch.empty(len(masked), model.encoder.config.vocab_size)
    bounds = packed["cu_seqlens"].tolist()
    for begin in range(0, len(order), 8):
        chosen = order[begin : begin + 8]
        firsts = [first_segments[i] for i in chosen]
        inputs, inside = pad(pack([sentences[i] for i in chosen], firsts))
        output = twin.bert(**inputs)
        states = output.last_hidden_state[inside]
        places = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen])
        in_chunk = torch.isin(masked, places)
        rows = (masked[in_chunk, None] == places).nonzero()[:, 1]
        mlm_logits, nsp_logits = twin.cls(states[rows], output.pooler_output)
        loss = F.cross_entropy(mlm_logits, words[in_chunk], reduction="sum") / len(masked)
        loss = loss + F.cross_entropy(nsp_logits, follows[chosen], reduction="sum") / len(follows)
        loss.backward()
        hidden[places], mlm[in_chunk], nsp[chosen] = states.detach(), mlm_logits.detach(), nsp_logits.detach()

    found_mlm, found_nsp = model(**packed, masked_rows=masked)
    (F.cross_entropy(found_mlm, words) + F.cross_entropy(found_nsp, follows)).backward()
    with torch.no_grad():
        states = model.encoder(**packed)
        assert (states - hidden).abs().max() < 2e-5
        first = model.encoder(**packed, cls_only=True)
        assert (first - states[packed["cu_seqlens"][:-1]]).abs().max() < 2e-5
    assert (found_mlm - mlm).abs().max() < 1e-4
    assert (found_nsp - nsp).abs().max() < 1e-4
    ours = hf_state_dict({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in twin.named_parameters():
        # Softmax ignores what all keys share: the gradient of the key's bias is nothing but rounding.
        if name.endswith("key.bias"):
            assert ours[name].norm() < 1e-4 * ours[name.replace("key", "value")].norm()
        else:
            assert relative_difference(ours[name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("hidden_size", [64, 52])  # of two heads
def test_equals_hugging_face(hidden_size):
    config = small_config(hidden_size=hidden_size, initializer_range=0.15)
    model = build_pretrain_model(config)
    torch.nn.init.normal_(model.mlm.bias)
    twin = BertForPreTraining(config)
    load_twin(twin, model)
    sentences = random_sentences(LENGTHS, config.vocab_size, seed=3)
    compare_with_hugging_face(model, twin, sentences, [max(2, n // 2) for n in LENGTHS])


@pytest.mark.sweep
def test_equals_hugging_face_on_real_sentences(data_dir, checkpoint_dir, full_sweep):
    torch.manual_seed(0)
    config = load_bert_config(checkpoint_dir)
    model = build_pretrain_model(config)
    load_pretrained(checkpoint_dir, model)
    torch.nn.init.normal_(model.mlm.bias)
    twin = BertForPreTraining.from_pretrained(checkpoint_dir)
    load_twin(twin, model)
    sentences = real_sentences(data_dir, load_tokenizer(checkpoint_dir), full_sweep)
    compare_with_hugging_face(model, twin, sentences, [len(s) // 2 + 1 for s in sentences])


@pytest.mark.parametrize("select", ["cls_only", "rows"])
def test_part_of_the_last_layer_gives_the_rows_and_gradients_of_the_whole(select):
    config = small_config(initializer_range=0.15)
    encoder = PackedBert(config)
    packed = pack(random_sentences(LENGTHS, config.vocab_size, seed=1))
    first = packed["cu_seqlens"][:-1].long()
    rows = first if select == "cls_only" else torch.tensor([0, 5, 514, 515, 600, 7])
    part = encoder(**packed, cls_only=True) if select == "cls_only" else encoder(**packed, rows=rows)
    weights = torch.randn(part.shape)
    found = torch.autograd.grad((part * weights).sum(), list(encoder.parameters()))
    whole = encoder(**packed)[rows]
    expected = torch.autograd.grad((whole * weights).sum(), list(encoder.parameters()))
    assert torch.allclose(part, whole, atol=1e-5)
    for (name, _), a, b in zip(encoder.named_parameters(), found, expected, strict=True):
        assert relative_difference(a, b) < 1e-4, name


def test_sentences_do_not_see_their_neighbours():
    config = small_config(initializer_range=0.15)
    encoder = PackedBert(config).eval()
    sentences = random_sentences([7, 12, 5], config.vocab_size, seed=2)
    with torch.no_grad():
        together = encoder(**pack(sentences))
        alone = torch.cat([encoder(**pack([s])) for s in sentences])
        filled = encoder(**pack([*sentences, [0] * 40]))[: len(together)]
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, filled, atol=1e-5)


def test_empty_sequences_are_harmless():
    config = small_config()
    encoder = PackedBert(config).eval()
    sentences = random_sentences([7, 12], config.vocab_size, seed=2)
    packed = pack(sentences)
    with_empty = packed | {"cu_seqlens": torch.tensor([0, 0, 7, 7, 19, 19], dtype=torch.int32)}
    with torch.no_grad():
        assert torch.allclose(encoder(**with_empty), encoder(**packed), atol=1e-5)
        cls = encoder(**with_empty, cls_only=True)
        assert torch.allclose(cls[[1, 3]], encoder(**packed, cls_only=True), atol=1e-5)
    nothing = torch.empty(0, dtype=torch.int32)
    bounds = torch.zeros(1, dtype=torch.int32)
    assert encoder(nothing, nothing, nothing, bounds, 0).shape == (0, 64)
    assert encoder(nothing, nothing, nothing, bounds, 0, cls_only=True).shape == (0, 64)


def test_bfloat16_is_as_close_as_hugging_face():
    config = small_config(initializer_range=0.15, num_hidden_layers=4)
    model = build_pretrain_model(config).eval()
    exact = BertForPreTraining(config).double().eval()
    load_twin(exact, model)
    coarse = copy.deepcopy(exact).bfloat16()
    packed = pack(random_sentences([40] * 16, config.vocab_size, seed=4))
    model.bfloat16()
    exact.load_state_dict(coarse.state_dict())  # so that rounding of the weights is in neither's error
    inputs, inside = pad(packed)
    with torch.no_grad():
        truth = exact.bert(**inputs).last_hidden_state[inside]
        theirs = (coarse.bert(**inputs).last_hidden_state[inside] - truth).norm()
        states = model.encoder(**packed)
        mlm, nsp = model(**packed, masked_rows=torch.tensor([1, 2]))
    assert states.dtype == torch.bfloat16 and mlm.dtype == nsp.dtype == torch.float32
    assert (states - truth).norm() < 1.5 * theirs
    assert model.mlm.decoder_weight is model.encoder.embeddings.word


def test_next_sentence_logits_leave_out_the_filler():
    config = small_config()
    model = build_pretrain_model(config).eval()
    packed = pack(random_sentences([9, 6, 20], config.vocab_size, seed=5))
    rows = torch.tensor([3, 10])
    mlm, nsp = model(**packed, masked_rows=rows)
    fewer_mlm, fewer_nsp = model(**packed, masked_rows=rows, samples=2)
    assert nsp.shape == (3, 2)
    assert torch.allclose(fewer_nsp, nsp[:2], atol=1e-6) and torch.allclose(fewer_mlm, mlm, atol=1e-6)
    _, none_masked = model(**packed, masked_rows=rows[:0])
    assert torch.allclose(none_masked, nsp, atol=1e-6)


def test_dropout_is_where_bert_has_it():
    packed = pack(random_sentences([9, 6, 20], 211, seed=5))
    rates = [(0.3, 0.0), (0.0, 0.3)]
    for hidden_p, attention_p in rates:
        config = small_config(hidden_dropout_prob=hidden_p, attention_probs_dropout_prob=attention_p)
        encoder = PackedBert(config)
        torch.manual_seed(11)
        first = encoder(**packed)
        second = encoder(**packed)
        torch.manual_seed(11)
        assert torch.equal(encoder(**packed), first)
        assert not torch.equal(first, second)
        encoder.eval()
        assert torch.equal(encoder(**packed), encoder(**packed))


@pytest.mark.parametrize("part", [{}, {"cls_only": True}, {"rows": torch.tensor([0, 5, 14])}])
def test_activation_checkpointing_saves_memory_and_changes_nothing(part):
    config = small_config(num_hidden_layers=4, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    encoder, packed = PackedBert(config), pack(random_sentences([9, 6, 20], 211, seed=5))
    results, kept = [], []
    for encoder.activation_checkpointing in (False, True):
        saved: list[int] = []
        torch.manual_seed(11)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, to=saved: to.append(x.nbytes) or x, lambda x: x
        ):
            out = encoder(**packed, **part)
        torch.manual_seed(12)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in encoder.parameters())])
        kept.append(sum(saved))
        encoder.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_cheap_dropout_is_inverted_dropout(dtype, p):
    torch.manual_seed(5)
    x = (torch.rand(333, 1001, dtype=dtype) + 0.5).requires_grad_()
    out = dropout(x, p, True)
    kept = out != 0
    spread = math.sqrt(p * (1 - p) / x.numel())
    assert abs(1 - kept.double().mean().item() - p) < 4 * spread + 2**-16
    assert kept.double().mean(0).sub(1 - p).abs().max() < 6 * math.sqrt(p * (1 - p) / 333)
    scaled = x.double() / (1 - p)
    epsilon = torch.finfo(dtype).eps + 2**-15
    assert ((out.double() - scaled).abs() <= 2 * epsilon * scaled)[kept].all()
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected = gradient.double() * kept / (1 - p)
    assert torch.allclose(x.grad.double(), expected, rtol=2 * epsilon, atol=0)


def test_dropout_is_the_identity_where_it_is_off():
    x = torch.randn(5, 7)
    assert torch.equal(dropout(x, 0.5, False), x) and torch.equal(dropout(x, 0.0, True), x)
    assert dropout(x[:0], 0.5, True).shape == (0, 7)


def test_fresh_weights_are_distributed_as_hugging_faces():
    config = small_config(hidden_size=128, initializer_range=0.05)
    torch.manual_seed(0)
    ours = build_pretrain_model(config)
    theirs = BertForPreTraining(config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == theirs.num_parameters()
    converted = hf_state_dict(ours.state_dict())
    for name, parameter in theirs.named_parameters():
        if parameter.std() == 0:
            assert torch.equal(converted[name], parameter), name
        else:
            assert converted[name].mean().abs() < 0.005 + parameter.mean().abs(), name
            assert converted[name].std() == pytest.approx(parameter.std().item(), rel=0.12), name
    assert not ours.encoder.embeddings.word[0].any()


def test_flops_per_token_is_what_torch_counts():
    config = small_config(attn_implementation="eager")
    twin = BertModel(config, add_pooling_layer=False)
    inputs, _ = pad(pack(random_sentences([40, 40], config.vocab_size, seed=0)))
    with FlopCounterMode(display=False) as counter:
        out = twin(**inputs).last_hidden_state
    assert flops_per_token(config, 40, training=False) == counter.get_total_flops() / 80
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert flops_per_token(config, 40) == 3 * flops_per_token(config, 40, training=False)
    assert counter.get_total_flops() / 80 == pytest.approx(2 * flops_per_token(config, 40, training=False))


def test_mean_seqlen_is_the_average_tokens():
    lengths = np.array([2, 6, 1])
    assert mean_seqlen(lengths) == np.repeat(lengths, lengths).mean()


def test_wrong_use_is_named():
    config = small_config(max_position_embeddings=16)
    encoder = PackedBert(config)
    with pytest.raises(ValueError, match=r"max_seqlen is 17.*16 tokens"):
        encoder(**pack(random_sentences([17], 211, seed=0)))
    with pytest.raises(ValueError, match="exclude each other"):
        encoder(**pack(random_sentences([4], 211, seed=0)), cls_only=True, rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="head_dim 257"):
        PackedBert(small_config(hidden_size=514))
    with pytest.raises(ValueError, match="hidden_size 64 is not a multiple of num_attention_heads 3"):
        PackedBert(small_config(num_attention_heads=3))
    with pytest.raises(ValueError, match="add_cross_attention is true"):
        PackedBert(small_config(add_cross_attention=True))
