"""The benchmarks of ops: what is measured, results that add up, a benchmark that ends in time."""

import argparse
import csv
from functools import partial
from types import SimpleNamespace

import apex_stand_in
import pytest
import torch

from benchmarks import attention_peers as peers
from benchmarks import (
    bias_gelu,
    cases,
    common,
    concat_mlp,
    dropout_add_layer_norm,
    mask_tokens,
    packed_attention,
    report,
    timing,
)

CPU = torch.device("cpu")


def test_rows_have_rates_and_shares(capsys):
    timings = {
        name: common.Timing(seconds, seconds, seconds, 5) for name, seconds in (("a", 0.5), ("b", 1.0))
    }
    rows = common.rows_of(
        "op",
        "case",
        timings,
        "b",
        gb_per_s={"a": 3.0, "b": 1.5},
        copy_gb_per_s=12.0,
        peak_mib={"a": 0.012345},
        kernels={"a": 3},
        idle_share={"a": 0.25},
        wrong={"a": "", "b": "out off by 0.31 of its norm"},
    )
    assert [row["ratio_to_baseline"] for row in rows] == [2.0, 1.0]
    assert [row["share_of_copy"] for row in rows] == [0.25, 0.125]
    assert rows[0]["peak_mib"] == 0.01235 and "peak_mib" not in rows[1]
    assert (rows[0]["kernels"], rows[0]["idle_share"], rows[0]["wrong"]) == (3, 0.25, "")
    common.print_rows(rows)
    first, second = capsys.readouterr().out.splitlines()
    assert "3.0 kernels" in first and "0.25 idle" in first and "WRONG" not in first
    assert "WRONG: out off by 0.31 of its norm" in second


SMALL = {  # each benchmark cut down to a few cases
    bias_gelu: ["--rows", "40", "33", "--columns", "64", "--dtypes", "bfloat16", "--no-compile"],
    mask_tokens: ["--most-tokens", "8192", "--no-compile"],
    concat_mlp: ["--batches", "4", "--hidden", "64", "--dtypes", "bfloat16", "--no-compile"],
    dropout_add_layer_norm: ["--rows", "4", "8", "--hidden", "64", "--dtypes", "bfloat16", "--no-compile"],
    packed_attention: ["--distributions", "sst", "--tokens", "60", "--dtypes", "float32"],
}
VARIANTS = {
    bias_gelu: {"eager", "mtfast"},
    mask_tokens: {"eager", "bernoulli", "exact"},
    concat_mlp: {"eager", "mtfast", "products"},
    dropout_add_layer_norm: {"eager", "mtfast"},
    packed_attention: {"mtfast", *(kind.name for kind in peers.PEERS["cpu"])},
}
each_op = pytest.mark.parametrize("benchmark", SMALL, ids=lambda module: module.__name__.split(".")[-1])


@pytest.fixture(autouse=True)
def forget():
    """What one test has found out or told does not hold for the next; all draw the same."""
    torch.manual_seed(0)
    yield
    for module in (bias_gelu, concat_mlp, dropout_add_layer_norm):
        module.difference.cache_clear()
    packed_attention.wrong_result.cache_clear()
    timing.say_once.cache_clear()


def run(benchmark, results, *more):
    """The exit status of the small benchmark and its rows."""
    arguments = ["--device", "cpu", "--budget", "0", "--threads", str(torch.get_num_threads()), *more]
    status = benchmark.main([*SMALL[benchmark], *arguments, "--results", str(results)])
    return status, [row for path in results.glob("*.csv") for row in csv.DictReader(path.open())]


@each_op
def test_benchmarks_of_ops_leave_their_rows(benchmark, tmp_path):
    status, rows = run(benchmark, tmp_path)
    assert status == 0
    names = {row["case"] for row in rows}
    assert {(row["case"], row["variant"]) for row in rows} == {
        (case, variant) for case in names for variant in VARIANTS[benchmark]
    }
    for row in rows:
        assert float(row["median_us"]) > 0 and float(row["peak_mib"]) > 0 and row["commit"]
        assert float(row["gb_per_s" if row["share_of_copy"] else "tflop_per_s"]) > 0
        assert row["wrong"] == row["kernels"] == row["idle_share"] == ""


