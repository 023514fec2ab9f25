"""What a process of a run dies of: told once, by whom it concerns, and all leave alike."""

import socket

import dying
import pytest
from processes import Ranks

HOST = socket.gethostname()
WHERE = f"rank 1 on {HOST}: "
NOT_THE_SAME = f"is not the same on rank 1 on {HOST} as on rank 0 on {HOST}"


@pytest.mark.parametrize(
    ("cause", "statuses", "told"),
    [
        (dying.bad_data_on_rank_1, (1, 2), f"{WHERE}mtfast: a.csv:3: bad"),
        (dying.bad_data, (2, 2), "mtfast: a.csv:3: bad"),
        (dying.no_file_for_rank_0, (1, 1), "FileNotFoundError: [Errno 2]"),
        (dying.a_bug_on_rank_1, (1, 1), f"{WHERE}Traceback"),
        (dying.a_bug_on_rank_0, (1, 1), "ZeroDivisionError"),
        (dying.no_share_of_a_cache, (2, 2), f"{WHERE}division by zero"),
        (dying.a_run_directory_that_is_not_shared, (2, 2), f"mtfast: rank 1 on {HOST} does not see "),
        (dying.other_options, (2, 2), f"mtfast: the configuration {NOT_THE_SAME}"),
        (dying.other_weights, (2, 2), f"mtfast: the weights of a new model {NOT_THE_SAME}"),
        (dying.other_data, (2, 2), f"mtfast: data (sst train) {NOT_THE_SAME}"),
    ],
)
def test_a_reason_is_told_once(cause, statuses, told, tmp_path):
    for rank in range(2):
        data = tmp_path / f"host-{rank}" / "data"
        data.mkdir(parents=True)
        (data / "train.csv").write_text(f"sentence,label\na b c,{rank}\n")
    ranks = Ranks(dying.die, cause, output=tmp_path, world_size=2, cwd=tmp_path)
    found = tuple(ranks.wait())
    said = "".join(of(rank) for rank in range(2) for of in (ranks.stdout, ranks.stderr))
    assert found == statuses, said
    assert said.count(told) == 1, said
    assert said.count("Traceback (") == (1 in statuses and 2 not in statuses), said
