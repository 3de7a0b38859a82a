"""Chats as tokens: every token of a rendered chat with its turn, its role, and whether it is content or template.

Works with any tokenizer that has a chat template: the template is rendered once more with marker words in the place of the contents,
which shows where each turn's own text stands.  No token ids, role names or template strings are known here in advance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lqa.errors import LqaError

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]
Span = str | Sequence[int]

ROLES = ("system", "user", "assistant")
PREAMBLE = -1  # the turn of what a template puts before the first turn: BOS, a default system prompt

# For base models: a tokenizer that brings no template of its own is given this one.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}{{ eos_token or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Token(NamedTuple):
    """One token of a rendered chat."""

    id: int
    text: str  # the piece of the rendered text that it covers
    turn: int  # counted from 0; PREAMBLE (-1) for what the template itself put in front
    role: str  # the turn's role; "system" for the preamble, "assistant" is never given to a generation header
    content: bool  # False: a token of the template


@dataclass(frozen=True)
class Rendered:
    """A chat as the model receives it: `text` and its `tokens` (the generation header of a last user turn included)."""

    chat: tuple[tuple[str, str], ...]  # (role, content)
    text: str
    tokens: tuple[Token, ...]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)


def check_chat(chat: Chat) -> Chat:
    """Returns `chat` as plain role/content dicts.  Raises LqaError for anything that is not a chat with text in it."""
    if not isinstance(chat, list | tuple) or not chat:
        raise LqaError('A chat is a non-empty list of {"role": ..., "content": ...} messages.')
    for i, message in enumerate(chat):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise LqaError(f'Message {i} of the chat must be a mapping with the keys "role" and "content".')
        if message["role"] not in ROLES:
            raise LqaError(f"Message {i} has the role {message['role']!r}; use one of {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise LqaError(f"The content of message {i} must be text, not {type(message['content']).__name__}.")
        if message["role"] == "user" and not message["content"].strip():
            raise LqaError(f"The user's message (message {i}) is empty; write some text in it.")
    return [{"role": m["role"], "content": m["content"]} for m in chat]


def check_text(tokenizer, text: str, what: str) -> str:
    """Returns `text`.  Raises LqaError if it holds a special token of the model, which would be read as one (an injected turn, say), or
    half a character (a lone surrogate), which no tokenizer takes."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise LqaError(f"{what} contains half a character (a lone UTF-16 surrogate); remove it.")
    if found := next((t for t in special_tokens(tokenizer) if t in text), None):
        raise LqaError(f"{what} contains the model's special token {found!r} as text; remove it or write it otherwise.")
    return text


def ensure_template(tokenizer) -> None:
    """Gives a tokenizer without a chat template the plain one, so that base models can be read too."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = PLAIN_TEMPLATE


def _template(tokenizer, chat: Chat, generation: bool, **options) -> str:
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation, **options)
    except Exception as error:  # templates raise jinja2 errors of many kinds, all with a message for people
        raise LqaError(f"The model's chat template refuses this chat: {error}") from error


def _marked(chat: Chat) -> tuple[Chat, list[str]]:
    # Marker words must be text that no template trims, escapes or looks into.
    markers = [f"LQAMARK{chr(65 + i // 26)}{chr(65 + i % 26)}KRAMAQL" for i in range(len(chat))]
    return [{"role": m["role"], "content": mark} for m, mark in zip(chat, markers, strict=True)], markers


def _skeleton(tokenizer, chat: Chat, generation: bool, **options) -> list[str]:
    """The n + 1 pieces of template text before, between and behind the n contents of `chat`; `options` go to the template."""
    marked, markers = _marked(chat)
    text, pieces = _template(tokenizer, marked, generation, **options), []
    for marker in markers:
        head, found, text = text.partition(marker)
        if not found:
            raise LqaError("The model's chat template does not show every message of the chat; turns cannot be told apart.")
        pieces.append(head)
    return [*pieces, text]


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def special_tokens(tokenizer) -> list[str]:
    """Every special token of the tokenizer; `all_special_tokens` knows only those with a name (bos, eos, ...), not Llama 3's headers."""
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return [t for t in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if t.strip()]


def _closing(tokenizer, piece: str, alone: str) -> int:
    """How many characters of `piece`, which follows a turn in the middle, close it; `alone` closes the same turn at the end of a chat."""
    specials = special_tokens(tokenizer)
    first, other = (next((t for t in specials if text.startswith(t)), "") for text in (piece, alone))
    # gpt-oss closes the last turn with another special token than the earlier ones; a header must follow, or it is the header.
    if first and other and first != other and any(piece.startswith(t, len(first)) for t in specials):
        return len(first)
    return _common_prefix(piece, alone)


def _header(tokenizer, role: str) -> str | None:
    """The text with which the template opens a turn of `role`, found between two turns; None where it cannot be told."""
    previous = "assistant" if role == "user" else "user"
    chat = [{"role": r, "content": ""} for r in (["user"] if previous == "assistant" else []) + [previous, role]]
    try:
        between = _skeleton(tokenizer, chat, False)[-2]
        closing = _skeleton(tokenizer, chat[:-1], False)[-1]
    except LqaError:
        return None
    return between[_closing(tokenizer, between, closing) :]


