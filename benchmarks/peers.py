"""What users would otherwise take, measured: TRL's SFTTrainer, a bare `transformers` loop, SFTMix written out on it.

It runs in an environment of its own, and `benchmarks/speed.py` talks to it: a request a line on stdin, such as
{"what": "trl", "dtype": "fp32", "steps": 2, "settings": {}}, an answer a line on stdout, {"tokens", "seconds"}.

    python -m venv peers && peers/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 protobuf sentencepiece
    python benchmarks/speed.py training --peers peers/bin/python …

All train the same model on the same token ids in the same batches. `tokens` are the examples' own, never padding.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixup import pair_positions, sftmix_loss_literal

BATCH_SIZE, LEARNING_RATE = 32, 1e-4


def train_trl(folder: Path, rows: list[dict], steps: int, dtype: str, settings: dict) -> float:
    """Seconds that so many steps of `SFTTrainer` take, without what comes before the first."""

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds += time.perf_counter() - self.began

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    chosen = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": steps,
        "bf16": dtype == "bf16",
        "max_length": 1024,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "output_dir": str(folder / "trl"),
        "disable_tqdm": True,
    }
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=SFTConfig(**chosen | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def padded(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as everybody lays it out: ids, labels and mask, [B, longest]."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
        learnt = torch.tensor(row["completion_mask"], dtype=torch.bool)
        labels[i, :n] = torch.where(learnt, ids[i, :n], -100)
    return ids, labels, mask


def literal_sftmix(model, ids, labels, mask):
    """SFTMix as the paper writes it, on a padded batch of pairs: two lm_head matmuls and one-hot targets."""
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learnt = targets != -100
    cu_seqlens = torch.arange(len(ids) + 1) * targets.shape[1]
    pairs = torch.arange(len(ids)).view(-1, 2)
    index_c, index_u, pair = pair_positions(targets.reshape(-1), cu_seqlens, pairs)
    lam = torch.distributions.Beta(0.5, 0.5).sample((len(pairs),))[pair]
    return sftmix_loss_literal(
        hidden[learnt].float(), model.lm_head.weight, targets[learnt], index_c, index_u, lam, mu=0.2
    )[0]


def train_bare(folder: Path, rows: list[dict], steps: int, dtype: str, mixing: bool) -> float:
    """Seconds that so many steps of a handwritten padded loop take."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    began = time.perf_counter()
    for step in range(steps):
        ids, labels, mask = padded(rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            if mixing:
                loss = literal_sftmix(model, ids, labels, mask)
            else:
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    """Answer requests about the model and the examples in the folder given."""
    folder, answers = Path(sys.argv[1]), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # trainers are talkative
        for line in sys.stdin:
            request = json.loads(line)
            rows = [json.loads(row) for row in (folder / "examples.jsonl").read_text().splitlines()]
            rows = rows[: request["steps"] * BATCH_SIZE]
            if request["what"] == "trl":
                seconds = train_trl(folder, rows, request["steps"], request["dtype"], request.get("settings", {}))
            else:
                seconds = train_bare(folder, rows, request["steps"], request["dtype"], request["what"] == "literal")
            tokens = sum(len(row["input_ids"]) - 1 for row in rows)
            print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
