"""The Human / Assistant format of `data.dialogues` as a chat template, for exports of models without one."""

from __future__ import annotations

import json

from rlhf_jax.data import chat_ids
from rlhf_jax.data.dialogues import HEADERS, Message
from rlhf_jax.tokenizers.export import as_hugging_face
from rlhf_jax.tokenizers.protocol import TextTokenizer

_PROBES = ((Message("user", "a b"),), (Message("system", "a b"), Message("user", "c")))


def dialogue_template(tokenizer: TextTokenizer) -> str:
    """The chat template that renders messages as `data.encode` does for a tokenizer without a template.

    Special tokens are written as text, since not every tokenizer_config.json names them. A tokenizer of the
    SentencePiece kind that puts a space before a text, but none after a special token, gets it from the template.
    """
    published = as_hugging_face(tokenizer)
    names = {id: text for text, id in published.special_tokens.items()}
    start = "".join(names[id] for id in tokenizer.start_ids)
    plain, spaced = (_source(start + space, names[tokenizer.eos_id]) for space in ("", " "))
    templated = published.with_template(spaced)
    same = all(chat_ids(probe, templated) == chat_ids(probe, tokenizer) for probe in _PROBES)
    return spaced if same else plain


def _source(start: str, end: str) -> str:
    user, assistant, ending = map(json.dumps, (HEADERS["user"], HEADERS["assistant"], end))
    return (
        f"{{{{ {json.dumps(start)} }}}}{{% for message in messages %}}"
        "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} + ' ' + message['content'] }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {assistant} + ' ' + message['content'] + {ending} }}}}"
        "{% else %}{{ raise_exception('expected user and assistant messages, after at most one system message, got the "
        "role ' + message['role']) }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
    )