def _contents(text: str, pieces: list[str], chat: Chat) -> list[str]:
    """The contents as they stand in the rendered `text`: as given, trimmed by the template, or else found by matching."""
    for change in (str, str.strip):
        contents = [change(m["content"]) for m in chat]
        if pieces[0] + "".join(c + p for c, p in zip(contents, pieces[1:], strict=True)) == text:
            return contents
    match = re.fullmatch("(.*?)".join(map(re.escape, pieces)), text, re.DOTALL)
    if match is None:
        raise LqaError("The model's chat template rewrites this chat so that its turns cannot be found in the result.")
    return list(match.groups())


def render(tokenizer, chat: Chat) -> Rendered:
    """Renders and tokenizes `chat`; a generation header is added when the last turn is the user's (or the system's).

    Raises LqaError for a malformed chat, one that contains a special token of the model as text, or a template that hides turns.
    """
    chat = check_chat(chat)
    if not getattr(tokenizer, "is_fast", False):
        raise LqaError("This model's tokenizer cannot say which characters a token covers; a fast tokenizer is needed.")
    for i, message in enumerate(chat):
        check_text(tokenizer, message["content"], f"Message {i}")
    generation = chat[-1]["role"] != "assistant"
    text = _template(tokenizer, chat, generation)
    pieces = _skeleton(tokenizer, chat, generation)
    contents = _contents(text, pieces, chat)

    # Cut the text into (end, turn, is content): the piece between two contents closes one turn and opens the next.
    header = _header(tokenizer, chat[0]["role"])
    if header is None or (chat[0]["role"] == "system" and not pieces[0].endswith(header)):
        # a role that may not stand in the middle, or looks different there (Gemma's system): it opens the text, after BOS at most
        header = pieces[0].removeprefix(tokenizer.bos_token or "\0")
    own = len(header) if pieces[0].endswith(header) else 0
    cuts = [(len(pieces[0]) - own, PREAMBLE, False), (len(pieces[0]), 0, False)]
    for turn, content in enumerate(contents):
        cuts.append((cuts[-1][0] + len(content), turn, True))
        piece = pieces[turn + 1]
        closing = len(piece)
        if turn + 1 < len(chat):
            try:
                closing = _closing(tokenizer, piece, _skeleton(tokenizer, chat[: turn + 1], False)[-1])
            except LqaError:
                closing = 0  # a turn that the template does not show alone (Gemma's system): what follows opens the next
        end = cuts[-1][0]
        cuts += [(end + closing, turn, False), (end + len(piece), min(turn + 1, len(chat) - 1), False)]

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, cut = [], 0
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while cut < len(cuts) - 1 and cuts[cut][0] <= start:
            cut += 1
        reach = cut  # " user" may join the template's space and the content's first word: it is content
        while reach < len(cuts) - 1 and cuts[reach][0] < end and not cuts[reach][2]:
            reach += 1
        shown = cuts[reach][2] and cuts[reach][0] > cuts[reach - 1][0]
        _, turn, content = cuts[reach if shown else cut]
        role = "system" if turn == PREAMBLE else chat[turn]["role"]
        tokens.append(Token(token_id, text[start:end], turn, role, content))
    return Rendered(tuple((m["role"], m["content"]) for m in chat), text, tuple(tokens))


def resolve_span(span: Span, rendered: Rendered) -> list[int]:
    """The token indices that `span` selects (DESIGN's forms), sorted, without position 0 (an activation sink).

    Raises LqaError for a span that cannot be read, lies outside the chat, or selects nothing.
    """
    n, turns = len(rendered), len(rendered.chat)
    if isinstance(span, str):
        text = span.strip()
        if text == "all":
            chosen = range(n)
        elif text in ROLES:
            chosen = [i for i, t in enumerate(rendered.tokens) if t.role == text]
        elif match := re.fullmatch(r"(turn|from):(-?\d+)", text):
            turn = int(match[2]) + (turns if int(match[2]) < 0 else 0)
            if not 0 <= turn < turns:
                raise LqaError(f"The span {span!r} names a turn that is not there; the chat has the turns 0 to {turns - 1}.")
            last = turn if match[1] == "turn" else turns
            chosen = [i for i, t in enumerate(rendered.tokens) if turn <= t.turn <= last]
        elif match := re.fullmatch(r"last:(\d+)", text):
            chosen = range(max(0, n - int(match[1])), n)
        elif match := re.fullmatch(r"(\d+):(\d+)", text):
            if int(match[2]) > n:
                raise LqaError(f"The span {span!r} ends behind the chat, which has {n} tokens (0 to {n - 1}).")
            chosen = range(int(match[1]), int(match[2]))
        else:
            raise LqaError(
                f"The span {span!r} is not understood; use all, system, user, assistant, turn:T, from:T, last:N, A:B or a list of indices."
            )
    else:
        chosen = list(span)
        if wrong := [i for i in chosen if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n]:
            raise LqaError(f"The span holds {wrong[0]!r}; token indices of this chat are the integers 0 to {n - 1}.")
    indices = sorted({i for i in chosen if i > 0})
    if not indices:
        raise LqaError(f"The span {span!r} selects no token of this chat (position 0 belongs to no span); choose another.")
    return indices


def visible_text(rendered: Rendered, indices: list[int]) -> str:
    """The turns that a span touches, as text: what a reference without activations is given."""
    hidden = hidden_turns(rendered, indices)
    visible = [f"{role.capitalize()}: {content}" for i, (role, content) in enumerate(rendered.chat) if i not in hidden]
    return "\n".join(visible) or "(nothing is visible)"


def hidden_turns(rendered: Rendered, indices: list[int]) -> set[int]:
    """The hidden context of a reading: the turns that lie wholly outside its span."""
    seen = {rendered.tokens[i].turn for i in indices}
    return set(range(len(rendered.chat))) - seen
