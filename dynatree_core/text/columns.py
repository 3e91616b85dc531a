"""A row to a prompt: which column holds it, as benchmarks and other programs hand them out, and what it must be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from dynatree_core.errors import InputError, nearest_match
from dynatree_core.text.reading import first_fault
from dynatree_core.text.tables import Row

__all__ = ["COLUMNS", "TEXT", "Message", "Prompt", "column_of", "columns_of", "prompt_of", "settings_beside"]

TEXT = "text"  # the column of running text
# columns that hold a prompt, the first that a file has is read
COLUMNS = (
    "prompt",  # HumanEval, UltraChat, MT-Bench on the hub
    "turns",  # Spec-Bench, MT-Bench
    "conversations",  # ShareGPT
    "conversation",  # LMSYS-Chat, WildChat
    "messages",  # chat data
    "instruction",  # Alpaca, with "input"; Dolly, with "context"
    "question",  # GSM8K
    "query",
    "problem",  # MATH
    TEXT,
    "body",  # OpenAI's batches
    "input",
    "content",
)
PLAYED = ("turns", "conversations", "conversation", "messages")  # whole conversations, which are preferred to play them
REQUESTS = ("prompt", "messages", "body", "input")  # whose last words, where they are the user's, are to be answered
NO_SETTINGS = ("messages", "prompt", "input", "model", "stream")  # fields of a request that do not change its answer
IDS = ("custom_id", "question_id", "task_id", "prompt_id", "conversation_id")  # beside "id"
SYSTEM = ("system", "system_prompt")
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip

Message = tuple[str, str]  # role and content


@attrs.frozen
class Prompt:
    """What is asked: the last words of the user, what was said before, and what the user says next."""

    prompt_id: str
    category: str
    text: str
    before: tuple[Message, ...] = ()
    later: tuple[str, ...] = ()  # the user's, where the conversation is played
    where: str = attrs.field(default="", eq=False)  # it stands: file and line

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to where an answer is due, as a chat template takes it."""
        return [{"role": role, "content": content} for role, content in (*self.before, ("user", self.text))]


def columns_of(row: Row) -> dict[str, Any]:
    """A row's columns by their names in small letters; a text alone is a prompt, a list of messages a conversation.

    Raises:
        InputError: it is something else.
    """
    value = row.value
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return {"messages": value}
    if not isinstance(value, Mapping):
        raise InputError(f"{row.where}: must be an object with columns or a text, got {_kind(value)}")
    return {str(name).strip().lower(): one for name, one in value.items()}


def column_of(rows: Sequence[Row], asked: str | None, *, is_played: bool) -> str:
    """The column in which the prompts are: the one that is asked for, or the first known one of the first row.

    Raises:
        InputError: no such column; names those that there are.
    """
    first = columns_of(rows[0])
    there = f"got the columns {', '.join(first) or 'none'}"
    if asked is not None:
        name = asked.strip().lower()
        if not any(name in columns_of(row) for row in rows):
            raise InputError(
                f"{rows[0].where}: must have the column '{asked}', {there}{nearest_match(name, first)}; give another "
                "--column"
            )
        return name
    order = (*PLAYED, *COLUMNS) if is_played else COLUMNS
    found = next((name for name in order if first.get(name) is not None), None)
    if found is None:
        found = next((name for name in order if name in first), None)
    if found is None:
        raise InputError(
            f"{rows[0].where}: must have a column with a prompt ({', '.join(COLUMNS)}), {there}; name one with --column"
        )
    return found


def prompt_of(row: Row, column: str, name: str, index: int) -> Prompt | None:
    """A row's prompt; None where it is a conversation in which no user speaks.

    Args:
        row: where it stands.
        column: in which column.
        name: the file's, for prompts without an id and without a category.
        index: of the row, from 0.

    Raises:
        InputError: the column is missing, or holds no prompt.
    """
    columns = columns_of(row)
    if column not in columns:
        raise InputError(
            f'{row.where}: must have a "{column}" as the other rows, got the columns {", ".join(columns) or "none"}'
        )
    value = columns[column]
    if isinstance(value, str) and column != "text" and value.lstrip().startswith("[") and column in PLAYED:
        value = _listed(value, column, row)
    said = _said(value, column, row)
    if said is None:
        return None
    before, text, later = said
    if column == "instruction":
        extra = columns.get("input") or columns.get("context")
        text = f"{text}\n\n{_checked(extra, 'input', row)}" if isinstance(extra, str) and extra.strip() else text
    system = next((columns[one] for one in SYSTEM if isinstance(columns.get(one), str) and columns[one].strip()), None)
    if system is not None and not any(role == "system" for role, _ in before):
        before = (("system", _checked(system, "system", row)), *before)
    return Prompt(
        prompt_id=_id(columns, name, index, row),
        category=_label(columns.get("category"), "category", row) or name,
        text=text, before=before, later=later, where=row.where,
    )  # fmt: skip


def settings_beside(rows: Sequence[Row], column: str) -> list[str]:
    """What requests to a server set for their answers, such as a temperature, which nobody reads here."""
    if column != "body":
        return []
    bodies = [columns_of(row).get(column) for row in rows]
    requests = [body for body in bodies if isinstance(body, Mapping) and not {"role", "from"} & {*body}]
    names = {str(name) for body in requests for name, value in body.items() if value is not None}
    return sorted(names - {*NO_SETTINGS})


