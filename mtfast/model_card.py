"""The model card of a run: what its model is and does, for people who know nothing else of the run.

Nothing in it tells of the machine that the run was made on: no path, no name of a host or a user.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import BertConfig

from mtfast.config import RunConfig
from mtfast.data.rows import listed
from mtfast.markdown import NOTHING, count, escape, number, plain, table
from mtfast.plots import is_number
from mtfast.results import METRIC_TITLES, STAGES, choice_in_words, data_table, metric_titles
from mtfast.run_record import RunRecord
from mtfast.tasks import METRICS_OF, Task

HUB = "https://huggingface.co"
METRIC_TYPES = {
    "accuracy": "accuracy",
    "f1": "f1",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}  # the hub's
VERSIONS = ("mtfast", "torch", "deepspeed", "transformers")
SPLITS = ("dev", "test")
EXAMPLES = {1: '"A film of rare beauty."', 2: '("How old is Rome?", "What is the age of Rome?")'}


def model_card(
    run: RunRecord, config: RunConfig, repo_id: str, bert: BertConfig, max_length: int, picture: str
) -> ModelCard:
    """The card of a run's fine-tuned model.

    Args:
        config: the run's.
        repo_id: what the model is called on the hub, owner/name.
        bert: of its encoder.
        max_length: word pieces at which texts are cut.
        picture: Markdown that shows the run's dev metrics; may be empty.
    """
    parts = [
        f"---\n{_metadata(run, config, repo_id).to_yaml()}\n---",
        f"# {escape(repo_id.partition('/')[2])}",
        _what_it_is(config, bert),
        "## What it does",
        _task_table(config.tasks),
        "## Results",
        _result_table(run),
        choice_in_words(run),
        picture,
        "## How to use it",
        *_usage(config.tasks, repo_id, max_length),
        "## How it was trained",
        *_training(run, config),
    ]
    if run.summary.get("data"):
        parts += ["### Data", "Rows by data set and split:", data_table(run.summary["data"])]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def _metadata(run: RunRecord, config: RunConfig, repo_id: str) -> ModelCardData:
    base = None if config.model.from_scratch else _on_hub(config.model.checkpoint)
    sources = [task.source for task in config.tasks.values()]
    if "pretrain" in run.summary.get("stages", {}):
        sources.append(config.data.reviews)
    classifies = any(task.kind != "regression" for task in config.tasks.values())
    return ModelCardData(
        language="en",
        library_name="mtfast",
        pipeline_tag="text-classification" if classifies else "feature-extraction",
        tags=["bert", "multi-task", "sentence-transformers", "feature-extraction"],
        base_model=base,
        datasets=sorted({name for source in sources if source and (name := _on_hub(source))}) or None,
        model_name=repo_id.partition("/")[2],
        eval_results=list(_evaluations(run)) or None,
    )


def _on_hub(name: str) -> str | None:
    """The name of a checkpoint or data set on the hub, without a data set's part; None for what is a path."""
    name = name.partition(":")[0]
    return name if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else None


def _evaluations(run: RunRecord) -> Iterator[EvalResult]:
    for split in SPLITS:
        metrics = run.metrics(split)
        for name, task in run.tasks.items():
            similarity = task.kind == "regression" and len(task.texts) == 2
            for metric in METRICS_OF[task.kind]:
                value = metrics.get(f"{name}_{metric}", math.nan)
                if is_number(value):
                    yield EvalResult(
                        task_type="sentence-similarity" if similarity else "text-classification",
                        task_name=task.title or name,
                        dataset_type=(task.source and _on_hub(task.source)) or name,
                        dataset_name=task.title or name,
                        dataset_split=split,
                        metric_type=METRIC_TYPES[metric],
                        metric_name=METRIC_TITLES[metric],
                        metric_value=round(value, 4),
                    )


def _what_it_is(config: RunConfig, bert: BertConfig) -> str:
    titles = [escape(task.title or name) for name, task in config.tasks.items()]
    many = (
        f"one BERT encoder with a head for each of {len(titles)} tasks"
        if len(titles) > 1
        else "a BERT with a head"
    )
    if config.model.from_scratch:
        origin = "It was trained from random weights."
    elif base := _on_hub(config.model.checkpoint):
        origin = f"It was trained from [{base}]({HUB}/{base})."
    else:
        origin = ""
    size = (
        f"The encoder has {bert.num_hidden_layers} layers of width {bert.hidden_size} and "
        f"{bert.vocab_size:,} word pieces."
    )
    what = f"This is {many}, trained with the Python package mtfast: {', '.join(titles)}."
    return f"{what} {size} {origin}".rstrip()


# ---- tasks ----


