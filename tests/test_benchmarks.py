"""The benchmarks of ops: what is measured, results that add up, a benchmark that ends in time."""

import argparse
import csv
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention_peers as peers
from benchmarks import common, concat_mlp, mask_tokens, packed_attention, report

CPU = torch.device("cpu")


def test_peak_memory_of_known_allocations():
    def call():
        large = torch.empty(2**20, dtype=torch.float64)  # 8 MiB
        result = large[: 2**19].clone()  # 4 MiB
        del large
        return result

    assert common.peak_mib(call, CPU) == 12.0


def test_rows_have_rates_and_shares():
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
    )
    assert [row["ratio_to_baseline"] for row in rows] == [2.0, 1.0]
    assert [row["share_of_copy"] for row in rows] == [0.25, 0.125]
    assert rows[0]["peak_mib"] == 0.01235 and "peak_mib" not in rows[1]


OPERATIONS = [
    (mask_tokens, ["--most-tokens", "512", "--no-compile"], {"eager", "bernoulli", "exact"}),
    (concat_mlp, ["--batches", "4", "--dtypes", "bfloat16", "--no-compile"], {"eager", "mtfast", "products"}),
    (
        packed_attention,
        ["--distributions", "sst", "--tokens", "60", "--dtypes", "float32"],
        {"mtfast", *(kind.name for kind in peers.PEERS["cpu"])},
    ),
]


@pytest.mark.parametrize(
    ("benchmark", "arguments", "variants"), OPERATIONS, ids=lambda x: getattr(x, "__name__", "")
)
def test_benchmarks_of_ops_leave_their_rows(benchmark, arguments, variants, tmp_path):
    common_arguments = ["--device", "cpu", "--budget", "0", "--threads", str(torch.get_num_threads())]
    assert benchmark.main([*arguments, *common_arguments, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    cases = {row["case"] for row in rows}
    assert {(row["case"], row["variant"]) for row in rows} == {(c, v) for c in cases for v in variants}
    for row in rows:
        assert float(row["median_us"]) > 0 and float(row["peak_mib"]) > 0 and row["commit"]
        assert float(row["gb_per_s" if row["share_of_copy"] else "tflop_per_s"]) > 0


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    wrong = lambda *operands, **options: 1.05 * concat_mlp.concat_mlp_ref(*operands, **options)  # noqa: E731
    monkeypatch.setattr(concat_mlp, "concat_mlp", wrong)
    concat_mlp.check.cache_clear()
    arguments = ["--device", "cpu", "--batches", "4", "--dtypes", "float32", "--no-compile"]
    assert concat_mlp.main([*arguments, "--results", str(tmp_path)]) == 1
    assert "y is wrong by" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    concat_mlp.check.cache_clear()


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


def test_files_with_fewer_columns_stay_readable(tmp_path):
    path = common.results_path(CPU, tmp_path)
    older = "benchmark,case,variant,median_us,ratio_to_baseline,device,driver,threads,torch,commit,date\n"
    path.write_text(older + "op,a,x,1500,2.0,AMD,,2,2.13.0,abc1234,2026-01-01\n")
    common.write_results([row("b", "x", 3)], CPU, tmp_path)
    assert medians(path) == {("op", "a", "x"): 1500, ("op", "b", "x"): 3}
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
    cases = ("quora 4096 p=0.1 fwd", "quora 4096 p=0.1 fwd+bwd", "sst 4096 p=0.1 fwd")
    common.write_results([row(case, "x", 3) for case in cases], CPU, tmp_path)
    text = "<!-- results: op quora fwd -->\nold\n<!-- end -->"
    found = report.render(text, tmp_path)
    assert [case for case in cases if f"| {case} |" in found] == ["quora 4096 p=0.1 fwd"]
    assert report.render(found, tmp_path) == found


class Options(argparse.Namespace):
    def __init__(self, results, seconds=None):
        super().__init__(device=CPU, results=results, seconds=seconds)


def test_a_benchmark_out_of_time_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def takes(name, seconds):
        clock[0] += seconds
        return [row(name, "x", 1)]

    cases = [
        common.Case(name, partial(takes, name, s)) for name, s in zip("abcd", (14, 8, 1, 1), strict=True)
    ]
    # After a and b 22 s are gone, and another case like a would end after 36.
    assert common.run_cases(cases, Options(tmp_path, seconds=35)) == 0
    assert set(medians(common.results_path(CPU, tmp_path))) == {("op", "a", "x"), ("op", "b", "x")}
    assert "out of time: 2 of 4 cases left out, from 'c' on" in capsys.readouterr().out


def test_a_case_that_fails_takes_no_other_with_it(tmp_path, capsys):
    def fails():
        assert medians(common.results_path(CPU, tmp_path)) == {("op", "a", "x"): 1}, (
            "written before the next case"
        )
        raise RuntimeError("no such kernel")

    cases = [
        common.Case("a", lambda: [row("a", "x", 1)]),
        common.Case("b", fails),
        common.Case("c", lambda: [row("c", "x", 2)]),
    ]
    assert common.run_cases(cases, Options(tmp_path)) == 1
    assert set(medians(common.results_path(CPU, tmp_path))) == {("op", "a", "x"), ("op", "c", "x")}
    output = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in output and "failed: b" in output


def test_variants_that_do_not_run_are_left_out(capsys):
    def fails():
        raise RuntimeError("Cannot find a working\ntriton installation")

    assert list(common.running({"eager": lambda: None, "compile": fails})) == ["eager"]
    assert "left out: compile: RuntimeError: Cannot find a working triton" in capsys.readouterr().out
