"""Our chat templates against the ones that models are published with, rendered by `transformers`."""

import json

import pytest
from conftest import write_files
from test_tokenizer import assistant, user
from test_tokenizer_peers import folders  # noqa: F401

from infra.chat_templates import resolve_template
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

ZEPHYR = (  # HuggingFaceH4/zephyr-7b-beta and TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""  # mistralai/Mistral-7B-Instruct-v0.3, without what is for tools
NEMO = MISTRAL_V3.replace('"[INST] "', '"[INST]"').replace('" " + message["content"]|trim', 'message["content"]')
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n')
                    + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # Qwen/Qwen3-8B, without what is for tools
QWEN2 = (  # Qwen 1.5 and 2, without their default system turn
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PUBLISHED = [  # template, the kinds of tokenizer that it comes with, its text, what it writes after the last turn
    ("zephyr", ("llama2", "mistral"), ZEPHYR, "\n"),
    ("mistral-v3", ("mistral-v3", "mistral-v3 without tokenizer.json"), MISTRAL_V3, ""),
    ("mistral-v3-tekken", ("tekken",), NEMO, ""),
    ("qwen3", ("qwen3",), QWEN3, "\n"),
    ("chatml", ("qwen", "qwen3"), QWEN2, "\n"),
]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("the quick fox?"), assistant("It's 12.\n\nA dog."), user("Zürich 漢字"), assistant("Ja."), user("?")]


@pytest.mark.parametrize(
    "template, kind, jinja, end", [(t, k, j, end) for t, kinds, j, end in PUBLISHED for k in kinds]
)
def test_ids_equal_those_of_the_published_template_in_transformers(folders, tmp_path, template, kind, jinja, end):  # noqa: F811
    folder = folders[kind.split()[0]]
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": jinja}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    if "without" in kind:
        del files["tokenizer.json"]
    write_files(tmp_path, files)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.choose_template(None) == template
    for messages in (TURNS[:2], TURNS[:4], [SYSTEM, *TURNS[:2]], [SYSTEM, *TURNS[:4]]):
        if SYSTEM in messages and template.startswith("mistral"):
            continue  # the published template leaves the system turn out, unless a user turn comes last
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert text.endswith(end)
        ids, _ = ours.render_conversation(messages, template)
        assert ids == theirs(text.removesuffix(end), add_special_tokens=False).input_ids
    for messages in (TURNS[:1], TURNS[:3], TURNS, [SYSTEM, TURNS[0]]):
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        assert theirs.apply_chat_template(messages, **options) == ours.render_conversation(messages, template)[0]


def test_a_prompt_with_thoughts_resembles_qwen3_only_where_thinking_can_be_turned_off(folders, capsys):  # noqa: F811
    for jinja, template in ((QWEN3, "qwen3"), (QWEN2, "chatml")):
        files = {file.name: file.read_bytes() for file in folders["qwen3"].iterdir()} | {
            "chat_template.jinja": jinja.encode()
        }
        assert resolve_template(Tokenizer(files), None) == template
    said = capsys.readouterr().out  # of QWEN2, nothing
    files["chat_template.jinja"] = b"<|im_start|>{{ raise_exception('tools only') }}"
    assert resolve_template(Tokenizer(files), None) == "chatml"
    unlike = "template chatml: the model's own cannot be rendered and may differ (tools only)\n"
    assert capsys.readouterr().out == unlike
    assert said.startswith("template qwen3: the model's own writes '' after") and said.count("\n") == 1
    assert said.endswith(r"where this one writes '<think>\n\n</think>\n\n'" + "\n")
