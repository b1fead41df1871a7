"""Compare `eval.py` with transformers, lm-evaluation-harness, and the code of two judges that reads its files.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 transformers sentencepiece protobuf accelerate
    peers/bin/pip install lm_eval alpaca_eval fschat anthropic "setuptools<81"
    peers/bin/python benchmarks/evaluation.py --model DIR --questions FILE --texts FILE --output docs/evaluation.jsonl

The model must have no chat template. Each comparison is a line of JSON, which is printed and appended to the file:
greedy generation, choices, what the judges' code reads, and tokens a second.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import score_choices
from infra.generation import generate
from infra.hf import load_model, load_tokenizer
from infra.questions import LETTERS, load_questions

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["Once upon a time", "One day, a little girl named Lily", "The dog", "Tom and Sue went to the park. They"]


def greedy_text(folder: Path, new_tokens: int = 200) -> dict:
    """The number of prompts for which greedy generation gives the same tokens as `transformers`."""
    from transformers import AutoModelForCausalLM

    tokenizer, ours = load_tokenizer(folder), load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    answers, same = generate(ours, prompts, new_tokens), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
        expected = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        same += expected.tolist() == answer
    return {"prompts": len(prompts), "new_tokens": new_tokens, "same": same}


def speed(folder: Path, texts: list[str], repeats: int, ends: bool, new_tokens: int = 256) -> dict:
    """New tokens a second, ours and those of `transformers`, for a batch of 32 prompts, 4 to 248 tokens of the texts.

    With `ends`, an answer ends where the model begins another text, and later tokens are not counted; otherwise all
    answers have the same length. The two take turns, after a run of each that is not timed. Their answers may differ
    from the first position at which two tokens have the same probability up to rounding.
    """
    from transformers import AutoModelForCausalLM

    tokenizer, ours = load_tokenizer(folder), load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    prompts = [prompt[: 4 + (244 * n) // 31] for n, prompt in enumerate([p for p in prompts if len(p) > 248][:32])]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stop_ids = [tokenizer.bos_id] if ends else []
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": stop_ids or None}
    runs = {
        "ours": lambda: generate(ours, prompts, new_tokens, stop_ids),
        "transformers": lambda: theirs.generate(padded, attention_mask=mask, **options),
    }
    answers = {"ours": runs["ours"]()}
    answers["transformers"] = [[t for t in row if t] for row in runs["transformers"]()[:, longest:].tolist()]
    counted = {name: sum(map(len, texts)) for name, texts in answers.items()}
    rates = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            rates[name].append(counted[name] / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {
        "answers": "end by themselves" if ends else "equally long",
        "same": sum(one == other for one, other in zip(*answers.values(), strict=True)),
        "new_tokens": counted,
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def choices(folder: Path, questions_file: Path, count: int, by: str) -> dict:
    """Compare the choices and the accuracy of `choice --template plain` with those of lm-evaluation-harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    records = questions_file.read_text(encoding="utf-8").splitlines()[:count]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "questions.jsonl"
        questions = load_questions(questions_file)[:count]
        rows = [{"question": q.text, "texts": q.choices, "target": q.answer} for q in questions]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed = f"{{% for t in texts %}}{{{{ '{LETTERS}'[loop.index0] }}}}. {{{{ t }}}}\n{{% endfor %}}"
        task = {
            "task": "choice",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{ question }}\n" + (listed if by == "letter" else "") + "Answer:",
            "doc_to_choice": f"{{{{ '{LETTERS}'[:texts|length]|list }}}}" if by == "letter" else "{{ texts }}",
            "doc_to_target": "{{ target }}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8, add_bos_token=True)
        report = simple_evaluate(
            lm, tasks=[task], task_manager=TaskManager(), log_samples=True, bootstrap_iters=0, random_seed=0
        )
    theirs = []
    for sample, question in zip(sorted(report["samples"]["choice"], key=lambda s: s["doc_id"]), questions, strict=True):
        scores = [float(response[0][0]) for response in sample["resps"]]
        if by == "text":
            scores = [score / len(choice) for score, choice in zip(scores, question.choices, strict=True)]
        theirs.append(scores)
    scores, cut = score_choices(load_model(folder), questions, load_tokenizer(folder), "plain", by)
    ours = [int(score.argmax()) for score in scores]
    metric = report["results"]["choice"]["acc,none" if by == "letter" else "acc_norm,none"]
    largest_difference = max(
        abs(a - b) for one, other in zip(scores, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )
    return {
        "questions": len(records),
        "by": by,
        "same_choice": sum(one == max(range(len(x)), key=x.__getitem__) for one, x in zip(ours, theirs, strict=True)),
        "accuracy": sum(one == q.answer for one, q in zip(ours, questions, strict=True)) / len(questions),
        "accuracy_of_lm_eval": metric,
        "largest_difference_of_scores": largest_difference,
        "prompts_truncated": cut,
    }


def judges(folder: Path) -> dict:
    """What the code of AlpacaEval and of FastChat's judge reads from the files that `generate` writes for them."""
    from alpaca_eval.utils import load_or_convert_to_dataframe
    from fastchat.llm_judge.common import load_model_answers

    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        records_by_format = {
            "alpaca_eval": [{"dataset": "d", "instruction": text} for text in PROMPTS],
            "mt_bench": [
                {"question_id": 81 + n, "category": "writing", "turns": [text, "And then?"]}
                for n, text in enumerate(PROMPTS)
            ],
        }
        (temporary / "answers").mkdir()
        outputs = {"alpaca_eval": temporary / "outputs.json", "mt_bench": temporary / "answers" / "name.jsonl"}
        for output_format, records in records_by_format.items():
            data = temporary / f"{output_format}.json"
            data.write_text(json.dumps(records))
            command = [sys.executable, ROOT / "eval.py", "generate", "--model", folder, "--data", data]
            command += ["--format", output_format, "--name", "name", "--output", outputs[output_format]]
            command += ["--max_new_tokens", "20"]
            subprocess.run(command, check=True, capture_output=True)
        frame = load_or_convert_to_dataframe(outputs["alpaca_eval"])
        answers = load_model_answers(str(temporary / "answers"))["name"]
    turns = [answer["choices"][0]["turns"] for answer in answers.values()]
    return {
        "alpaca_eval": {
            "columns": sorted(frame.columns),
            "rows": len(frame),
            "same": list(frame.instruction) == PROMPTS,
        },
        "mt_bench": {"questions": sorted(answers), "turns": sorted({len(turn) for turn in turns})},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="texts with <|endoftext|> between them")
    parser.add_argument("--count", type=int, default=300, help="how many questions, from the first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    texts = [text.strip() for text in args.texts.read_text(encoding="utf-8")[: 2**20].split("<|endoftext|>")[1:]]
    comparisons = {
        "greedy": lambda: greedy_text(args.model),
        "speed": lambda: speed(args.model, texts, args.repeats, ends=True),
        "speed of equal lengths": lambda: speed(args.model, texts, args.repeats, ends=False),
        "letter": lambda: choices(args.model, args.questions, args.count, "letter"),
        "text": lambda: choices(args.model, args.questions, args.count, "text"),
        "judges": lambda: judges(args.model),
    }
    for name in args.only or comparisons:
        line = json.dumps({"what": name, "model": args.model.name, **comparisons[name]()})
        print(line, flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
