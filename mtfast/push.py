"""A run's model on the Hugging Face hub: a folder of its best checkpoint and a model card, and its upload."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mtfast.config import ConfigError
from mtfast.errors import Error
from mtfast.markdown import picture
from mtfast.model_card import model_card
from mtfast.models.checkpoint import load_bert_config
from mtfast.models.files import link_files, replacing
from mtfast.models.sentence_files import max_length_of, write_sentence_files
from mtfast.results import plot_of_dev_metrics
from mtfast.run_record import read_run
from mtfast.training.run.directory import check_checkpoint, read_result

FOLDER = "hub"


class PushError(Error):
    """The hub did not take a model; the message says why and how to upload it later."""


def push(run: str | os.PathLike[str], repo_id: str, *, private: bool = False, upload: bool = True) -> Path:
    """Puts a run's best fine-tuned model with a model card on the Hugging Face hub.

    What goes there is assembled in `hub/` of the run's directory, which takes the place of an earlier one;
    nothing else of the run is written, and its lock is not needed. For one process, rank 0.

    Args:
        run: directory of a run whose finetune stage has finished.
        repo_id: what the model is to be called, owner/name; made if it is not there.
        private: make it visible to its owner alone.
        upload: whether to upload the folder.

    Returns:
        The folder.

    Raises:
        ConfigError: repo_id is no such name, or the run has no fine-tuned model.
        CheckpointError: its files cannot be read, or the folder cannot be written.
        PushError: the hub cannot be reached or refuses; the folder is there then.
    """
    _check_name(repo_id)
    directory = Path(run).expanduser()
    folder = _assemble(directory, repo_id)
    if upload:
        _upload(folder, repo_id, private)
    return folder


def _check_name(repo_id: str) -> None:
    wanted = f"{repo_id!r} is no name for a model on the hub; it is owner/name"
    if repo_id.count("/") != 1:
        raise ConfigError(wanted)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{wanted} ({error})") from error


def _assemble(directory: Path, repo_id: str) -> Path:
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory of a run")
    if read_result(directory / "finetune") is None:
        raise ConfigError(
            f"{directory} holds no finished finetune stage, whose best model would be pushed; go on with the "
            f"run (mtfast resume {directory})"
        )
    best, record = directory / "finetune" / "best-mean", read_run(directory)
    if record.config is None:
        raise ConfigError(f"{directory} is a run of an earlier mtfast, which did not declare its tasks")
    check_checkpoint(best)
    bert = load_bert_config(best)
    with replacing(directory / FOLDER) as incoming:
        link_files(best, incoming)
        if not (incoming / "modules.json").exists():  # of an earlier mtfast
            write_sentence_files(incoming, bert.hidden_size, record.config.data.max_length)
        figure = plot_of_dev_metrics(record)
        caption = "Metrics on dev after each epoch"
        shown = picture(figure, incoming / "plots" / "dev_metrics.png", caption) if figure else ""
        card = model_card(record, record.config, repo_id, bert, max_length_of(incoming), shown)
        (incoming / "README.md").write_text(str(card), encoding="utf-8")
    return directory / FOLDER


def _upload(folder: Path, repo_id: str, private: bool) -> None:
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        # One that was there stays as public as it was.
        public = private and not api.model_info(repo_id).private
        if not public:
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with mtfast")
    except Exception as error:  # besides its own, those of an HTTP library that differs by version
        command = f"hf upload {repo_id} {folder}{' --private' if private else ''}"
        raise PushError(
            f"{repo_id} was not uploaded: {' '.join(str(error).split())}\n{folder} holds what belongs there. "
            f"With a connection and a token that may write to {repo_id} (hf auth login, or HF_TOKEN), upload "
            f"it with the same command again, or with: {command}"
        ) from error
    if public:
        raise PushError(
            f"{repo_id} is there already and public; nothing was uploaded. Make it private on the hub, leave "
            f"out --private, or choose another name; {folder} holds what belongs there"
        )