CONTENDED = {  # a case of a benchmark with apex, and options without dropout, which apex draws otherwise
    concat_mlp: (concat_mlp.Problem("full", 5, 8, torch.float32), {"activation": "relu", "dropout_p": 0.0}),
    dropout_add_layer_norm: (
        dropout_add_layer_norm.Problem("full", 5, 8, torch.float32),
        {"dropout_p": 0.0},
    ),
}


@pytest.mark.parametrize("benchmark", CONTENDED, ids=lambda module: module.__name__.split(".")[-1])
def test_apex_is_a_contender_on_a_gpu_where_it_is_installed(benchmark, monkeypatch):
    problem, options = CONTENDED[benchmark]
    size = (problem.hidden,) if benchmark is concat_mlp else ()
    gpu = torch.device("cuda")
    assert "apex" not in benchmark.functions_of(*size, gpu, False)
    apex_stand_in.install(monkeypatch)
    assert "apex" not in benchmark.functions_of(*size, CPU, False)
    functions = benchmark.functions_of(*size, gpu, False)
    # No relu is at work on what is positive: apex has another behind the output.
    operands = [x.detach().abs().requires_grad_() for x in benchmark.operands_of(problem, CPU)]
    eager, apex = (function(*operands, **options) for function in (functions["eager"], functions["apex"]))
    torch.testing.assert_close(apex, eager)
    dy = torch.randn(eager.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, operands, dy) for y in (apex, eager)))
    dropped = functions["apex"](*operands, **{**options, "dropout_p": 0.5})
    assert torch.equal(dropped, apex) == (benchmark is concat_mlp)  # apex's MLP has no dropout


def test_what_training_does_comes_first(monkeypatch):
    names = []
    for module in (concat_mlp, mask_tokens):
        monkeypatch.setattr(module, "run_cases", lambda found, options: names.extend(c.name for c in found))
    concat_mlp.main([])
    assert names[:2] == ["heads 2048 x 768 bfloat16", "full 2048 x 768 bfloat16"]
    assert len(set(names)) == len(names) == 3 * 3 * 2 * 2
    names.clear()
    monkeypatch.setattr(mask_tokens, "copy_bandwidth", lambda device: 1.0)
    mask_tokens.main([])
    assert names[:2] == ["16 x 512 int64", "2048 x 128 int64"]
    assert len(set(names)) == len(names) == 6


def spoil_concat_mlp(monkeypatch):
    right = concat_mlp.concat_mlp
    monkeypatch.setattr(concat_mlp, "concat_mlp", lambda *x, **options: 1.5 * right(*x, **options))


def spoil_bias_gelu(monkeypatch):
    right = bias_gelu.bias_gelu
    monkeypatch.setattr(bias_gelu, "bias_gelu", lambda *x: 1.5 * right(*x))


def spoil_dropout_add_layer_norm(monkeypatch):
    module, right = dropout_add_layer_norm, dropout_add_layer_norm.dropout_add_layer_norm
    monkeypatch.setattr(module, "dropout_add_layer_norm", lambda *x, **options: 1.5 * right(*x, **options))


def spoil_packed_attention(monkeypatch):
    right = peers.packed_attention_qkv
    monkeypatch.setattr(peers, "packed_attention_qkv", lambda *x, **options: 1.5 * right(*x, **options))


def spoil_mask_tokens(monkeypatch):
    def places_of_another_seed(ids, **options):
        return mask_tokens.mask_tokens_ref(ids, **{**options, "seed": 2})

    monkeypatch.setattr(mask_tokens, "mask_tokens", places_of_another_seed)


