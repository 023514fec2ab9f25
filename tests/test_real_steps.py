"""What benchmarks of whole steps on real data consist of: grouped batches, turns, counts, another commit."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import baseline, baseline_child, data_pipeline, report, step_batches, steps
from benchmarks.op_count import count_ops
from benchmarks.pretrain_step import MaskedBefore, MaskedLogits
from benchmarks.real_batches import grouped_rows, spread
from benchmarks.real_steps import entered, take_turns
from benchmarks.step_batches import finetune_batch, pretrain_batch
from benchmarks.step_contenders import PackedFinetune, PackedPretrain, PaddedFinetune, stages_of
from mtfast.data.demo import write_demo_corpus
from mtfast.data.reviews import read_reviews
from mtfast.models.checkpoint import load_tokenizer
from mtfast.ops import mask_tokens

CPU = torch.device("cpu")


def test_grouped_rows_by_hand():
    lengths = np.array([5, 9, 2, 7, 7, 1, 3, 8])
    steps_ = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])]
    found = grouped_rows(steps_, lengths, megabatch=2)
    # The first two steps' lengths are 5 9 2 | 7 7: sorted 9 7 7 | 5 2. The third is a megabatch by itself.
    assert [rows.tolist() for rows in found] == [[1, 3, 4], [0, 2], [7, 6, 5]]
    assert [rows.tolist() for rows in grouped_rows(steps_[:1], lengths)] == [[1, 0, 2]]


def test_grouped_steps_are_from_all_heights():
    assert spread(turns=7, of=50, warm_up=2) == [5, 5, 5, 15, 25, 35, 45]
    assert spread(turns=52, of=50, warm_up=2)[2:] == list(range(50))
    assert spread(turns=3, of=2, warm_up=1) == [0, 0, 1]


def test_turns_go_there_and_back():
    made = []

    def turn_of(name):
        return lambda index: made.append((index, name)) or float(index)

    seconds = take_turns({name: turn_of(name) for name in "abc"}, 4)
    assert [name for _, name in made] == list("abccbaabccba")
    assert seconds == {name: [2.0, 3.0] for name in "abc"}  # without the two turns of the warm-up


def contenders(stage, *kinds):
    """A tiny contender of each kind, all from the same weights."""
    torch.manual_seed(0)
    source = stages_of(layers=1, hidden=64, heads=2)[stage].contenders(CPU)["mtfast"].args[0]
    return [kind(source) for kind in kinds]


def test_masked_logits_are_the_same_loss(monkeypatch):
    monkeypatch.setattr(step_batches, "draw_examples", lambda *arguments: [20, 7, 13])
    batch = pretrain_batch(3, 0, CPU)
    ours, *others = contenders("pretrain", PackedPretrain, MaskedBefore, MaskedLogits)
    expected = steps.losses_of(ours, batch, CPU)
    for other in others:
        entrant = entered("other", other, [batch], batch, dict(expected), CPU)
        assert entrant.turn(0) > 0 and entrant.kernels() > 0


def test_a_contender_with_other_losses_does_not_enter():
    batch = finetune_batch(5, 0, CPU)
    ours, other = contenders("finetune", PackedFinetune, PaddedFinetune)
    other.model.pair_out.bias.data += 0.01
    with pytest.raises(SystemExit, match="eager does not compute what mtfast does: quora loss"):
        entered("eager", other, [batch], batch, steps.losses_of(ours, batch, CPU), CPU)


def test_ops_by_hand():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)

    def step():
        masked = mask_tokens(torch.arange(8), special_ids=[0], mask_token_id=1, vocab_size=9, seed=1)
        (a @ b).view(-1)[2:].t().sum().backward()
        return torch.empty(4), masked

    # Backward: the gradient of the sum is one, expanded; that of the slice fills what is left with zeros.
    assert count_ops(step) == Counter(
        {"mtfast.mask_tokens": 1, "aten.mm": 3, "aten.sum": 1, "aten.ones_like": 1, "aten.slice_backward": 1}
        | {"aten.arange": 1}
    )


def test_the_child_answers_the_seconds_of_each_turn():
    made, answers = [], io.StringIO()
    baseline_child.serve(made.append, ["first", "second"], CPU, io.StringIO("1\n0\n1\n"), answers)
    assert made == ["second", "first", "second"]
    assert (
        all(float(line) > 0 for line in answers.getvalue().splitlines())
        and answers.getvalue().count("\n") == 3
    )


CHILD = """
import sys
print('{"losses": {"sst": 1.5}, "package": "/there"}', flush=True)
for line in sys.stdin:
    print(int(line) / 2, flush=True)
    if line == "9\\n":
        sys.exit(3)
