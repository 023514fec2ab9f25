"""A run's model for the hub: the folder, its card, and what is said where the hub does not take it."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bert_twins import small_config
from huggingface_hub import ModelCard
from recorded_runs import FOUR_TASKS, add_to_summary, write_run
from small_tokenizer import small_tokenizer
from transformers import AutoModel

from mtfast import push as module
from mtfast.config import ConfigError, DataConfig, ModelConfig, RunConfig, to_dict
from mtfast.files import to_yaml
from mtfast.models.checkpoint import load_tasks, save_pretrained
from mtfast.models.multitask import build_multitask_model
from mtfast.push import PushError, push
from mtfast.tasks import MlpConfig, Task

TASKS = FOUR_TASKS | {
    "imdb": replace(FOUR_TASKS["imdb"], source="stanfordnlp/imdb"),
    "sts": Task(kind="regression", text=("a", "b"), label="score", low=0, high=5, head="pair", weight=0.5),
}
METRICS = {
    "news_accuracy": 0.91,
    "imdb_accuracy": 0.82,
    "imdb_f1": 0.73,
    "nli_accuracy": 0.64,
    "stars_pearson": 0.55,
    "stars_spearman": 0.46,
    "sts_pearson": 0.37,
    "sts_spearman": 0.28,
    "mean": 0.626,
}


def configuration(directory: Path, **model) -> str:
    config = RunConfig(
        run_dir=str(directory),
        tasks=TASKS,
        model=ModelConfig(**{"checkpoint": str(directory.parent / "bert")} | model),
        data=DataConfig(tasks=str(directory.parent / "data"), reviews=str(directory.parent / "imdb")),
    )
    return to_yaml(to_dict(config))


@pytest.fixture
def plot():
    """For a test that wants the plot, which takes a while to draw."""


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plot" not in request.fixturenames:
        monkeypatch.setattr(module, "plot_of_dev_metrics", lambda _: None)


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of two epochs on this machine, of which the first was the better one."""
    directory = tmp_path / "my-run"
    worse = METRICS | {"mean": 0.5}
    records = [
        {"kind": "eval", "stage": "finetune", "step": 30 * epoch, "epoch": epoch, "metrics": metrics}
        for epoch, metrics in ((1, METRICS), (2, worse))
    ]
    skipped = [{"file": str(tmp_path / "data" / "news.csv"), "line": 3, "reason": "empty text"}]
    account = {"read": 1000, "used": 999, "skipped": skipped, "truncated": 7, "notes": [f"in {tmp_path}"]}
    summary = {
        "checkpoint": str(tmp_path / "bert"),
        "dev": METRICS,
        "data": {"news-train": account},
        "stages": {"finetune": {"steps": 60, "seconds": 3.0}},
        "environment": {
            "mtfast": "0.1.0",
            "torch": "2.10.0",
            "precision": "fp32",
            "ranks": 2,
            "device": "A100",
        },
    }
    write_run(directory, records, summary, configuration(directory))
    tokenizer = small_tokenizer()
    config = small_config(vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model, mlp = build_multitask_model(config, TASKS, MlpConfig(16), 0.1), MlpConfig(16)
    best = directory / "finetune" / "best-mean"
    save_pretrained(best, model.state_dict(), config, tokenizer, tasks=TASKS, mlp=mlp, max_length=40)
    (directory / "finetune" / "result.json").write_text(json.dumps({"summary": {}, "best": {}}))
    return directory


def card_of(run: Path) -> ModelCard:
    return ModelCard.load(push(run, "me/films", upload=False) / "README.md")


def test_the_folder_is_a_model_with_a_card(run, plot):
    folder = push(run, "me/films", upload=False)
    assert folder == run / "hub"
    best = run / "finetune" / "best-mean"
    of_best = {path.relative_to(best) for path in best.rglob("*")}
    of_hub = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {str(path) for path in of_hub - of_best} == {"README.md", "plots", "plots/dev_metrics.png"}
    assert of_best < of_hub
    shown = "![Metrics on dev after each epoch](plots/dev_metrics.png)"
    assert shown in (folder / "README.md").read_text().splitlines()
    assert (folder / "model.safetensors").samefile(best / "model.safetensors")
    assert list(load_tasks(folder)[0]) == list(TASKS)
    expected = AutoModel.from_pretrained(best).state_dict()
    found = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items() if "pooler" not in name)

    (folder / "stale.txt").write_text("of an earlier push")
    before = {path.name for path in run.iterdir()}
    push(run, "me/films", upload=False)
    assert not (folder / "stale.txt").exists() and (folder / "1_Pooling" / "config.json").is_file()
    assert {path.name for path in run.iterdir()} == before


