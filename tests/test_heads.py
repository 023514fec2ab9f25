"""The task heads and the multi-task model against twins written plainly in eager PyTorch."""

from dataclasses import asdict

import pytest
import torch
from bert_twins import load_twin, pack, pad, random_sentences, relative_difference, small_config
from torch import nn
from torch.nn import functional as F
from transformers import BertModel

from mtfast.models.heads import LstmSentimentHead, SentimentHead
from mtfast.models.multitask import HeadsConfig, MultiTaskHeads, build_multitask_model

HIDDEN = 64
LENGTHS = [5, 2, 9, 14, 7, 7, 30, 3]
ROWS = {"sst": [1, 3, 0], "quora": [[2, 4], [5, 2]], "sts": [[6, 7], [4, 4], [0, 3]]}
ALL_HEADS = [
    HeadsConfig(sentiment, pair_input, inner=48, activation=activation, dropout_p=0.0)
    for sentiment, pair_input, activation in (
        ("linear", "separate", "relu"),
        ("lstm", "separate", "tanh"),
        ("linear", "joint", "gelu"),
        ("lstm", "joint", "relu"),
    )
]


def rows_for(config: HeadsConfig, rows=ROWS) -> dict[str, torch.Tensor]:
    out = {task: torch.tensor(value) for task, value in rows.items()}
    if config.pair_input == "joint":
        out = {task: x if x.dim() == 1 else x[:, 0].contiguous() for task, x in out.items()}
    return out


def twin_outputs(heads: MultiTaskHeads, config: HeadsConfig, states: list[torch.Tensor], rows) -> dict:
    """What the heads compute, sentence by sentence, of each sentence's hidden states [length, hidden]."""

    def pair(chosen):
        head = heads.pair if config.pair_input == "joint" else heads.pair.mlp
        x = torch.cat([states[int(i)][0] for i in chosen.reshape(-1)])
        activation = {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}[config.activation]
        return head.out_proj(activation(head.dense(x)))

    sst = []
    for i in rows["sst"].tolist():
        x = states[i][0]
        if config.sentiment == "lstm":
            output, _ = heads.sentiment.lstm(states[i][1:])
            half = output.size(1) // 2
            x = torch.cat([x, output[-1, :half], output[0, half:]])
        sst.append(heads.sentiment.classifier(x))
    return {
        "sst": torch.stack(sst),
        "quora": torch.stack([pair(chosen)[0] for chosen in rows["quora"]]),
        "sts": torch.stack([pair(chosen)[1] for chosen in rows["sts"]]),
    }


@pytest.mark.parametrize("heads_config", ALL_HEADS, ids=lambda c: f"{c.sentiment}-{c.pair_input}")
def test_model_is_encoder_and_heads(heads_config):
    config = small_config(initializer_range=0.15)
    model = build_multitask_model(config, heads_config)
    packed = pack(random_sentences(LENGTHS, config.vocab_size, seed=0))
    rows = rows_for(heads_config)
    found = model(**packed, sequences=rows)
    states = model.encoder(**packed).split(LENGTHS)
    expected = twin_outputs(model.heads, heads_config, list(states), rows)
    assert list(found) == ["sst", "quora", "sts"]
    for task, output in expected.items():
        assert found[task].shape == output.shape
        assert torch.allclose(found[task], output, atol=1e-5), task
    weights = {task: torch.randn(output.shape) for task, output in expected.items()}
    losses = [sum((outputs[t] * weights[t]).sum() for t in weights) for outputs in (found, expected)]
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert relative_difference(a, b) < 1e-4, name


