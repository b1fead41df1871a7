"""Samples in the shapes in which public data sets are published, through `train.py --dry_run`; words are made up."""

import gzip
import json

import pytest
from conftest import write_model_and_records

from train import main

ASK, ANSWER = "Who is quick?", "The fox is."
ROLES = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
FROM = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]
SYSTEM = "Be brief."

DATA_SETS = {  # name -> file name, record
    "Alpaca": ("alpaca_data.json", {"instruction": ASK, "input": "", "output": ANSWER}),
    "MedAlpaca": ("medical_meadow.json", {"input": ASK, "output": ANSWER, "instruction": "Answer this."}),
    "UltraChat 200K": (
        "train_sft-00000-of-00003.parquet",
        {
            "prompt": ASK,
            "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
            "messages": ROLES,
        },
    ),
    "UltraChat": ("train_0.jsonl", {"id": "0", "data": [ASK, ANSWER]}),
    "Tulu 3": ("train-00000-of-00006.parquet", {"id": "oasst1_1", "messages": ROLES, "source": "ai2-adapt-dev/oasst1"}),
    "Dolly": (
        "databricks-dolly-15k.jsonl",
        {"instruction": ASK, "context": "", "response": ANSWER, "category": "open_qa"},
    ),
    "LIMA": ("train.jsonl", {"conversations": [ASK, ANSWER], "source": "stackexchange"}),
    "ShareGPT": ("sharegpt.json", {"id": "i6IyJda_0", "conversations": FROM}),
    "OpenHermes 2.5": (
        "openhermes2_5.json",
        {
            "custom_instruction": None,
            "system_prompt": SYSTEM,
            "conversations": FROM,
            "source": "airoboros2.2",
            "idx": 3,
        },
    ),
    "SlimOrca": (
        "oo-labeled_correct.gpt4.sharegpt.jsonl",
        {
            "conversations": [
                {"from": "system", "value": SYSTEM, "weight": None},
                {**FROM[0], "weight": 0.0},
                {**FROM[1], "weight": 1.0},
            ]
        },
    ),
    "OpenOrca": ("1M-GPT4.parquet", {"id": "niv.1", "system_prompt": SYSTEM, "question": ASK, "response": ANSWER}),
    "Capybara": ("CapybaraPure.jsonl", {"source": "x", "conversation": [{"input": ASK, "output": ANSWER}]}),
    "GSM8K": ("train-00000-of-00001.parquet", {"question": ASK, "answer": ANSWER}),
    "nanochat": ("identity.jsonl", ROLES),
    "TRL": ("train.jsonl.gz", {"prompt": ROLES[:1], "completion": ROLES[1:]}),
    "ms-swift": ("train.ndjson", {"system": SYSTEM, "query": ASK, "response": ANSWER, "history": []}),
}


def write_data(folder, name: str, record) -> None:
    """Write a data file with one record, as its suffix says."""
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([record]), folder / name)
        return
    content = json.dumps([record] if name.endswith(".json") else record).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content + b"\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    write_model_and_records(folder, tokenizer)
    return folder


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_public_data_set_is_read_as_published(model, tmp_path, capsys, name):
    file, record = DATA_SETS[name]
    write_data(tmp_path, file, record)
    main(["--model", str(model / "model"), "--data", str(tmp_path), "--cache", str(tmp_path / "c"), "--dry_run"])
    out = capsys.readouterr().out
    shown = out[out.index("what is learned") :].split("\n", 1)[1].replace(" ", "").replace("▁", " ")
    prompt, _, response = shown.partition("«")
    assert response.strip("» \n") == ANSWER + "</s>" and ASK in prompt
    assert (SYSTEM in prompt) == (SYSTEM in json.dumps(record))
    assert ("Answer this." in prompt) == (name == "MedAlpaca")