def test_front_matter_has_the_figures_and_their_split(run):
    test = {key: value - 0.1 for key, value in METRICS.items() if key != "imdb_f1"}
    add_to_summary(run, test=test)
    data = card_of(run).data
    wanted = {"language": "en", "library_name": "mtfast", "pipeline_tag": "text-classification"}
    assert wanted.items() <= data.to_dict().items()
    assert "sentence-transformers" in data.tags and data.model_name == "films"
    assert data.base_model is None and data.datasets == ["stanfordnlp/imdb"]
    names = {"pearsonr": "pearson", "spearmanr": "spearman"}
    titles = {task.title or name: name for name, task in TASKS.items()}
    found = {
        (
            x.dataset_split,
            f"{titles[x.dataset_name]}_{names.get(x.metric_type, x.metric_type)}",
        ): x.metric_value
        for x in data.eval_results
    }
    expected = {("dev", key): value for key, value in METRICS.items() if key != "mean"}
    expected |= {("test", key): value for key, value in test.items() if key != "mean"}
    assert found == pytest.approx(expected)
    kinds = {titles[x.dataset_name]: x.task_type for x in data.eval_results}
    assert kinds["sts"] == "sentence-similarity" and set(kinds.values()) == {kinds["sts"], kinds["news"]}
    assert {x.dataset_type for x in data.eval_results} == {"news", "stanfordnlp/imdb", "nli", "stars", "sts"}


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ({"checkpoint": "bert-base-uncased"}, "bert-base-uncased"),
        ({"checkpoint": "google-bert/bert-base-cased"}, "google-bert/bert-base-cased"),
        ({"checkpoint": "bert-base-uncased", "from_scratch": True}, None),
        ({"checkpoint": "./bert"}, None),
        ({}, None),
    ],
)
def test_the_base_model_is_named_where_it_is_on_the_hub(run, model, base):
    (run / "config.yaml").write_text(configuration(run, **model))
    card = card_of(run)
    assert card.data.base_model == base
    assert (f"trained from [{base}](https://huggingface.co/{base})" in card.text) == (base is not None)
    assert ("from random weights" in card.text) == ("from_scratch" in model)


def test_a_path_that_looks_like_a_name_is_none(run, monkeypatch):
    (run.parent / "models" / "bert").mkdir(parents=True)
    (run / "config.yaml").write_text(configuration(run, checkpoint="models/bert"))
    monkeypatch.chdir(run.parent)
    assert card_of(run).data.base_model is None


def test_the_card_tells_strangers_what_there_is(run):
    text = card_of(run).text
    for line in (
        "| `news` | News \\*topics\\* | classification | one text | `topic`: one of the classes 0 to 3 |",
        "| `imdb` | imdb | binary | one text | `label`: 0 or 1 |",
        "| `nli` | nli | classification | a pair of texts | `label`: yes, no, maybe |",
        "| `stars` | stars | regression | one text | `stars`: a score from 1 to 5 |",
        "| metric | on dev |",
        "| imdb F1 | 0.730 |",
        "| Fine-tuning | 2 | 60 | 160 | 1e-05, constant |",
        "| weights of the losses | news 1, imdb 1, nli 1, stars 1, sts 0.5 |",
        "| device | 2 x A100 |",
        "| versions | mtfast 0.1.0, torch 2.10.0 |",
        "| news-train | 1,000 | 999 | 1 | 7 |",
    ):
        assert line in text.splitlines(), line
    assert "epoch 1 of 2 of fine-tuning" in text and "the best of 2 looks" in text
    assert "on test" not in text
    add_to_summary(run, test=METRICS | {"imdb_f1": 0.5})
    text = card_of(run).text
    assert "| metric | on dev | on test |" in text and "| imdb F1 | 0.730 | 0.500 |" in text
    assert "Figures on test were used for no choice." in text


