"""Runs with random weights, laid out as training leaves them, and what their files say without mtfast."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_tokenizer import WORDS, small_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from mtfast.config import DataConfig, EngineConfig, ModelConfig, RunConfig, to_dict
from mtfast.files import to_yaml
from mtfast.models.checkpoint import save_heads, save_pretrained
from mtfast.models.multitask import MultiTaskModel, build_multitask_model
from mtfast.models.pretraining import build_pretrain_model
from mtfast.tasks import MlpConfig, Task

MAX_LENGTH = 24
MLP = MlpConfig(width=8, activation="gelu")
PAIR = ("first", "second")
TASKS = {
    "stars": Task("classification", "text", "label", classes=5, aliases={"text": ("review",)}),
    "mood": Task("classification", "text", "label", classes=("bad", "good", "so so")),
    "tone": Task("classification", "text", "label", classes=3, head="lstm"),
    "same": Task("binary", PAIR, "label", head="pair"),
    "near": Task("regression", PAIR, "label", low=0, high=5, head="pair"),
    "nli": Task("classification", PAIR, "label", classes=("no", "yes"), head="joint", pair_input="joint"),
}


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=len(small_tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=40,
        initializer_range=0.3,
    )


def random_model(seed: int = 6) -> MultiTaskModel:
    """With weights so large that its predictions differ."""
    torch.manual_seed(seed)
    model = build_multitask_model(bert_config(), TASKS, MLP, 0.1)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save(model: MultiTaskModel, directory: Path) -> Path:
    """A checkpoint with heads, as fine-tuning leaves it."""
    tokenizer, state = small_tokenizer(), model.state_dict()
    save_pretrained(directory, state, bert_config(), tokenizer, tasks=TASKS, mlp=MLP, max_length=MAX_LENGTH)
    return directory


def save_encoder(directory: Path, seed: int = 1) -> Path:
    """A checkpoint as pre-training leaves it."""
    torch.manual_seed(seed)
    state = build_pretrain_model(bert_config()).state_dict()
    save_pretrained(directory, state, bert_config(), small_tokenizer())
    return directory


def finish(run: Path, stage: str) -> None:
    (run / stage / "result.json").write_text(json.dumps({"summary": {}, "best": {}}), encoding="utf-8")


def configure(run: Path, **changes) -> RunConfig:
    """The configuration of a run of `TASKS`, written to its directory."""
    config = RunConfig(
        run_dir=str(run),
        tasks=TASKS,
        model=ModelConfig(checkpoint="nowhere/bert", mlp=MLP),
        data=DataConfig(tasks="nowhere/cs224n", max_length=MAX_LENGTH),
        engine=EngineConfig(precision="fp32", zero_stage=0),
        seed=3,
    )
    config = replace(config, **changes)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(to_dict(config)), encoding="utf-8")
    return config


def finetuned_run(run: Path) -> Path:
    configure(run)
    save(random_model(), run / "finetune" / "best-mean")
    finish(run, "finetune")
    return run


def heads_run(run: Path, checkpoint: Path | None = None) -> Path:
    """A run whose heads are trained, on its own pre-trained encoder or on the random one of its seed."""
    if checkpoint is None:
        configure(run)
        save_encoder(run / "pretrain" / "last")
        finish(run, "pretrain")
    else:
        configure(run, model=ModelConfig(checkpoint=str(checkpoint), from_scratch=True, mlp=MLP))
    save_heads(run / "heads" / "best-mean", random_model(seed=2).heads.state_dict(), TASKS, MLP)
    finish(run, "heads")
    return run


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 15 words, in no order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 16, (count,), generator=generator)
    words = [word for word in WORDS if not word.startswith("##")]
    return [
        " ".join(words[i] for i in torch.randint(len(words), (int(length),), generator=generator))
        for length in lengths
    ]


class Oracle:
    """The outputs of a checkpoint's heads through Hugging Face's BertModel, text by text."""

    def __init__(self, encoder: Path, heads: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.bert = BertModel.from_pretrained(encoder).eval()
        self.heads = {name.removeprefix("heads."): x for name, x in load_file(heads).items()}

    def states(self, *texts: str) -> torch.Tensor:
        """[tokens, hidden] of one sequence of one or two texts, cut as Hugging Face cuts it."""
        options = {"truncation": True, "max_length": MAX_LENGTH, "return_token_type_ids": True}
        inputs = self.tokenizer(*texts, return_tensors="pt", **options)
        with torch.no_grad():
            return self.bert(**inputs).last_hidden_state[0]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.heads[f"{name}.weight"].T + self.heads[f"{name}.bias"]

    def outputs(self, task: str, examples: list) -> torch.Tensor:
        """[n, outputs] in float64."""
        return torch.stack([self._output(task, example) for example in examples]).double()

    def _output(self, task: str, example) -> torch.Tensor:
        declared = TASKS[task]
        if len(declared.texts) == 1:
            states = self.states(example)
            features = states[0]
            if declared.head == "lstm":
                features = torch.cat([features, self._lstm(states[1:], f"task-{task}.lstm")])
                hidden = torch.nn.functional.gelu(self._linear(features, f"task-{task}.dense"))
                return self._linear(hidden, f"task-{task}.out_proj")
            return self._linear(features, f"task-{task}.classifier")
        if declared.pair_input == "joint":
            hidden = torch.nn.functional.gelu(self._linear(self.states(*example)[0], "mlp-joint.dense"))
            return self._linear(hidden, "mlp-joint.out_proj")
        pair = torch.cat([self.states(text)[0] for text in example])
        hidden = torch.nn.functional.gelu(self._linear(pair, "mlp-pair.mlp.dense"))
        return self._linear(hidden, "mlp-pair.mlp.out_proj")[["same", "near"].index(task)][None]

    def _lstm(self, states: torch.Tensor, name: str) -> torch.Tensor:
        lstm = torch.nn.LSTM(states.size(1), states.size(1) // 2, bidirectional=True)
        weights = {key: self.heads[f"{name}.{key}"] for key in lstm.state_dict()}
        lstm.load_state_dict(weights)
        with torch.no_grad():
            return lstm(states[:, None])[1][0][:, 0].flatten()
