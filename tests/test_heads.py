"""The task heads and the multi-task model against twins written plainly in PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from bert_twins import load_twin, pack, pad, paper_tasks, random_sentences, relative_difference, small_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from mtfast.models.multitask import (
    LinearHead,
    LstmHead,
    MultiTaskHeads,
    MultiTaskModel,
    build_multitask_model,
)
from mtfast.tasks import MlpConfig, Task

HIDDEN = 64
LENGTHS = [5, 2, 9, 14, 7, 7, 30, 3]
SINGLES = [[1, 3, 0], [6, 2], [5, 5, 7, 4], [0]]
PAIRS = [[[2, 4], [5, 2]], [[6, 7], [4, 4], [0, 3]], [[1, 0]]]
PAIR = ("a", "b")
NLI = Task(kind="classification", classes=3, text=PAIR, label="label", head="pair")
PARAPHRASE = Task(kind="binary", text=PAIR, label="label", head="pair")


class Case(NamedTuple):
    """Tasks, what their MLPs are like, and which outputs of which head are each task's."""

    tasks: dict[str, Task]
    mlp: MlpConfig
    places: dict[str, tuple[str, slice]]

    @property
    def heads(self) -> dict[str, set[str]]:
        """The tasks of each head."""
        return {h: {t for t, (head, _) in self.places.items() if head == h} for h, _ in self.places.values()}


def paper_case(head: str, pair_input: str, activation: str) -> Case:
    places = {
        "sst": ("task-sst", slice(0, 5)),
        "quora": ("mlp-pair", slice(0, 1)),
        "sts": ("mlp-pair", slice(1, 2)),
    }
    return Case(paper_tasks(head, pair_input), MlpConfig(48, activation), places)


PAPER = {
    f"{head}-{pair_input}": paper_case(head, pair_input, activation)
    for head, pair_input, activation in (
        ("linear", "separate", "relu"),
        ("lstm", "separate", "tanh"),
        ("linear", "joint", "gelu"),
        ("lstm", "joint", "relu"),
    )
}
CASES = PAPER | {
    "two MLPs": Case(
        {"nli": replace(NLI, head="entailment"), "same": PARAPHRASE},
        MlpConfig(40, "gelu"),
        {"nli": ("mlp-entailment", slice(0, 3)), "same": ("mlp-pair", slice(0, 1))},
    ),
    "two MLPs, one of them joint": Case(
        {"nli": replace(NLI, head="entailment", pair_input="joint"), "same": PARAPHRASE},
        MlpConfig(40, "tanh"),
        {"nli": ("mlp-entailment", slice(0, 3)), "same": ("mlp-pair", slice(0, 1))},
    ),
    "three tasks in one MLP": Case(
        # One task with another head stands between those of the MLP, and the new one is not its last.
        {name: (paper_tasks() | {"nli": NLI})[name] for name in ("quora", "sst", "nli", "sts")},
        MlpConfig(48, "tanh"),
        {
            "quora": ("mlp-pair", slice(0, 1)),
            "sst": ("task-sst", slice(0, 5)),
            "nli": ("mlp-pair", slice(1, 4)),
            "sts": ("mlp-pair", slice(4, 5)),
        },
    ),
    "an MLP with many outputs": Case(
        {"discourse": replace(NLI, classes=11), "same": PARAPHRASE},
        MlpConfig(48, "gelu"),
        {"discourse": ("mlp-pair", slice(0, 11)), "same": ("mlp-pair", slice(11, 12))},
    ),
    "two LSTM tasks": Case(
        {
            "cola": Task(kind="binary", text="sentence", label="label", head="lstm"),
            "entailed": replace(NLI, head="lstm", pair_input="joint"),
        },
        MlpConfig(),
        {"cola": ("task-cola", slice(0, 1)), "entailed": ("task-entailed", slice(0, 3))},
    ),
    "a single task": Case(
        {"grade": Task(kind="regression", low=0, high=1, text="sentence", label="score")},
        MlpConfig(),
        {"grade": ("task-grade", slice(0, 1))},
    ),
    "a single task in an MLP": Case({"nli": NLI}, MlpConfig(32, "relu"), {"nli": ("mlp-pair", slice(0, 3))}),
}
# Tasks that have no rows: those of each head, one alone of those that share a head, and all.
ABSENT = [
    (name, absent)
    for name, case in CASES.items()
    for absent in dict.fromkeys(
        tuple(t for t in case.tasks if t in tasks)
        for tasks in [*case.heads.values(), *({t} for t in case.tasks), set(case.tasks)]
    )
]


