"""The machinery around the recipe, which a reader of the recipe may skip.

processes       distributed, device, fsdp, terminal
files           files, locks
data            records, formats, questions, cache, selection, data_map, demo
models          hf, tokenizer_files, chat_templates, generation, answers
a run           cli, inputs, output, resume, savepoints, metrics, plan
"""
