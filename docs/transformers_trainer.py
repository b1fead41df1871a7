"""SFTMix in transformers' Trainer: a reference run, the scores of its checkpoints, and a run with the Mixup term.

    python docs/transformers_trainer.py --model DIR --data FILE --output_dir DIR --save_steps 0.2 [Trainer's flags]

In your script: SFTMixTrainer(model, args, partial(collate, your_collator), data, halves=split_by_confidence(scores)).
One process for each GPU; where FSDP or ZeRO-3 shards lm_head, gather its weight for `sftmix_loss`. TRL: see below.
"""

import gc
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as hf
from transformers import Trainer, TrainingArguments

# import datasets; from trl import SFTConfig as TrainingArguments, SFTTrainer as Trainer  # for TRL, uncomment
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from confidence import TrainingDynamics, split_by_confidence
from data import IGNORE_INDEX, encode_examples, load_examples, paired_order, sample_lambda
from infra.chat_templates import resolve_template
from infra.hf import oldest_first
from infra.records import summarize_notes
from mixup import pair_positions, sftmix_loss
from tokenizer import Tokenizer


class PairSampler(list):
    """An order in which each confident example is followed by an unconfident one, another order in each epoch."""

    def __init__(self, halves, seed: int):
        self.order = partial(paired_order, *halves, seed)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:  # called by the Trainer
        self[:] = self.order(epoch).tolist()


