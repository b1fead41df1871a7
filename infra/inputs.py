"""What a run reads: the model folder, the training examples, the held-out examples; all of it checked before training.

Below, `config` is a `train.TrainConfig`.
"""

from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from data import Dataset, content_id, encode_examples, to_example
from infra.cache import load_dataset
from infra.chat_templates import resolve_template
from infra.distributed import print0, rank
from infra.hf import check_models, load_config, load_tokenizer, resolve_max_length, verify_weights
from infra.output import stages_of
from infra.records import Reading, describe, split_files
from tokenizer import Tokenizer


class Inputs(NamedTuple):
    """What the stages read."""

    tokenizer: Tokenizer
    train: Dataset
    held_out: Dataset | None  # None without --eval_data: no model is evaluated


def resolve_model(config) -> tuple:
    """Fill in what the model folder decides. -> (configuration, tokenizer of the folder)

    Raises FileNotFoundError or ValueError if the folder is not complete.
    """
    check_models([config.model])
    verify_weights(config.model)
    max_length = resolve_max_length(config.model, config.max_length)
    tokenizer = load_tokenizer(config.model)
    template = resolve_template(tokenizer, config.template)
    return replace(config, max_length=max_length, template=template), tokenizer


def load_inputs(config, tokenizer: Tokenizer) -> Inputs:
    """Read and encode the data, so that all errors in it are found before training."""
    settings = tokenizer, config.template, config.max_length, config.cache
    dataset = load_dataset(config.data, *settings, skip_bad_records=config.skip_bad_records)
    if "sftmix" in stages_of(config) and len(dataset) < 2 and config.dry_run is None:
        raise ValueError(f"{config.data}: SFTMix mixes two examples, and there is only one")
    check_saved_tokenizer(tokenizer, dataset, config)
    if config.eval_data is None:
        print0("no --eval_data: no model is evaluated")
        return Inputs(tokenizer, dataset, None)
    held_out = load_dataset(config.eval_data, *settings, skip_bad_records=config.skip_bad_records)
    trained_on = set(map(content_id, dataset.ids))
    if shared := sum(content_id(example_id) in trained_on for example_id in held_out.ids):
        print0(f"warning: {shared:,} held-out examples are training examples too; their loss proves nothing")
    return Inputs(tokenizer, dataset, held_out)


# --- The tokenizer that is saved --------------------------------------------------------------------------------------

CHECKED_EXAMPLES = 300


def check_saved_tokenizer(tokenizer: Tokenizer, dataset: Dataset, config) -> None:
    """Open the tokenizer files that will be saved, and encode the first examples and fixed conversations with them.

    Raises ValueError if ids or loss masks differ from those trained on: a model that is opened from its folder would
    then see other prompts than in training.
    """
    if rank() != 0:
        return
    model_config = load_config(config.model).to_dict()
    saved = Tokenizer(tokenizer.files_for(config.template), model_config)
    advice = f"; give {config.model} a tokenizer_config.json that names its tokenizer_class, bos_token and eos_token"
    if saved.choose_template(None) != config.template:
        raise ValueError(f"a saved model's chat_template would be taken for {saved.choose_template(None)}{advice}")
    has_eos = tokenizer.eos_id is not None  # without it, there are no plain texts
    for messages in fixed_conversations() if has_eos else fixed_conversations()[:-1]:
        expected, found = (t.render_conversation(messages, config.template) for t in (tokenizer, saved))
        if found != expected:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"a saved model's tokenizer would give other ids to a conversation of {roles}{advice}")
    examples = (example for chunk in split_files(config.data) for example in Reading().parse(chunk, to_example))
    again = encode_examples(islice(examples, CHECKED_EXAMPLES), saved, config.template, config.max_length)
    for number, (found, expected) in enumerate(zip(again, dataset, strict=False), start=1):
        if not all(map(torch.equal, found, expected)):
            name = f"example {number} of {describe(config.data)}"
            raise ValueError(f"a saved model's tokenizer would give other ids to {name}{advice}")


def fixed_conversations() -> list[list[dict]]:
    """Conversations of one to six turns, each with and without a system turn, and a plain text."""
    contents = ["What is it?", " It's a dog,\n\n  1 2 3.\n", "\nÜber 漢字\t🎉", "No", "  (a)", "b  c"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    systems = ([], [{"role": "system", "content": "Be brief. "}])
    return [system + turns[:n] for system in systems for n in range(1, 7)] + [[{"role": "text", "content": " a\n b"}]]