SPOILED = {
    bias_gelu: (spoil_bias_gelu, {"mtfast"}, "y off by 0."),
    concat_mlp: (spoil_concat_mlp, {"mtfast"}, "y off by 0."),
    dropout_add_layer_norm: (spoil_dropout_add_layer_norm, {"mtfast"}, "y off by 0."),
    packed_attention: (spoil_packed_attention, {"mtfast"}, "out off by 0."),
    mask_tokens: (spoil_mask_tokens, {"bernoulli", "exact"}, "are not the reference's"),
}


@each_op
def test_a_wrong_result_is_marked_in_its_rows(benchmark, tmp_path, monkeypatch, capsys):
    spoil, names, reason = SPOILED[benchmark]
    spoil(monkeypatch)
    # As if these were captured: a graph's row is that of the variant it is of.
    monkeypatch.setattr(
        benchmark, "graphs", lambda variants, device: {timing.graph_of(n): v for n, v in variants.items()}
    )
    status, rows = run(benchmark, tmp_path)
    output = capsys.readouterr().out
    assert status == 1
    assert {row["variant"].removesuffix(", graph") for row in rows} == VARIANTS[benchmark]
    assert {row["variant"] for row in rows if "graph" in row["variant"]} >= {f"{n}, graph" for n in names}
    for row in rows:
        assert float(row["median_us"]) > 0
        if row["variant"].removesuffix(", graph") in names:
            assert reason in row["wrong"]
            assert f"wrong: {row['case']}, {row['variant']}: {row['wrong']}\n" in output
        else:
            assert row["wrong"] == ""
    table = report.render(f"<!-- results: {rows[0]['benchmark']} -->\n<!-- end -->", tmp_path)
    lines = [line.split(" | ") for line in table.split("\n") if line.startswith("| ")]
    for name, cell in zip(lines[0], lines[2], strict=True):
        assert (cell.strip(" |") == "wrong") == (name.strip(" |").removesuffix(", graph") in names)


@each_op
def test_every_size_is_captured(benchmark, tmp_path, monkeypatch):
    captured = []
    monkeypatch.setattr(benchmark, "graphs", lambda variants, device: captured.append(set(variants)) or {})
    _, rows = run(benchmark, tmp_path)
    wanted = {"mtfast"} if benchmark is packed_attention else VARIANTS[benchmark]
    assert captured == [wanted] * len({row["case"] for row in rows})