def collate(collator, features: list[dict]) -> dict:
    """The batch of another collator, padded or packed, and `mix`: what is learned and mixed in it, seen as one row."""
    batch = dict(collator(features))
    packed, width = len(batch["labels"]) < len(features), batch["labels"].shape[1]
    lengths = torch.tensor([len(f["labels"]) if packed else width for f in features])  # padded: the longest one's
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # labels are not shifted
    pairs = torch.arange(len(features) // 2 * 2).view(-1, 2)  # neighbours
    index_c, index_u, pair = pair_positions(targets, F.pad(lengths.cumsum(0), (1, 0)), pairs)
    positions = (targets != IGNORE_INDEX).nonzero()[:, 0]  # [S]
    mix = {"positions": positions, "targets": targets[positions], "indices": (index_c, index_u), "pair": pair}
    return {**batch, "mix": {**mix, "num_pairs": len(pairs)}}


class SFTMixTrainer(Trainer):
    """A Trainer whose loss is L_NTP + μ L_Mixup, for the (confident, unconfident) `halves` of its training examples."""

    def __init__(self, *args, halves, mu: float = 0.2, alpha: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.halves, self.mu, self.alpha = halves, mu, alpha
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # no division by accumulation steps
        if self.args.per_device_train_batch_size % 2:
            raise ValueError("--per_device_train_batch_size must be even, since SFTMix trains on pairs")
        ids = sorted(int(i) for half in halves for i in half)
        if ids != list(range(len(self.train_dataset))) or abs(len(halves[0]) - len(halves[1])) > 1:
            raise ValueError("halves must be equally long, but for one example, and have each example once")

    def _get_train_sampler(self, *args):
        return PairSampler(self.halves, self.args.seed)

    def get_batch_samples(self, *args):
        """The micro-batches of an optimizer step, with their λ. Counts what is learned and mixed in all of them."""
        batches, num_items = super().get_batch_samples(*args)
        mixes, num_pairs = zip(*((batch["mix"], batch["mix"]["num_pairs"]) for batch in batches), strict=True)
        step = self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index
        lam = sample_lambda(sum(num_pairs), self.alpha, self.args.seed, step).split(num_pairs)
        for mix, lam_of_pair in zip(mixes, lam, strict=True):
            mix["lam"] = lam_of_pair[mix["pair"].cpu()]  # [M]
        counts = torch.tensor([[len(mix["targets"]), len(mix["lam"])] for mix in mixes], device=self.args.device)
        self.counts = self.accelerator.reduce(counts.sum(0)).tolist()  # num_supervised, num_mixed of all processes
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        mix = inputs.pop("mix")
        if "lam" not in mix:  # evaluation: the loss that the model computes
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        head, states = self.accelerator.unwrap_model(model).get_output_embeddings(), []
        # z is what enters lm_head. Only the last position goes on to it: `sftmix_loss` computes the logits itself.
        hook = head.register_forward_pre_hook(lambda _, entering: states.append(*entering) or (states[0][:, -1:],))
        with self.accelerator.autocast(), hook:
            logits, (z,) = model(**{**inputs, "labels": None}, use_cache=False).logits, states  # z: [B, T, D]
            expected, z = F.linear(z[:, -1:], head.weight), z.flatten(0, 1)[mix["positions"]]  # z: [S, D]
            arguments = z, head.weight, mix["targets"], *mix["indices"], mix["lam"], self.mu
            loss, _, _ = sftmix_loss(*arguments, 1.0, *self.counts)
        if (logits - expected).norm() > 0.005 * expected.norm():  # by more than rounding: W z̃ ≠ λ W z^c + (1−λ) W z^u
            raise ValueError("the logits are not W z: the model caps or scales them, or lm_head has a bias")
        return loss * self.accelerator.num_processes  # DDP averages the gradients of processes


@torch.no_grad()
def score(model, example: dict) -> list[float]:
    ids, labels = (torch.tensor(example[name], device=model.device) for name in ("input_ids", "labels"))
    is_learned = labels[1:] != IGNORE_INDEX
    log_p = -F.cross_entropy(model(ids[None]).logits[0, :-1].float(), labels[1:], reduction="none")[is_learned]
    return [log_p.exp().mean().item(), (-log_p.mean()).exp().item()]  # mean gold-token probability, perplexity


if __name__ == "__main__":
    parser = hf.HfArgumentParser(TrainingArguments)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    args, flags = parser.parse_args_into_dataclasses()
    if list(Path(args.output_dir).glob("checkpoint-*")):
        sys.exit("--output_dir has checkpoints of an earlier run")
    if args.per_device_train_batch_size % 2:
        sys.exit("--per_device_train_batch_size must be even, since SFTMix trains on pairs")
    if args.resume_from_checkpoint or args.label_smoothing_factor:
        sys.exit("--resume_from_checkpoint and --label_smoothing_factor: the SFTMix run would not do as they say")
    if args.save_strategy == "no" or args.save_total_limit is not None:
        sys.exit("the checkpoints of the reference run are scored: neither --save_strategy no nor --save_total_limit")
    tokenizer, padding = (kind.from_pretrained(flags.model) for kind in (Tokenizer, hf.AutoTokenizer))
    limit = min(1024, hf.AutoConfig.from_pretrained(flags.model).max_position_embeddings - 1)  # and the last target
    examples = load_examples(flags.data)
    template = resolve_template(tokenizer, None)
    encoded = encode_examples(examples, tokenizer, template, limit)
    if args.should_save:
        print(f"{len(encoded):,} examples, {encoded.num_truncated:,} truncated, {encoded.num_dropped:,} dropped")
        for line in summarize_notes(flags.data, examples):
            print(line)
    data = [{"input_ids": [*x.tolist(), max(y[-1].item(), 0)], "labels": [-100, *y.tolist()]} for x, y in encoded]
    # data, args.dataset_kwargs = datasets.Dataset.from_list(data), {"skip_prepare_dataset": True}  # for TRL, too
    padding.pad_token = padding.pad_token or padding.eos_token
    padding.chat_template = tokenizer.chat_template(template)  # saved with each checkpoint
    collator = hf.DataCollatorForSeq2Seq(padding)  # or hf.DataCollatorWithFlattening(), which packs

    def load(folder):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=args.device)
        model.generation_config.eos_token_id = tokenizer.stop_ids(template)  # saved, too
        return model

    trainer = Trainer(load(flags.model), args, collator, data, processing_class=padding)
    trainer.train()
    trainer.accelerator.wait_for_everyone()  # for rank 0, which writes the checkpoints
    del trainer  # with the model and the optimizer
    gc.collect()
    folders = oldest_first(list(Path(args.output_dir).glob("checkpoint-*")))
    scores = torch.tensor([[score(model.eval(), example) for example in data] for model in map(load, folders)])
    dynamics = TrainingDynamics(encoded.ids, *scores.permute(2, 0, 1).numpy())  # from [C, N, 2]
    if args.should_save:
        dynamics.save(f"{args.output_dir}/confidence.jsonl")
    args.output_dir, halves = f"{args.output_dir}/sftmix", split_by_confidence(dynamics.confidence)
    settings = {"halves": halves, "processing_class": padding}
    SFTMixTrainer(load(flags.model), args, partial(collate, collator), data, **settings).train()
