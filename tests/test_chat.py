"""Chats as tokens: turns, roles, content flags and spans on every style of chat template."""

import pytest

from lqa.chat import PREAMBLE, check_chat, ensure_template, hidden_turns, render, resolve_span
from lqa.errors import LqaError

STYLES = ["chatml", "llama3", "qwen3", "gemma", "mistral", "harmony", "none"]


def chat_of(*turns):
    return [{"role": {"s": "system", "u": "user", "a": "assistant"}[r], "content": text} for r, text in turns]


def rendered_of(tokenizer, *turns):
    ensure_template(tokenizer)
    return render(tokenizer, chat_of(*turns))


def runs(rendered):
    """Neighbouring tokens of one turn, role and kind as one entry: (turn, role's initial, "text" if content else "-", text)."""
    out = []
    for t in rendered.tokens:
        key = (t.turn, t.role[0], "text" if t.content else "-")
        if out and out[-1][:3] == key:
            out[-1] = (*key, out[-1][3] + t.text)
        else:
            out.append((*key, t.text))
    return out


LONG = (("s", "Be brief."), ("u", "Hi."), ("a", "Yo."), ("u", "Zap?"))
EXPECTED = {
    "chatml": [
        (0, "s", "-", "<|im_start|>system\n"),
        (0, "s", "text", "Be brief."),
        (0, "s", "-", "<|im_end|>\n"),
        (1, "u", "-", "<|im_start|>user\n"),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "<|im_end|>\n"),
        (2, "a", "-", "<|im_start|>assistant\n"),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "<|im_end|>\n"),
        (3, "u", "-", "<|im_start|>user\n"),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
    "llama3": [
        (PREAMBLE, "s", "-", "<|begin_of_text|>"),
        (0, "s", "-", "<|start_header_id|>system<|end_header_id|>\n\n"),
        (0, "s", "text", "Be brief."),
        (0, "s", "-", "<|eot_id|>"),
        (1, "u", "-", "<|start_header_id|>user<|end_header_id|>\n\n"),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "<|eot_id|>"),
        (2, "a", "-", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "<|eot_id|>"),
        (3, "u", "-", "<|start_header_id|>user<|end_header_id|>\n\n"),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
    "gemma": [
        (PREAMBLE, "s", "-", "<bos>"),
        (0, "s", "-", "<start_of_turn>user\n"),
        (0, "s", "text", "Be brief."),
        (1, "u", "-", "\n\n"),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "<end_of_turn>\n"),
        (2, "a", "-", "<start_of_turn>model\n"),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "<end_of_turn>\n"),
        (3, "u", "-", "<start_of_turn>user\n"),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "<end_of_turn>\n<start_of_turn>model\n"),
    ],
    "mistral": [
        (PREAMBLE, "s", "-", "<s>"),
        (0, "s", "-", "[INST] "),
        (0, "s", "text", "Be brief."),
        (1, "u", "-", "\n\n"),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "[/INST]"),
        (2, "a", "-", " "),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "</s>"),
        (3, "u", "-", "[INST] "),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "[/INST]"),
    ],
    "harmony": [
        (PREAMBLE, "s", "-", "<|start|>system<|message|>You are ChatGPT, a large language model.\nKnowledge cutoff: 2024-06<|end|>"),
        (0, "s", "-", "<|start|>developer<|message|># Instructions\n\n"),
        (0, "s", "text", "Be brief."),
        (0, "s", "-", "\n\n<|end|>"),
        (1, "u", "-", "<|start|>user<|message|>"),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "<|end|>"),
        (2, "a", "-", "<|start|>assistant<|channel|>final<|message|>"),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "<|end|>"),
        (3, "u", "-", "<|start|>user<|message|>"),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "<|end|><|start|>assistant"),
    ],
    "none": [
        (PREAMBLE, "s", "-", "<s>"),
        (0, "s", "-", "System: "),
        (0, "s", "text", "Be brief."),
        (0, "s", "-", "</s>\n"),
        (1, "u", "-", "User: "),
        (1, "u", "text", "Hi."),
        (1, "u", "-", "</s>\n"),
        (2, "a", "-", "Assistant: "),
        (2, "a", "text", "Yo."),
        (2, "a", "-", "</s>\n"),
        (3, "u", "-", "User: "),
        (3, "u", "text", "Zap?"),
        (3, "u", "-", "</s>\nAssistant:"),
    ],
}
EXPECTED["qwen3"] = EXPECTED["chatml"]


@pytest.mark.parametrize("style", STYLES)
def test_every_token_has_its_turn_role_and_kind(style, tokenizer_of):
    assert runs(rendered_of(tokenizer_of(style), *LONG)) == EXPECTED[style]