def built(case: Case, dropout_p: float = 0.0, **config) -> MultiTaskModel:
    return build_multitask_model(small_config(**config), case.tasks, case.mlp, dropout_p)


def rows_for(case: Case) -> dict[str, Tensor]:
    """Which sequences are each task's: pairs where the texts are encoded separately."""
    singles, pairs = iter(SINGLES), iter(PAIRS)
    return {
        name: torch.tensor(next(pairs if len(task.texts) == 2 and task.pair_input == "separate" else singles))
        for name, task in case.tasks.items()
    }


def bounds_for(case: Case, packed: dict, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the tokens of the LSTM tasks' sequences begin and end, without [CLS]."""
    bounds = packed["cu_seqlens"].long()
    return {
        name: torch.stack([bounds[rows[name]] + 1, bounds[rows[name] + 1]], dim=1)
        for name, task in case.tasks.items()
        if task.head == "lstm" and name in rows
    }


def run(model: MultiTaskModel, case: Case, packed: dict, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return model(**packed, sequences=rows, token_bounds=bounds_for(case, packed, rows))


def lstm_end(weights: Mapping[str, Tensor], states: Tensor, direction: str) -> Tensor:
    """The last state of one direction of an LSTM over states [length, hidden], gate by gate."""
    w_x, w_h, b_x, b_h = (
        weights[f"{kind}_l0{direction}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = c = states.new_zeros(w_h.size(1))
    for x in states:
        i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


def twin_output(
    case: Case, name: str, weights: Mapping[str, Tensor], states: list[Tensor], rows: Tensor
) -> Tensor:
    """All outputs of the head of the task `name` for an example after another.

    Args:
        weights: the heads' parameters by name. states: of each sequence, [length, hidden].
        rows: the examples' sequences, [n] or [n, 2].
    """
    head = f"{case.places[name][0]}."
    mine = {k.removeprefix(head): w.double() for k, w in weights.items() if k.startswith(head)}
    mine = {k.removeprefix("mlp."): w for k, w in mine.items()}
    of_lstm = {k.removeprefix("lstm."): w for k, w in mine.items()}
    activation = {"relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}[case.mlp.activation]
    outputs = []
    for example in rows.reshape(len(rows), -1):
        x = torch.cat([states[i][0] for i in example.tolist()]).double()
        if case.tasks[name].head == "lstm":
            others = states[int(example)][1:].double()
            ends = (others, ""), (others.flip(0), "_reverse")
            x = torch.cat([x, *(lstm_end(of_lstm, part, direction) for part, direction in ends)])
        last = "classifier" if case.tasks[name].head == "linear" else "out_proj"
        if last == "out_proj":
            x = activation(mine["dense.weight"] @ x + mine["dense.bias"])
        outputs.append(mine[f"{last}.weight"] @ x + mine[f"{last}.bias"])
    return torch.stack(outputs)


def twin_outputs(case: Case, weights, states: list[Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, task in case.tasks.items():
        output = twin_output(case, name, weights, states, rows[name])[:, case.places[name][1]]
        found[name] = output if task.kind == "classification" else output[:, 0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_model_is_encoder_and_heads(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = built(case, initializer_range=0.15)
    packed = pack(random_sentences(LENGTHS, 211, seed=0))
    rows = rows_for(case)
    found = run(model, case, packed, rows)
    states = model.encoder(**packed).split(LENGTHS)
    weights = dict(model.heads.named_parameters())
    assert {weight.split(".")[0] for weight in weights} == set(case.heads)
    expected = twin_outputs(case, weights, list(states), rows)
    assert list(found) == list(case.tasks)
    for task, output in expected.items():
        assert found[task].shape == output.shape and found[task].dtype == torch.float32
        assert torch.allclose(found[task].double(), output, atol=1e-5), task
    factors = {task: torch.randn(output.shape) for task, output in expected.items()}
    losses = [sum((outputs[t] * factors[t]).sum() for t in factors) for outputs in (found, expected)]
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    for parameter, a, b in zip(parameters, *gradients, strict=True):
        assert relative_difference(a, b) < 1e-4, parameter


@pytest.mark.parametrize(("name", "absent"), ABSENT)
def test_a_task_without_rows_gives_zero_gradients(name, absent):
    case = CASES[name]
    model = built(case)
    packed = pack(random_sentences(LENGTHS, 211, seed=0))
    rows = {task: x[:0] if task in absent else x for task, x in rows_for(case).items()}
    for given in (rows, {task: x for task, x in rows.items() if task not in absent}):
        model.zero_grad()
        outputs = run(model, case, packed, given)
        assert {task: len(output) for task, output in outputs.items()} == {t: len(x) for t, x in rows.items()}
        sum(output.square().sum() for output in outputs.values()).backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
            head = parameter_name.removeprefix("heads.").split(".")[0]
            if head in case.heads:
                assert bool(parameter.grad.any()) == (not case.heads[head] <= set(absent)), parameter_name
            elif len(absent) == len(case.tasks):
                assert not parameter.grad.any(), parameter_name
        for task in absent:  # of a head that others share its part alone is zero
            head, columns = case.places[task]
            module = model.heads.get_submodule(head)
            last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
            assert not last.weight.grad[columns].any() and not last.bias.grad[columns].any()


@pytest.mark.parametrize("name", ["lstm-separate", "two LSTM tasks"])
def test_cached_states_give_what_the_model_gives(name):
    case = CASES[name]
    model = built(case).eval()
    packed = pack(random_sentences(LENGTHS, 211, seed=0))
    rows = rows_for(case)
    token_bounds = bounds_for(case, packed, rows)
    with torch.no_grad():
        tokens = model.encoder(**packed)
        table = model.encoder(**packed, cls_only=True)
        found = model.heads(table, rows, tokens=tokens, token_bounds=token_bounds, max_seqlen=30)
        expected = twin_outputs(case, dict(model.heads.named_parameters()), list(tokens.split(LENGTHS)), rows)
        given = run(model, case, packed, rows)
    for task, output in expected.items():
        assert torch.allclose(found[task].double(), output, atol=1e-6)
        assert torch.allclose(given[task].double(), output, atol=1e-6)


def losses_of(case: Case, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    kinds = {
        "classification": F.cross_entropy,
        "binary": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }
    return torch.stack([kinds[t.kind](outputs[n].double(), labels[n]) for n, t in case.tasks.items()])


def draw_labels(task: Task, count: int) -> Tensor:
    if task.kind == "classification":
        return torch.randint(task.classes, (count,))
    return torch.rand(count).round().double() if task.kind == "binary" else 5 * torch.rand(count).double()


@pytest.mark.parametrize("name", ["linear-separate", "lstm-separate", "three tasks in one MLP"])
def test_five_steps_of_training_follow_the_eager_twin(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = built(case, initializer_range=0.05)
    twin = BertModel(model.encoder.config, add_pooling_layer=False)
    load_twin(twin, model)
    twin_heads = {k: x.detach().clone().requires_grad_() for k, x in model.heads.named_parameters()}
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        for parameters in (model.parameters(), [*twin.parameters(), *twin_heads.values()])
    ]

    history = []
    for step in range(5):
        per_task = 24 // len(case.tasks)
        packed = pack(random_sentences([3 + (7 * i + step) % 40 for i in range(48)], 211, seed=step))
        order = torch.randperm(48).view(len(case.tasks), per_task, 2)
        pairs = {task for task, x in rows_for(case).items() if x.dim() == 2}
        rows = {n: order[i] if n in pairs else order[i, :, 0] for i, n in enumerate(case.tasks)}
        labels = {n: draw_labels(task, per_task) for n, task in case.tasks.items()}
        ours = losses_of(case, run(model, case, packed, rows), labels)
        padded, inside = pad(packed)
        hidden = twin(**padded).last_hidden_state
        states = [x[mask] for x, mask in zip(hidden, inside, strict=True)]
        theirs = losses_of(case, twin_outputs(case, twin_heads, states, rows), labels)
        for loss, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-4), (step, ours, theirs)
        history.append(ours.detach())
    assert (history[0] - history[-1]).abs().max() > 0.1  # it did train


def test_with_labels_the_model_gives_the_tasks_losses():
    case = CASES["three tasks in one MLP"]
    model = built(case)
    packed, rows = pack(random_sentences(LENGTHS, 211, seed=0)), rows_for(case)
    labels = {name: draw_labels(task, len(rows[name])) for name, task in case.tasks.items()}
    labelled = {
        n: SimpleNamespace(
            labels=x if x.dtype == torch.int64 else x.float(), weights=torch.full((len(x),), 1.5 / len(x))
        )
        for n, x in labels.items()
    }
    found = model(**packed, sequences=rows, rows=labelled)
    expected = losses_of(case, run(model, case, packed, rows), labels) * 3 / 2
    assert list(found) == list(case.tasks)
    assert torch.allclose(torch.stack(list(found.values())).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_heads_return_float32(name):
    case = CASES[name]
    model = built(case, dropout_p=0.1).bfloat16()
    outputs = run(model, case, pack(random_sentences(LENGTHS, 211, seed=0)), rows_for(case))
    assert all(output.dtype == torch.float32 for output in outputs.values())
    sum(output.sum() for output in outputs.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_dropout_is_drawn_in_training_alone(name):
    case = CASES[name]
    torch.manual_seed(0)
    heads = MultiTaskHeads(HIDDEN, case.tasks, case.mlp, 0.4)
    cls, tokens = torch.randn(8, HIDDEN), torch.randn(sum(LENGTHS), HIDDEN)
    rows = rows_for(case)
    bounds = bounds_for(case, {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0)}, rows)

    def outputs():
        return heads(cls, rows, tokens=tokens, token_bounds=bounds, max_seqlen=30)

    torch.manual_seed(3)
    first, second = outputs(), outputs()
    torch.manual_seed(3)
    again = outputs()
    for task in case.tasks:
        assert torch.equal(again[task], first[task])
        assert not torch.equal(first[task], second[task])
    heads.eval()
    first, second = outputs(), outputs()
    assert all(torch.equal(first[task], second[task]) for task in case.tasks)


def test_wrong_use_is_named():
    heads = MultiTaskHeads(HIDDEN, paper_tasks("lstm"), MlpConfig(8), 0.1)
    cls, tokens = torch.randn(4, HIDDEN), torch.randn(9, HIDDEN)
    sst = {"sst": torch.tensor([0, 1])}

    given = {"tokens": tokens, "token_bounds": {"sst": torch.tensor([[0, 4], [4, 5]])}, "max_seqlen": 4}
    for missing in given:
        with pytest.raises(ValueError, match="head of sst needs tokens, token_bounds and max_seqlen"):
            heads(cls, sst, **{name: x for name, x in given.items() if name != missing})
    for wrong, found in (
        (torch.zeros(3, 2, dtype=torch.int64), r"\[3, 2\] on cpu"),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), r"\[2, 2\] on meta"),
    ):
        with pytest.raises(ValueError, match=rf"bounds must be \[2, 2\] on cpu, found {found}"):
            heads(cls, sst, **given | {"token_bounds": {"sst": wrong}})
    with pytest.raises(ValueError, match=r"sequences\['quora'\] must be \[n, 2\], found \[3\]"):
        heads(cls, {"quora": torch.tensor([0, 1, 2])})
    joint = MultiTaskHeads(HIDDEN, paper_tasks(pair_input="joint"), MlpConfig(8), 0.1)
    with pytest.raises(ValueError, match=r"sequences\['sts'\] must be \[n\], found \[1, 2\]"):
        joint(cls, {"sts": torch.tensor([[0, 1]])})


@pytest.mark.parametrize("pair_input", ["separate", "joint"])
@pytest.mark.parametrize("outputs", [1, 20])
@pytest.mark.parametrize(("name", "value"), [("activation", "elu"), ("width", 0), ("dropout_p", 1.0)])
def test_impossible_heads_are_named(name, value, outputs, pair_input):
    nli = replace(NLI, classes=outputs, pair_input=pair_input)
    given = {"width": 8, "activation": "relu", "dropout_p": 0.1} | {name: value}
    dropout_p = given.pop("dropout_p")
    with pytest.raises(ValueError, match=f"{name} must be .*found {value!r}"):
        MultiTaskHeads(HIDDEN, {"nli": nli}, MlpConfig(**given), dropout_p)


def test_heads_have_the_recipes_shapes():
    heads = MultiTaskHeads(HIDDEN, paper_tasks(), MlpConfig(48), 0.1)
    assert isinstance(heads.get_submodule("task-sst"), LinearHead)
    pair = heads.get_submodule("mlp-pair").mlp
    assert pair.dense.weight.shape == (48, 2 * HIDDEN) and pair.out_proj.weight.shape == (2, 48)
    lstm = MultiTaskHeads(HIDDEN, paper_tasks("lstm"), MlpConfig(48), 0.1).get_submodule("task-sst")
    assert isinstance(lstm, LstmHead) and lstm.lstm.bidirectional
    assert lstm.dense.weight.shape == (48, 2 * HIDDEN) and lstm.out_proj.weight.shape == (5, 48)