def test_a_check_that_cannot_be_made_fails_the_case(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(concat_mlp, "difference", fails)
    assert run(concat_mlp, tmp_path) == (1, [])
    assert "failed: heads 4 x 64 bfloat16, full" in capsys.readouterr().out


def test_a_peer_that_masks_something_else_is_left_out(tmp_path, monkeypatch, capsys):
    def masks_all(inputs, special):
        return inputs, inputs.clone()

    monkeypatch.setattr(mask_tokens, "eager_masking", masks_all)
    status, rows = run(mask_tokens, tmp_path)
    assert status == 0 and {row["variant"] for row in rows} == {"bernoulli", "exact"}
    assert "left out: eager: 1.0" in capsys.readouterr().out


def row(case, variant, median, benchmark="op"):
    times = dict.fromkeys(("median_us", "p20_us", "p80_us"), median)
    return {"benchmark": benchmark, "case": case, "variant": variant, "ratio_to_baseline": 1.0, **times}


def medians(path):
    return {
        (r["benchmark"], r["case"], r["variant"]): float(r["median_us"]) for r in csv.DictReader(path.open())
    }


def test_partial_runs_add_up(tmp_path):
    path = common.write_results([row("a", "x", 1), row("a", "y", 2), row("b", "x", 3)], CPU, tmp_path)
    common.write_results([row("a", "x", 4), row("c", "x", 5), row("a", "x", 6, "other")], CPU, tmp_path)
    assert medians(path) == {
        ("op", "a", "x"): 4,
        ("op", "a", "y"): 2,
        ("op", "b", "x"): 3,
        ("op", "c", "x"): 5,
        ("other", "a", "x"): 6,
    }


def test_what_a_visit_to_a_gpu_leaves_beside_the_results_is_no_table(tmp_path):
    common.write_results([row("a", "x", 1)], CPU, tmp_path)
    tables = "<!-- results: op -->\n<!-- end -->\n<!-- results: runs -->\n<!-- end -->"
    alone = report.render(tables, tmp_path)
    (tmp_path / "ncu.csv").write_text('"ID","Kernel Name"\n"0","exact"\n')
    (tmp_path / "visit-1.json").write_text('{"steps": []}')
    assert report.render(tables, tmp_path) == alone and "not measured" in alone


def test_files_with_fewer_columns_stay_readable(tmp_path):
    path = common.results_path(CPU, tmp_path)
    older = "benchmark,case,variant,median_us,ratio_to_baseline,device,driver,threads,torch,commit,date\n"
    path.write_text(older + "op,a,x,1500,2.0,AMD,,2,2.13.0,abc1234,2026-01-01\n")
    assert "| a | 1.50 ms (2.00x) |" in report.render("<!-- results: op -->\n<!-- end -->", tmp_path)
    common.write_results([row("b", "x", 3) | {"kernels": 4, "wrong": "y off, by much"}], CPU, tmp_path)
    assert medians(path) == {("op", "a", "x"): 1500, ("op", "b", "x"): 3}
    found = [(r["kernels"], r["idle_share"], r["wrong"]) for r in csv.DictReader(path.open())]
    assert found == [("", "", ""), ("4", "", "y off, by much")]
    table = report.render("<!-- results: op -->\n<!-- end -->", tmp_path)
    assert "AMD, 2 threads, torch 2.13.0, commit abc1234:\n\n| case | x |" in table
    assert "| a | 1.50 ms (2.00x) |" in table


def test_tables_have_a_line_a_case_and_a_column_a_variant(tmp_path):
    rows = [row(case, variant, 3) for case in ("a 4", "a 16") for variant in ("eager", "mtfast")]
    for other in rows[1::2]:
        other |= {"ratio_to_baseline": 2.5, "peak_mib": 14.25}
    common.write_results(rows[:3], CPU, tmp_path)
    table = report.render("<!-- results: op -->\n<!-- end -->", tmp_path)
    assert table.split("\n")[3:7] == [
        "| case | eager | mtfast |",
        "| --- | --- | --- |",
        "| a 4 | 3.0 us | 3.0 us (2.50x, 14.2 MiB) |",
        "| a 16 | 3.0 us |  |",
    ]


def test_a_section_can_ask_for_some_cases(tmp_path):
    names = ("quora 4096 p=0.1 fwd", "quora 4096 p=0.1 fwd+bwd", "sst 4096 p=0.1 fwd")
    common.write_results([row(name, "x", 3) for name in names], CPU, tmp_path)
    text = "<!-- results: op quora fwd -->\nold\n<!-- end -->"
    found = report.render(text, tmp_path)
    assert [name for name in names if f"| {name} |" in found] == ["quora 4096 p=0.1 fwd"]
    assert report.render(found, tmp_path) == found


class Options(argparse.Namespace):
    def __init__(self, results, seconds=None):
        super().__init__(device=CPU, results=results, seconds=seconds)


def test_a_benchmark_out_of_time_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(cases, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes(name, seconds):
        clock[0] += seconds
        return [row(name, "x", 1)]

    found = [cases.Case(name, partial(takes, name, s)) for name, s in zip("abcd", (14, 8, 1, 1), strict=True)]
    # After a and b 22 s are gone, and another case like a would end after 36.
    assert cases.run_cases(found, Options(tmp_path, seconds=35)) == 0
    assert set(medians(common.results_path(CPU, tmp_path))) == {("op", "a", "x"), ("op", "b", "x")}
    assert "out of time: 2 of 4 cases left out, from 'c' on" in capsys.readouterr().out


def test_a_paused_clock_counts_what_is_outside_once(monkeypatch):
    times = [0.0]
    monkeypatch.setattr(cases, "time", SimpleNamespace(monotonic=lambda: times[0]))
    clock = cases.CaseClock()
    with pytest.raises(ZeroDivisionError), clock.paused():
        times[0] += 1
        with clock.paused():
            times[0] += 2
        times[0] += 4
        _ = 1 / 0
    times[0] += 8
    assert clock.now() == 8


FIRST_CALLS = dict.fromkeys(SMALL, "running") | {packed_attention: "wrong_result"}


@each_op
def test_first_calls_do_not_make_a_case_long(benchmark, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cases, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(mask_tokens, "SHAPES", ((4, 128), (4, 64), (2, 128), (2, 64)))
    first_calls = getattr(benchmark, FIRST_CALLS[benchmark])

    def slowly(*arguments):
        clock[0] += 40
        return first_calls(*arguments)

    monkeypatch.setattr(benchmark, FIRST_CALLS[benchmark], slowly)
    # The third case begins after 80 s and could be done at once; with the 40 s it takes it would be too long.
    _, rows = run(benchmark, tmp_path, "--seconds", "100")
    assert len({row["case"] for row in rows}) == 3


def test_a_case_that_fails_takes_no_other_with_it(tmp_path, capsys):
    def fails():
        assert medians(common.results_path(CPU, tmp_path)) == {("op", "a", "x"): 1}, (
            "written before the next case"
        )
        raise RuntimeError("no such kernel")

    found = [
        cases.Case("a", lambda: [row("a", "x", 1)]),
        cases.Case("b", fails),
        cases.Case("c", lambda: [row("c", "x", 2)]),
    ]
    assert cases.run_cases(found, Options(tmp_path)) == 1
    assert set(medians(common.results_path(CPU, tmp_path))) == {("op", "a", "x"), ("op", "c", "x")}
    output = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in output and "failed: b" in output


INPUTS = {  # what a variant calls, with its inputs first
    bias_gelu: {"mtfast": (bias_gelu, "bias_gelu"), "eager": (bias_gelu, "bias_gelu_ref")},
    concat_mlp: {"mtfast": (concat_mlp, "concat_mlp"), "eager": (concat_mlp, "concat_mlp_ref")},
    dropout_add_layer_norm: {
        "mtfast": (dropout_add_layer_norm, "dropout_add_layer_norm"),
        "eager": (dropout_add_layer_norm, "dropout_add_layer_norm_ref"),
    },
    mask_tokens: {"bernoulli": (mask_tokens, "mask_tokens"), "eager": (mask_tokens, "eager_masking")},
    packed_attention: {"mtfast": (peers, "packed_attention_qkv")},
}


@each_op
def test_what_fits_in_the_l2_has_several_inputs(benchmark, tmp_path, monkeypatch):
    read = []

    def watched(function, tensor, *rest, **options):
        read.append(tensor.data_ptr())
        return function(tensor, *rest, **options)

    for module, name in INPUTS[benchmark].values():
        monkeypatch.setattr(module, name, partial(watched, getattr(module, name)))
    monkeypatch.setattr(benchmark, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(benchmark, "copies", lambda touched, l2: 3 if touched > l2 == 1 else 1)

    def measure(variants, device, budget_s):
        assert {len(calls) for calls in variants.values()} == {3}
        for name in INPUTS[benchmark]:
            read.clear()
            for _ in range(2):
                for call in variants[name]:
                    call()
            assert len(set(read)) == 3, name
        return dict.fromkeys(variants, common.Timing(1.0, 1.0, 1.0, 1))

    monkeypatch.setattr(benchmark, "measure", measure)
    status, rows = run(benchmark, tmp_path)
    assert status == 0 and rows