@pytest.mark.parametrize("style", STYLES)
def test_tokens_are_the_model_s_own_rendering(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    rendered = rendered_of(tokenizer, *LONG)
    own = tokenizer.apply_chat_template(chat_of(*LONG), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendered.ids == own and len(rendered) == len(own)
    assert "".join(t.text for t in rendered.tokens) == rendered.text == tokenizer.decode(own, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("style", [s for s in STYLES if s != "none"])
def test_bos_is_never_doubled(style, tokenizer_of):
    tokenizer = tokenizer_of(style)
    ids = rendered_of(tokenizer, ("u", "Hi.")).ids
    assert tokenizer.bos_token_id not in ids[1:] or style == "chatml"  # there BOS is the header of every turn
    assert ids[0] != ids[1]


def test_a_default_system_prompt_is_preamble(tokenizer_of):
    rendered = rendered_of(tokenizer_of("chatml"), ("u", "Hi."))
    assert runs(rendered)[:2] == [
        (PREAMBLE, "s", "-", "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"),
        (0, "u", "-", "<|im_start|>user\n"),
    ]
    assert resolve_span("all", rendered)[0] == 1  # "all" does show it, position 0 apart
    assert {rendered.tokens[i].turn for i in resolve_span("turn:0", rendered)} == {0}


@pytest.mark.parametrize(
    ("style", "opening", "end"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
        ("harmony", "<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    ],
)
def test_a_last_answer_has_the_template_s_own_frame_and_no_header_behind(style, opening, end, tokenizer_of):
    got = runs(rendered_of(tokenizer_of(style), ("u", "Hi."), ("a", "Yo.")))
    assert got[-3:] == [(1, "a", "-", opening), (1, "a", "text", "Yo."), (1, "a", "-", end)]


@pytest.mark.parametrize(
    ("style", "content", "shown"),
    [("llama3", "  Hi.\n", "Hi."), ("gemma", "\tHi. ", "Hi."), ("chatml", "  Hi.\n", "  Hi.\n"), ("none", " Hi. ", " Hi. ")],
)
def test_contents_are_flagged_as_the_template_shows_them(style, content, shown, tokenizer_of):
    rendered = rendered_of(tokenizer_of(style), ("s", "Be brief."), ("u", content))
    assert "".join(t.text for t in rendered.tokens if t.content and t.turn == 1) == shown
    assert rendered.chat[1] == ("user", content)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("content", ["user", "system", "model", "assistant", "User: ", "\n\n", "naïve — 日本 🎉", "{{ 1 + 1 }} {x} (a.*)?"])
def test_contents_that_look_like_template_do_not_confuse(style, content, tokenizer_of):
    turns = [("s", "Be brief."), ("u", "Hi."), ("a", content), ("u", "Zap?")]
    got = runs(rendered_of(tokenizer_of(style), *turns))
    if style in ("llama3", "gemma"):
        shown = content.strip()
    else:
        shown = content.lstrip("\n") if style == "qwen3" else content
    expected = [e if e[:3] != (2, "a", "text") else (*e[:3], shown) for e in EXPECTED[style]]
    # Where the template's space and the first word are one token, it is content: spaces are not compared.
    flat = [[(*e[:3], c) for e in side for c in e[3] if c != " "] for side in (got, expected)]
    if "🎉" in content:  # its text is that of each of the tokens that make it
        flat = [sorted(set(side), key=repr) for side in flat]
    assert flat[0] == flat[1]


def test_a_token_that_joins_the_template_s_space_and_a_word_is_content(tokenizer_of):
    token = rendered_of(tokenizer_of("mistral"), ("u", "Hi."), ("a", "user")).tokens[-2]
    assert token[1:] == (" user", 1, "assistant", True)


def test_a_base_model_without_a_template_is_given_the_plain_one(tokenizer_of):
    tokenizer = tokenizer_of("none")
    ensure_template(tokenizer)
    assert render(tokenizer, chat_of(("u", "Hi."))).text == "<s>User: Hi.</s>\nAssistant:"
    own = tokenizer_of("llama3")
    before = own.chat_template
    ensure_template(own)
    assert own.chat_template == before


# --- spans ------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(tokenizer_of):
    return rendered_of(tokenizer_of("llama3"), *LONG)


def text_of(span, rendered):
    return "".join(rendered.tokens[i].text for i in resolve_span(span, rendered))


HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
SYSTEM, FIRST = HEAD.format("system") + "Be brief.<|eot_id|>", HEAD.format("user") + "Hi.<|eot_id|>"
ANSWER, LAST = HEAD.format("assistant") + "Yo.<|eot_id|>", HEAD.format("user") + "Zap?<|eot_id|>" + HEAD.format("assistant")


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ("all", SYSTEM + FIRST + ANSWER + LAST),
        ("system", SYSTEM),
        ("user", FIRST + LAST),
        ("assistant", ANSWER),
        ("turn:0", SYSTEM),
        ("turn:2", ANSWER),
        ("turn:3", LAST),
        ("turn:-1", LAST),
        ("turn:-4", SYSTEM),
        ("from:0", SYSTEM + FIRST + ANSWER + LAST),
        ("from:2", ANSWER + LAST),
        ("from:-1", LAST),
        (" from:-2 ", ANSWER + LAST),
        ("last:4", HEAD.format("assistant")),
        ("last:9999", SYSTEM + FIRST + ANSWER + LAST),
    ],
)
def test_spans_by_role_turn_and_end(span, text, long):
    length = len(long.text) if span != "last:4" else None
    if length is None:
        assert resolve_span(span, long) == list(range(len(long) - 4, len(long)))
    else:
        assert text_of(span, long) == text


def test_spans_by_index(long):
    assert resolve_span("2:5", long) == [2, 3, 4]
    assert resolve_span("0:3", long) == [1, 2]
    assert resolve_span(f"3:{len(long)}", long) == list(range(3, len(long)))
    assert resolve_span([5, 2, 2, 0], long) == [2, 5]
    assert resolve_span((len(long) - 1,), long) == [len(long) - 1]


@pytest.mark.parametrize("style", STYLES)
def test_position_0_belongs_to_no_span_and_the_header_to_the_last_user_turn(style, tokenizer_of):
    rendered = rendered_of(tokenizer_of(style), *LONG)
    assert resolve_span("all", rendered) == list(range(1, len(rendered)))
    for span in ("system", "turn:0", "from:0"):
        assert 0 not in resolve_span(span, rendered)
    for span in ("user", "turn:-1", "from:-1", "last:1"):
        assert resolve_span(span, rendered)[-1] == len(rendered) - 1
    covered = [i for t in range(4) for i in resolve_span(f"turn:{t}", rendered)]
    preamble = [i for i, t in enumerate(rendered.tokens) if t.turn == PREAMBLE and i]
    assert sorted(covered + preamble) == list(range(1, len(rendered)))  # every token is in one turn


@pytest.mark.parametrize(
    "span", ["turn:4", "turn:-5", "from:4", "0:999", "3:3", "5:2", "0:1", "last:0", [], [0], [-1], [999], [1.0], [True], ["1"]]
)
def test_spans_outside_the_chat_or_empty_are_errors(span, long):
    with pytest.raises(LqaError):
        resolve_span(span, long)


@pytest.mark.parametrize("span", ["", "users", "turn:x", "turn:", "last:-1", "-3:-1", "1:2:3", "1-3"])
def test_spans_that_are_not_of_the_language_are_errors_that_list_it(span, long):
    with pytest.raises(LqaError, match="turn:T, from:T, last:N, A:B"):
        resolve_span(span, long)


def test_a_role_that_is_not_there_selects_nothing(tokenizer_of):
    rendered = rendered_of(tokenizer_of("mistral"), ("u", "Hi."))
    for span in ("assistant", "system"):  # BOS, the only token of the preamble, is position 0
        with pytest.raises(LqaError, match="selects no token"):
            resolve_span(span, rendered)


def test_hidden_turns_lie_wholly_outside_the_span(long):
    assert hidden_turns(long, resolve_span("turn:-1", long)) == {0, 1, 2}
    assert hidden_turns(long, resolve_span("user", long)) == {0, 2}
    assert hidden_turns(long, resolve_span("all", long)) == set()
    partly = resolve_span("system", long)[-1]
    assert hidden_turns(long, [partly]) == {1, 2, 3}


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([], "non-empty list"),
        ("Hi.", "non-empty list"),
        (None, "non-empty list"),
        ([["user", "Hi."]], "Message 0"),
        ([{"role": "user"}], "Message 0"),
        ([{"role": "user", "content": "Hi."}, {"role": "robot", "content": "Yo."}], "'robot'; use one of system, user, assistant"),
        ([{"role": "user", "content": 3}], "must be text, not int"),
        ([{"role": "user", "content": "  \n"}], "is empty"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}], "message 1"),
    ],
)
def test_what_is_not_a_chat_is_an_error_that_says_why(chat, words, tokenizer_of):
    with pytest.raises(LqaError, match=words):
        render(tokenizer_of("chatml"), chat)


