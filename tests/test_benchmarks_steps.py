"""The benchmark of whole steps: it runs, tells what is wrong, and counts kernels rightly."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from transformers import AttentionInterface

from benchmarks import step_batches, step_contenders, steps
from benchmarks.eager_twin import VARLEN, varlen_attention
from benchmarks.step_batches import TASKS, TOKENS, finetune_batch, pretrain_batch, random_labels, task_counts
from benchmarks.step_contenders import PackedHeads, stages_of
from mtfast.recipes import PAPER_TASKS

CPU = torch.device("cpu")
TINY = ["--layers", "1", "--hidden", "64", "--heads", "2", "--examples", "3"]
QUICK = ["--device", "cpu", "--threads", "1", "--budget", "0", "--no-compile"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few and short batches, one thread."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(steps, "BATCHES", 2)
    draw = step_batches.draw_examples
    monkeypatch.setattr(step_batches, "draw_examples", lambda *args: [min(n, 20) for n in draw(*args)])
    steps.say_once.cache_clear()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *arguments):
    """The exit status, and the rows by stage and variant."""
    status = steps.main([*TINY, *QUICK, "--results", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    return status, {(row["case"].split()[0], row["variant"]): row for row in rows}


def test_a_rehearsal_leaves_rows_of_all_stages(tmp_path):
    status, rows = run(tmp_path)
    assert status == 0
    assert set(rows) == {
        *(("pretrain", name) for name in ("mtfast", "eager", "unpadded")),
        *(("heads", name) for name in ("mtfast", "eager")),
        *(("finetune", name) for name in ("mtfast", "eager", "unpadded")),
    }
    for (stage, variant), row in rows.items():
        assert float(row["median_us"]) > 0 and float(row["peak_mib"]) > 0 and row["wrong"] == ""
        assert variant != "eager" or float(row["ratio_to_baseline"]) == 1
        assert row["case"].startswith(f"{stage} 3 examples")
        assert stage == "heads" or "real tokens" in row["case"]


def tiny_contenders(stage):
    """One batch of a stage, and its contenders but the compiled one."""
    found = stages_of(layers=2, hidden=64, heads=2)[stage]
    torch.manual_seed(0)
    makers = found.contenders(CPU)
    return found.batch(5, 0, CPU), {name: make() for name, make in makers.items() if name != "compile"}


@pytest.mark.parametrize("stage", steps.STAGES)
def test_all_have_the_losses_of_mtfast_and_lower_them(stage):
    batch, contenders = tiny_contenders(stage)
    ours = losses_of(contenders["mtfast"], batch)
    assert all(loss > 0.1 for loss in ours.values())
    for contender in contenders.values():
        losses = losses_of(contender, batch)
        assert losses == pytest.approx(ours, rel=1e-5)
        contender.learning_rate = 1e-2
        step = contender.training()
        for _ in range(2):
            step(batch)
        assert sum(losses_of(contender, batch).values()) < sum(losses.values())


def losses_of(contender, batch):
    return steps.losses_of(contender, batch, CPU)[torch.float32]


def test_batches_are_what_their_stage_reads():
    batch = pretrain_batch(4, 1, CPU)
    lengths = batch.packed.cu_seqlens.diff()[:4]
    assert batch.padded.inputs["attention_mask"].sum(1).tolist() == lengths.tolist()
    assert (batch.row.inputs["input_ids"] == TOKENS.sep).sum() == 8  # [CLS] A [SEP] B [SEP]
    assert (batch.row.masked[1] != -100).sum() == batch.packed.masked
    assert batch.packed.input_ids.numel() == batch.packed.tokens == batch.row.special.numel()
    assert task_counts(3) == {"sst": 1, "quora": 1, "sts": 1}
    assert task_counts(160) == {"sst": 9, "quora": 145, "sts": 6}
    shapes = {tuple(finetune_batch(9, seed, CPU).row["input_ids"].shape) for seed in range(4)}
    assert len(shapes) > 1


def test_tasks_are_those_of_the_paper():
    """But for what only readers of data and reports ask for; and their labels are all that there are."""
    assert list(TASKS) == list(PAPER_TASKS)
    for name, task in TASKS.items():
        assert task == replace(PAPER_TASKS[name], aliases={}, title=None)
    labels = random_labels(dict.fromkeys(TASKS, 500), 0)
    found = {name: (sorted(set(values.tolist())), str(values.dtype)) for name, values in labels.items()}
    assert found == {
        "sst": ([0, 1, 2, 3, 4], "int64"),
        "quora": ([0, 1], "float32"),
        "sts": ([0, 1, 2, 3, 4, 5], "float32"),
    }


@pytest.fixture
def other_attention():
    """Puts another attention in the place of the unpadded contender's."""
    yield lambda attention: AttentionInterface.register(VARLEN, attention)
    AttentionInterface.register(VARLEN, varlen_attention)