def test_nothing_of_the_machine_is_in_the_card(run):
    text = (push(run, "me/films", upload=False) / "README.md").read_text()
    for private in (str(run.parent), str(Path.home()), socket.gethostname(), "my-run", "news.csv", "imdb/"):
        assert private not in text, private


def test_the_code_in_the_card_runs(run, capsys):
    folder = push(run, "me/films", upload=False)
    codes = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    vectors = []
    for code in codes:
        names: dict = {}
        exec(code.replace("me/films", str(folder)), names)
        vectors += [np.asarray(names["vectors"])] if "vectors" in names else []
    assert len(codes) == 3 and len(capsys.readouterr().out.splitlines()) >= len(TASKS)
    assert vectors[0].shape == (2, 64) and np.allclose(*vectors, atol=1e-5)


def test_a_model_of_an_earlier_mtfast_opens_in_sentence_transformers_too(run):
    best = run / "finetune" / "best-mean"
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (best / name).unlink()
    (best / "1_Pooling").rmdir()
    folder = push(run, "me/films", upload=False)
    assert (folder / "1_Pooling" / "config.json").is_file() and not (best / "modules.json").exists()
    assert "Texts are cut at 128 word pieces" in (folder / "README.md").read_text()


class Hub:
    """What a push needs of the hub's client; existing: whether a repository that is there is private."""

    def __init__(self, existing: bool | None = None, refusal: Exception | None = None) -> None:
        self.calls: list = []
        self.private, self.refusal = existing, refusal

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.refusal is not None:
            raise self.refusal
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        self.private = private if self.private is None else self.private

    def model_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert (Path(folder_path) / "README.md").is_file()
        self.calls.append(("upload", repo_id, Path(folder_path)))


@pytest.mark.parametrize(("private", "existing"), [(False, None), (True, None), (True, True), (False, False)])
def test_the_folder_is_uploaded(run, monkeypatch, private, existing):
    hub = Hub(existing)
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    folder = push(str(run), "me/films", private=private)
    assert hub.calls == [("create", "me/films", private), ("upload", "me/films", folder)]


def test_nothing_is_uploaded_to_a_public_repository_that_should_be_private(run, monkeypatch):
    hub = Hub(existing=False)
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    with pytest.raises(PushError, match="me/films is there already and public; nothing was uploaded"):
        push(run, "me/films", private=True)
    assert [call[0] for call in hub.calls] == ["create"] and (run / "hub" / "README.md").is_file()


@pytest.mark.parametrize("private", [False, True])
def test_a_hub_that_refuses_is_told_with_what_to_do(run, monkeypatch, private):
    refusal = ConnectionError("401 Client Error.\n\n Invalid user token.")
    monkeypatch.setattr(module, "HfApi", lambda: Hub(refusal=refusal))
    with pytest.raises(PushError) as raised:
        push(run, "me/films", private=private)
    said = str(raised.value)
    assert said.startswith("me/films was not uploaded: 401 Client Error. Invalid user token.\n")
    assert "hf auth login" in said and f"{run / 'hub'} holds what belongs there" in said
    assert said.endswith(f"hf upload me/films {run / 'hub'}{' --private' if private else ''}")
    assert (run / "hub" / "README.md").is_file()


@pytest.mark.parametrize("repo_id", ["films", "me/films/best", "me/fil ms", "/films", "me/", "me/-films"])
def test_a_name_that_is_none_is_refused_before_anything(run, repo_id):
    with pytest.raises(ConfigError, match="is no name for a model on the hub; it is owner/name"):
        push(run, repo_id, upload=False)
    assert not (run / "hub").exists()


def test_a_run_without_a_fine_tuned_model_is_told_what_to_do(run, tmp_path):
    (run / "finetune" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"no finished finetune stage.*\(mtfast resume .*my-run\)"):
        push(run, "me/films", upload=False)
    with pytest.raises(ConfigError, match="nowhere is no directory of a run"):
        push(tmp_path / "nowhere", "me/films", upload=False)
    assert not (run / "hub").exists()