def test_check_chat_keeps_role_and_content_only():
    assert check_chat([{"role": "user", "content": "Hi.", "name": "x"}]) == [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize(
    ("style", "token"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|start_header_id|>"),
        ("gemma", "<start_of_turn>"),
        ("harmony", "<|channel|>"),
        ("qwen3", "<|im_start|>"),
    ],
)
def test_a_special_token_typed_as_text_is_an_error_that_names_it(style, token, tokenizer_of):
    with pytest.raises(LqaError) as error:
        render(tokenizer_of(style), chat_of(("s", "Be brief."), ("u", f"What is {token}?")))
    assert repr(token) in str(error.value) and "Message 1" in str(error.value)


def test_a_template_s_refusal_is_our_error(tokenizer_of):
    with pytest.raises(LqaError, match="must alternate"):
        render(tokenizer_of("gemma"), chat_of(("u", "Hi."), ("u", "Zap?")))


def test_a_template_that_hides_a_turn_is_an_error(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
    assert render(tokenizer, chat_of(("u", "Hi."))).text == "Hi.\n"
    with pytest.raises(LqaError, match="turns cannot be told apart"):
        render(tokenizer, chat_of(("s", "Be brief."), ("u", "Hi.")))


def test_a_slow_tokenizer_is_an_error():
    class Slow:
        is_fast = False

    with pytest.raises(LqaError, match="fast tokenizer"):
        render(Slow(), chat_of(("u", "Hi.")))
