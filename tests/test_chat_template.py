"""Outlines of chat templates render what Jinja renders."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st

from smolcli.errors import ModelError
from smolcli.text.chat_template import ChatTemplate, only_inserts_contents

SPECIAL = {"bos_token": "<s>"}
texts = st.one_of(st.text(max_size=30), st.sampled_from(["", " a\n", "{{ 1 }}", "<|im_end|>"]))


def template(source: str, is_stored: bool) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, Path("folder"), is_stored)


@pytest.fixture(scope="module")
def outlined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatTemplate]:
    """A template whose outlines were stored by an earlier start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOL_HOME", str(tmp_path_factory.mktemp("home")))
        template(CHAT_TEMPLATE, is_stored=True)
        yield template(CHAT_TEMPLATE, is_stored=True)


@given(roles=st.sampled_from(["user", "system user"]), contents=st.tuples(texts, texts))
def test_outlines_equal_jinja(
    outlined: ChatTemplate, roles: str, contents: tuple[str, str]
) -> None:
    turns = [
        {"role": role, "content": content}
        for role, content in zip(roles.split(), contents, strict=False)
    ]
    expected = template(CHAT_TEMPLATE, is_stored=False).render(turns)
    assert outlined.render(turns) == expected
    assert "_template" not in vars(outlined), "Jinja was imported"


@pytest.mark.usefixtures("home")
def test_other_conversations_are_rendered_by_jinja() -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    rendered = template(CHAT_TEMPLATE, is_stored=True).render(turns)
    assert rendered == template(CHAT_TEMPLATE, is_stored=False).render(turns)
    assert "assistant\nassistant<|im_end|>" in rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] | trim }}",
        "{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content == 'x' }}{% endfor %}",
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{% set all = messages %}{{ all[0].content }}",
        "{{ messages }}",
        "{{ messages[0].content.strip() }}",
        "{{ strftime_now('%d') }}",
    ],
)
@pytest.mark.usefixtures("home")
def test_templates_that_look_at_contents_have_no_outlines(source: str) -> None:
    assert not only_inserts_contents(source)
    turns = [{"role": "user", "content": " a "}]
    outlined, plain = (template(source, is_stored) for is_stored in (True, False))
    assert outlined.render(turns) == plain.render(turns)


@pytest.mark.usefixtures("home")
def test_an_invalid_template_is_an_error_at_every_start() -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="the chat template in folder is invalid"):
            template("{% if %}", is_stored=True)