def _task_table(tasks: Mapping[str, Task]) -> str:
    rows = [
        (
            f"`{name}`",
            escape(task.title or name),
            task.kind,
            "one text" if len(task.texts) == 1 else "a pair of texts",
            f"`{task.label}`: {_answers(task)}",
        )
        for name, task in tasks.items()
    ]
    return table(("task", "title", "kind", "takes", "gives"), rows, text_columns=5)


def _answers(task: Task) -> str:
    if task.kind == "regression":
        return f"a score from {task.low:g} to {task.high:g}"
    if task.kind == "binary":
        return "0 or 1"
    if isinstance(task.classes, tuple):
        return escape(listed(task.classes))
    return f"one of the classes 0 to {task.outputs - 1}"


def _result_table(run: RunRecord) -> str:
    """A line for each metric, with its value on each split that it was measured on."""
    results = {split: metrics for split in SPLITS if (metrics := run.metrics(split))}
    rows = [
        (title, *(number(metrics.get(key)) for metrics in results.values()))
        for key, title in metric_titles(run.tasks).items()
        if any(is_number(metrics.get(key)) for metrics in results.values())
    ]
    if not rows:
        return "The model has not been evaluated yet."
    return table(("metric", *(f"on {split}" for split in results)), rows)


# ---- use ----


def _usage(tasks: Mapping[str, Task], repo_id: str, max_length: int) -> list[str]:
    joint = [f"`{name}`" for name, task in tasks.items() if task.pair_input == "joint"]
    together = f" (of {' and '.join(joint)} both together)" if joint else ""
    with_mtfast = ["import mtfast", "", f'model = mtfast.load("{repo_id}")']
    for name, task in tasks.items():
        found = "scores" if task.kind == "regression" else "labels"
        with_mtfast.append(f'print(model.predict("{name}", {EXAMPLES[len(task.texts)]}).{found}[0])')
    texts = 'texts = ["A film of rare beauty.", "A dull film."]'
    with_sentence_transformers = [
        "from sentence_transformers import SentenceTransformer",
        "",
        texts,
        f'vectors = SentenceTransformer("{repo_id}").encode(texts)',
    ]
    with_transformers = [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
        f'encoder = AutoModel.from_pretrained("{repo_id}")',
        texts,
        f"cut = dict(truncation=True, max_length={max_length})",
        'inputs = tokenizer(texts, padding=True, return_tensors="pt", **cut)',
        "with torch.no_grad():",
        "    vectors = encoder(**inputs).last_hidden_state[:, 0]",
    ]
    return [
        "All of it, with mtfast:",
        _code(with_mtfast),
        "A call takes one text or pair, or a list of them, and gives labels with their probabilities, or "
        f"scores. Texts are cut at {max_length} word pieces{together}.",
        "The encoder alone, without mtfast. The vector of a text is the last layer's at [CLS], which is what "
        "the heads are trained on. With sentence-transformers:",
        _code(with_sentence_transformers),
        "With transformers:",
        _code(with_transformers),
    ]


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


# ---- training ----


def _training(run: RunRecord, config: RunConfig) -> list[str]:
    rows: list[Sequence[str]] = []
    for stage in STAGES:
        if facts := run.summary.get("stages", {}).get(stage):
            settings = getattr(config, stage)
            rate = f"{settings.learning_rate:g}, {settings.schedule}"
            epochs = _epochs(run, stage, settings.epochs if settings.max_steps is None else None)
            batch = count(settings.batch_size)
            rows.append((STAGES[stage], epochs, count(facts.get("steps")), batch, rate))
    header = ("stage", "epochs", "steps", "examples a step", "learning rate")
    return [table(header, rows), table(("", "value"), list(_circumstances(run, config)), text_columns=2)]


def _circumstances(run: RunRecord, config: RunConfig) -> Iterator[tuple[str, str]]:
    facts = run.summary.get("environment", {})
    yield "optimizer", f"AdamW, weight decay {config.finetune.weight_decay:g} in fine-tuning"
    yield "precision", facts.get("precision", config.engine.precision)
    yield "dropout", f"{config.model.dropout_p:g}"
    weights = {name: task.weight for name, task in config.tasks.items()}
    if len(set(weights.values())) > 1:
        yield "weights of the losses", ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    if facts.get("device"):
        yield (
            "device",
            f"{facts['ranks']} x {facts['device']}" if facts.get("ranks", 1) > 1 else facts["device"],
        )
    yield "versions", plain({name: facts[name] for name in VERSIONS if facts.get(name)})


def _epochs(run: RunRecord, stage: str, planned: int | None) -> str:
    """Those that were made, as far as is recorded: pre-training is not evaluated after each."""
    made = len(run.evaluations.get(stage, ()))
    return count(made) if made else NOTHING if planned is None else count(planned)