def _id(columns: Mapping[str, Any], name: str, index: int, row: Row) -> str:
    own = _label(columns.get("id"), "id", row)
    if own is not None:
        return own
    for other in IDS:
        if (found := _label(columns.get(other), other, row)) is not None:
            return f"{name}-{found}"  # such numbers are often the same in two files
    return f"{name}-{index:04d}"


def _label(value: Any, column: str, row: Row) -> str | None:
    """An id or a category; None where there is none."""
    if value is None or value == "" or value != value:  # NaN, as tables of numbers have it for what is missing
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f'{row.where}: "{column}" must be a text or a number, got {_kind(value)}')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _checked(str(value), column, row)


Said = tuple[tuple[Message, ...], str, tuple[str, ...]]  # before, text, later


def _said(value: Any, column: str, row: Row) -> Said | None:
    if isinstance(value, str):
        return (), _checked(value, column, row), ()
    if isinstance(value, Mapping):
        return _said_in_an_object(value, column, row)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if all(isinstance(one, str) for one in value):
            turns = [_checked(one, column, row) for one in value]
            return ((), turns[0], tuple(turns[1:])) if turns else None
        if all(isinstance(one, Mapping) for one in value):
            return _conversation(value, column, row)
        wrong = next(one for one in value if not isinstance(one, str))
        raise InputError(
            f'{row.where}: "{column}" must hold texts or messages, got a list with {_kind(wrong)} in it{_hint(wrong)}'
        )
    raise InputError(f'{row.where}: "{column}" must be a text or a list of turns or messages, got {_kind(value)}')


def _said_in_an_object(value: Mapping[str, Any], column: str, row: Row) -> Said | None:
    """A single message, or the body of a request to a server."""
    if "role" in value or "from" in value:
        return _conversation([value], column, row)
    for name in ("messages", "prompt", "input"):
        if name in value:
            return _said(value[name], name if name == "messages" else "prompt", row)
    raise InputError(
        f'{row.where}: "{column}" must be a text or have messages or a prompt in it, got an object with '
        f"{', '.join(map(str, value)) or 'nothing'}"
    )


def _conversation(messages: Sequence[Mapping[str, Any]], column: str, row: Row) -> Said | None:
    """Of a request all that was said, where the user has the last word; else the first turn, and the later ones."""
    roles = [_role(message, column, row) for message in messages]
    asked = [index for index, role in enumerate(roles) if role == "user"]
    if not asked:
        return None
    is_request = column in REQUESTS and roles[-1] == "user"
    last = asked[-1] if is_request else asked[0]
    before = [
        (roles[index], _content(messages[index], column, row))
        for index in range(last)
        if is_request or roles[index] == "system"  # ShareGPT's conversations may begin with an answer
    ]
    if strange := [role for role, _ in before if role not in ("system", "user", "assistant")]:
        raise InputError(
            f'{row.where}: "{column}" must be said by a system, user and assistant, got a message of {strange[0]!r}'
        )
    later = () if is_request else tuple(_content(messages[index], column, row) for index in asked[1:])
    return tuple(before), _content(messages[last], column, row), later


def _role(message: Mapping[str, Any], column: str, row: Row) -> str:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise InputError(
            f'{row.where}: each message of "{column}" must have a "role" or "from", got one with '
            f"{', '.join(map(str, message)) or 'nothing'}"
        )
    return ROLES.get(role.lower(), role)


def _content(message: Mapping[str, Any], column: str, row: Row) -> str:
    """What a message says; of several parts those that are text, which all must be."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            kinds = ", ".join(str(part.get("type")) for part in content if isinstance(part, Mapping))
            raise InputError(
                f'{row.where}: messages of "{column}" must be text, got parts of {kinds or "another kind"}'
            )
        content = "\n".join(map(str, parts))
    if not isinstance(content, str):
        raise InputError(f'{row.where}: each message of "{column}" must be a text, got {_kind(content)}')
    return _checked(content, column, row)


def _listed(text: str, column: str, row: Row) -> Any:
    """The list in a table's cell."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f'{row.where}: "{column}" must be a JSON list in a table, got {text[:60]!r} ({error})'
        ) from error


def _checked(text: str, column: str, row: Row) -> str:
    if (fault := first_fault(text)) is not None:
        offset, kind = fault
        spelling = rf"(?i)\\u{ord(text[offset]):04x}"
        if "\ud800" <= text[offset] <= "\udbff":
            spelling += r"(?!\\ud[c-f])"
        elif text[offset] != "\0":
            spelling = r"(?i)(?<!\\ud[89ab]..)" + spelling[4:]
        raise InputError(
            f'{row.where_of(re.compile(spelling))}: "{column}" must be text, got {kind} at its character {offset + 1}; '
            "mend or leave out the row"
        )
    return text


def _kind(value: Any) -> str:
    """What came, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value!s:.40}"
    if isinstance(value, (bytes, bytearray)):
        return "bytes"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "a list" if value else "an empty list"
    return f"{type(value).__name__} {value!s:.40}"


def _hint(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "; token ids must be turned into text first" if is_number else ""