@pytest.mark.parametrize("heads_config", ALL_HEADS, ids=lambda c: f"{c.sentiment}-{c.pair_input}")
@pytest.mark.parametrize("absent", [("sst",), ("quora", "sts"), ("sst", "quora", "sts")])
def test_a_task_without_rows_gives_zero_gradients(heads_config, absent):
    model = build_multitask_model(small_config(), heads_config)
    packed = pack(random_sentences(LENGTHS, 211, seed=0))
    rows = {task: x[:0] if task in absent else x for task, x in rows_for(heads_config).items()}
    for given in (rows, {task: x for task, x in rows.items() if task not in absent}):
        model.zero_grad()
        outputs = model(**packed, sequences=given)
        assert {task: len(output) for task, output in outputs.items()} == {t: len(x) for t, x in rows.items()}
        sum(output.square().sum() for output in outputs.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            part = "sst" if "sentiment" in name else "quora" if "pair" in name else None
            if part in absent or len(absent) == 3:
                assert not parameter.grad.any(), name
            elif part is not None:
                assert parameter.grad.any(), name


def test_cached_states_give_what_the_model_gives():
    heads_config = HeadsConfig("lstm", inner=48, dropout_p=0.0)
    config = small_config()
    model = build_multitask_model(config, heads_config).eval()
    packed = pack(random_sentences(LENGTHS, config.vocab_size, seed=0))
    rows = rows_for(heads_config)
    bounds = packed["cu_seqlens"].long()
    token_bounds = torch.stack([bounds[rows["sst"]] + 1, bounds[rows["sst"] + 1]], dim=1)
    with torch.no_grad():
        tokens = model.encoder(**packed)
        table = model.encoder(**packed, cls_only=True)
        found = model.heads(table, rows, tokens=tokens, token_bounds=token_bounds)
        expected = model(**packed, sequences=rows)
        given = model(**packed, sequences=rows, token_bounds=token_bounds)
    for task, output in expected.items():
        assert torch.allclose(found[task], output, atol=1e-6)
        assert torch.equal(given[task], output)


def test_five_steps_of_training_follow_the_eager_twin():
    config, heads_config = small_config(initializer_range=0.05), ALL_HEADS[0]
    torch.manual_seed(0)
    model = build_multitask_model(config, heads_config)
    twin = BertModel(config, add_pooling_layer=False)
    load_twin(twin, model)
    twin_heads = MultiTaskHeads(HIDDEN, heads_config)
    twin_heads.load_state_dict(model.heads.state_dict())
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        for parameters in (model.parameters(), [*twin.parameters(), *twin_heads.parameters()])
    ]

    def losses(outputs, labels):
        return torch.stack(
            [
                F.cross_entropy(outputs["sst"], labels["sst"]),
                F.binary_cross_entropy_with_logits(outputs["quora"], labels["quora"]),
                F.mse_loss(outputs["sts"], labels["sts"]),
            ]
        )

    history = []
    for step in range(5):
        sentences = random_sentences([3 + (7 * i + step) % 40 for i in range(44)], 211, seed=step)
        packed = pack(sentences)
        order = torch.randperm(44)
        rows = {"sst": order[:12], "quora": order[12:32].view(-1, 2), "sts": order[32:].view(-1, 2)}
        labels = {"sst": torch.randint(5, (12,)), "quora": torch.rand(10).round(), "sts": 5 * torch.rand(6)}
        ours = losses(model(**packed, sequences=rows), labels)
        padded, inside = pad(packed)
        hidden = twin(**padded).last_hidden_state
        states = [x[mask] for x, mask in zip(hidden, inside, strict=True)]
        theirs = losses(twin_outputs(twin_heads, heads_config, states, rows), labels)
        for loss, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-4), (step, ours, theirs)
        history.append(ours.detach())
    assert (history[0] - history[-1]).abs().max() > 0.1  # it did train


def test_bfloat16_heads_return_float32():
    heads_config = HeadsConfig("lstm", inner=48)
    model = build_multitask_model(small_config(), heads_config).bfloat16()
    outputs = model(**pack(random_sentences(LENGTHS, 211, seed=0)), sequences=rows_for(heads_config))
    assert all(output.dtype == torch.float32 for output in outputs.values())
    sum(output.sum() for output in outputs.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("heads_config", ALL_HEADS, ids=lambda c: f"{c.sentiment}-{c.pair_input}")
def test_dropout_is_drawn_in_training_alone(heads_config):
    heads = MultiTaskHeads(HIDDEN, HeadsConfig(**(asdict(heads_config) | {"dropout_p": 0.4})))
    cls, tokens = torch.randn(8, HIDDEN), torch.randn(12, HIDDEN)
    bounds = torch.tensor([[0, 4], [4, 5], [5, 12]])
    rows = rows_for(heads_config)

    def run():
        return torch.cat([x.flatten() for x in heads(cls, rows, tokens=tokens, token_bounds=bounds).values()])

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first[:15], second[:15]) and not torch.equal(first[15:], second[15:])
    heads.eval()
    assert torch.equal(run(), run())


def test_wrong_use_is_named():
    heads = MultiTaskHeads(HIDDEN, HeadsConfig("lstm", inner=8))
    cls, tokens = torch.randn(4, HIDDEN), torch.randn(9, HIDDEN)
    sst = {"sst": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="tokens and token_bounds"):
        heads(cls, sst)
    with pytest.raises(ValueError, match=r"bounds must be \[2, 2\] on the host, found \[3, 2\]"):
        heads(cls, sst, tokens=tokens, token_bounds=torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="sentence 1 no token"):
        heads(cls, sst, tokens=tokens, token_bounds=torch.tensor([[0, 4], [4, 4]]))
    with pytest.raises(ValueError, match=r"sequences\['quora'\] must be \[n, 2\].*'separate', found \[3\]"):
        heads(cls, {"quora": torch.tensor([0, 1, 2])})
    with pytest.raises(ValueError, match=r"sequences\['sts'\] must be \[n\].*'joint', found \[1, 2\]"):
        MultiTaskHeads(HIDDEN, HeadsConfig(pair_input="joint"))(cls, {"sts": torch.tensor([[0, 1]])})


@pytest.mark.parametrize(
    "field, value",
    [("sentiment", "cnn"), ("pair_input", "both"), ("activation", "elu"), ("inner", 0), ("dropout_p", 1.0)],
)
def test_wrong_configs_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*found {value!r}"):
        HeadsConfig(**{field: value})


def test_heads_have_the_recipes_shapes():
    assert isinstance(MultiTaskHeads(HIDDEN, HeadsConfig()).sentiment, SentimentHead)
    lstm = LstmSentimentHead(HIDDEN, 0.1)
    assert isinstance(lstm.lstm, nn.LSTM) and lstm.lstm.bidirectional and lstm.classifier.out_features == 5
    pair = MultiTaskHeads(HIDDEN, HeadsConfig(inner=48)).pair.mlp
    assert pair.dense.weight.shape == (48, 2 * HIDDEN) and pair.out_proj.weight.shape == (2, 48)