def test_a_wrong_contender_is_marked_and_still_timed(tmp_path, other_attention, capsys):
    def across_sequences(*tensors, cu_seq_lens_q, **options):
        return varlen_attention(*tensors, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **options)

    other_attention(across_sequences)
    status, rows = run(tmp_path, "--stages", "finetune")
    assert status == 1
    assert {variant for (_, variant), row in rows.items() if row["wrong"]} == {"unpadded"}
    marked = rows["finetune", "unpadded"]
    assert "instead of" in marked["wrong"] and "float32" in marked["wrong"]
    assert float(marked["median_us"]) > 0
    assert f"WRONG: {marked['wrong']}" in capsys.readouterr().out


def test_a_contender_that_fails_is_left_out(tmp_path, other_attention, capsys):
    def fails(*tensors, **options):
        raise RuntimeError("no kernel\nfor this GPU")

    other_attention(fails)
    status, rows = run(tmp_path, "--stages", "finetune")
    assert status == 0 and {variant for _, variant in rows} == {"mtfast", "eager"}
    assert "left out: finetune, unpadded: RuntimeError: no kernel for this GPU" in capsys.readouterr().out


class Replaying:
    """Stands in for CUDA graphs: recording does no work, replaying calls the function again."""

    recorded = 0

    def run(self, function):
        return function()

    def record(self, function):
        type(self).recorded += 1
        result = torch.zeros(())
        return lambda: result.copy_(function()), result


def test_a_captured_step_trains_as_the_step_does(monkeypatch):
    monkeypatch.setattr(step_contenders, "CudaRecorder", Replaying)
    stage = stages_of(layers=1, hidden=64, heads=2)["heads"]
    make = stage.contenders(CPU)["mtfast"]
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        contender = make(captured=captured)
        assert isinstance(contender, PackedHeads)
        step = contender.training()
        for seed in range(4):
            step(stage.batch(30, seed, CPU))
        ends.append(contender.model.state_dict())
    assert Replaying.recorded == 1
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())


class Waiting:
    """A contender whose step waits for the GPU once it is set up."""

    def __init__(self, captured):
        self.captured, self.steps = captured, 0

    def step(self, batch):
        self.steps += 1
        if self.steps > 1:
            raise RuntimeError("called a synchronizing CUDA operation")


def test_a_step_that_waits_is_named(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert steps.waits(Waiting(captured=False), [None]).startswith("synchronises: test_benchmarks_steps.py:")
    with pytest.raises(RuntimeError, match="synchronizing"):
        steps.waits(Waiting(captured=True), [None])
    assert modes == ["error", "default"] * 2


def event(begin, duration, kind="kernel"):
    return {"ph": "X", "cat": kind, "name": kind, "ts": begin, "dur": duration}


def test_idle_share_of_known_intervals():
    assert steps.idle_share([(5.0, 9.0)]) == 0
    assert steps.idle_share([(0, 2), (6, 8)]) == 0.5
    assert steps.idle_share([(6, 8), (0, 2)]) == 0.5  # streams are not in order
    assert steps.idle_share([(0, 6), (1, 2), (4, 8), (9, 10)]) == pytest.approx(0.1)
    assert steps.idle_share([(10, 12), (12, 14), (18, 20)]) == pytest.approx(0.4)


def test_kernels_are_counted_in_a_trace(monkeypatch):
    events = [
        {"ph": "M", "name": "process_name"},
        event(0, 100, "gpu_user_annotation"),
        event(1, 1, "cuda_runtime"),
        event(10, 5),
        event(12, 8),
        event(20, 4, "gpu_memcpy"),
        event(30, 10),
    ]
    monkeypatch.setattr(steps, "trace_of", lambda calls, device: {"traceEvents": events[: len(calls) * 7]})
    columns = steps.kernel_columns({"mtfast": [print, print], "other": []}, torch.device("cuda"))
    assert columns == {"kernels": {"mtfast": 1.5}, "idle_share": {"mtfast": pytest.approx(10 / 30)}}


def test_without_transformers_steps_are_left_out():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['benchmarks', 'steps']; "
        "from benchmarks.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "left out: steps need transformers, which is not installed\n"
