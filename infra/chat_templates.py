"""Which chat template a model folder gets, and how its own differs from it.

PyTorch brings jinja2, the language of chat templates. It serves for this comparison alone: what a model is trained on
comes from `tokenizer.TEMPLATES`.
"""

import os

from infra.distributed import print0
from tokenizer import Tokenizer

_TURNS = [
    {"role": role, "content": content}
    for role, content in (("user", "Hi!"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me."))
]
_SYSTEM = {"role": "system", "content": "Be brief."}


def resolve_template(tokenizer: Tokenizer, name: str | None, file=None) -> str:
    """`Tokenizer.choose_template`. Without a name, print to `file` how the folder's own template differs."""
    template, own = tokenizer.choose_template(name), tokenizer.hf_chat_templates
    if name is not None:
        return template
    if "default" in own:
        if difference := template_difference(tokenizer, template):
            print0(f"template {template}: {difference}", file)
    else:
        has = f"chat templates named {', '.join(own)}, and none named default" if own else "no chat_template"
        print0(f"template {template}: the model has {has}; --template chooses another", file)
    return template


def template_difference(tokenizer: Tokenizer, template: str) -> str | None:
    """How the folder's default chat template and `template` render a conversation: where they first differ.

    None if they do not differ. A folder's template that cannot be rendered may differ.
    """
    own, ours = tokenizer.hf_chat_templates["default"], tokenizer.chat_template(template)
    if own == ours:
        return None
    for turns in (_TURNS[:1], _TURNS[:2], _TURNS, [_SYSTEM, *_TURNS[:2]]):
        try:
            found, expected = (_render(tokenizer, jinja, turns) for jinja in (own, ours))
        except Exception as error:  # a template is a program: it may raise anything, and refuse a system turn
            if turns[0] is not _SYSTEM:
                return f"the model's own cannot be rendered and may differ ({str(error)[:100]})"
            continue
        if found != expected:
            start = len(os.path.commonprefix([found, expected]))  # noqa: RUF071 (characters are meant)
            theirs, instead = (f"{text[start : start + 40]!r}" for text in (found, expected))
            return f"the model's own writes {theirs} after {found[:start][-40:]!r}, where this one writes {instead}"
    return None


def _render(tokenizer: Tokenizer, jinja: str, turns: list[dict]) -> str:
    """Render a chat template as `transformers` does."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: "today"}
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    tokens = {name: "" if i is None else tokenizer.id_to_token(i) for name, i in names.items()}
    is_prompt = turns[-1]["role"] == "user"
    text = environment.from_string(jinja).render(messages=turns, add_generation_prompt=is_prompt, **tokens)
    return text if is_prompt else text.rstrip()  # many write a new line after the last turn, which nothing follows