"""


def test_a_child_makes_the_steps_it_is_told():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-S", "-c", CHILD], **pipes) as process:
        child = baseline.Child(process)
        assert child.losses == {"sst": 1.5} and child.package == Path("/there")
        assert [child.turn(index) for index in (3, 0, 9)] == [1.5, 0.0, 4.5]
        assert process.wait() == 3
        with pytest.raises(SystemExit, match="ended with status 3"):
            child.turn(1)


def test_a_baseline_is_built_and_removed(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(baseline, "_run", lambda command, directory: commands.append((command, directory)))
    monkeypatch.setattr(baseline, "git", lambda *arguments: "" if "none" in arguments[-1] else "hash")
    with baseline.built("abc") as found:
        assert found.commit == "abc"
        sources = found.path.parent / "sources"
        assert [path.name for path in found.path.iterdir()] == ["mtfast"]
        assert (found.path / "mtfast").readlink() == sources / "mtfast"
    assert not found.path.exists()
    (add, _), (build, where), (remove, _) = commands
    assert add[-2:] == [str(sources), "abc"] and remove[-1] == str(sources)
    assert build[1:] == ["setup.py", "build_ext", "--inplace"] and where == sources
    with pytest.raises(SystemExit, match="--baseline none: git knows no such commit"), baseline.built("none"):
        pass


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Few reviews, and their tokenizer."""
    corpus = write_demo_corpus(tmp_path_factory.mktemp("demo"))
    data_pipeline.datasets.disable_progress_bars()
    return read_reviews(corpus.reviews, 20), load_tokenizer(str(corpus.bert))


def test_all_pipelines_make_the_same_batches(pipelines):
    rows = data_pipeline.compare(*pipelines, max_length=48, budget_s=0)
    assert {row["variant"] for row in rows} == {
        "mtfast",
        "mtfast, prefetch",
        "datasets.map",
        "datasets.map, collator",
    }
    assert all(row["examples_per_s"] > 0 and "samples of at most 48" in row["case"] for row in rows)


@pytest.mark.parametrize("name", ["datasets.map", "datasets.map, collator"])
def test_a_pipeline_with_other_batches_is_refused(pipelines, monkeypatch, name):
    ours = data_pipeline.OurPipeline(*pipelines, max_length=48)
    theirs = data_pipeline.TheirPipeline(
        ours.samples(), ours.plan(ours.samples()), ours.tokenizer, ours.masking
    )
    batches = {"datasets.map": theirs.batches}.get(name, theirs.collated)
    data_pipeline.check({"mtfast": ours.batches, name: batches})
    joined = theirs._joined

    def other(*arguments):
        found = joined(*arguments)
        found["token_type_ids"][-1][1] = 1
        return found

    monkeypatch.setattr(theirs, "_joined", other)
    with pytest.raises(SystemExit, match=f"{name} does not make mtfast's batches"):
        data_pipeline.check({"mtfast": ours.batches, name: batches})


def test_tables_have_rates_and_shares():
    row = {"ratio_to_baseline": "4.1", "median_us": "2500000", "peak_mib": ""}
    assert report._cell(row | {"examples_per_s": "93.66"}) == "93.7/s (4.10x)"
    assert report._cell(row | {"share_of_step": "0.313"}) == "2.50 s (31.3%)"
    assert report._cell(row) == "2.50 s (4.10x)"
