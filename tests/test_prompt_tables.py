"""Tables of prompts: rows however they are written, faults with their place, and which column is taken."""

from __future__ import annotations

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
from prompt_file import ASKED, SEAS, fault, lines, read, texts

from dynatree_core.errors import InputError
from dynatree_core.text.prompt_files import read_prompts

__all__ = ["fault", "read"]  # fixtures


def test_parquet(read, tmp_path):
    rows = [{"question": "Two and three?", "answer": "5"}, {"question": "Four and five?", "answer": "9"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    assert texts(read_prompts(tmp_path / "rows")) == ["Two and three?", "Four and five?"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"question": None}]), tmp_path / "rows")
    with pytest.raises(InputError, match=r'rows, row 3: "question" must be a text .*, got null'):
        read_prompts(tmp_path / "rows")


@pytest.mark.parametrize(
    "content",
    [
        '"Which sea is the saltiest?"\n"Wie heißt der See?"\n',
        json.dumps(ASKED),
        "\n \n" + lines(SEAS).replace("\n", "\n\n"),
        "".join(json.dumps(row, indent=2) for row in SEAS),
        json.dumps({"data": SEAS}),
        json.dumps({"prompts": ASKED}),
        '"prompt"\n' + "".join(f'"{text}"\n' for text in ASKED),
        json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(SEAS)]}),
        "sep=;\nPrompt;Category\n" + "".join(f"{row['prompt']};{row['category']}\n" for row in SEAS),
        "Prompt,Category\n" + "".join(f"{row['prompt']},{row['category']}\n" for row in SEAS),
    ],
    ids=["texts", "list of texts", "blank lines", "jq", "data", "prompts", "quoted", "server", "Excel", "capitals"],
)  # fmt: skip
def test_ways_to_write_rows(read, content):
    assert texts(read(content)) == ASKED


PROSE = [
    "[Chapter 1]\n\nIt rained.",
    "In short, text\nwith commas, here, and there",
    "Roses are red, violets are blue\n" * 2,
    "{% for m in messages %}",
    "[[Link]] is a town.",
    "Prompt, he said.",
    '"Well," he said.\n"No."',
    "text",
    "a\tb and c\n",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_no_table(read, text):
    found = read(text)
    assert found.is_text
    assert texts(found) == [text.strip()]


FAULTS = {
    "a cut line": ('{"prompt": "a"}\n{"prompt": "b\n', 'line 2, column 12: must be JSON, got \'{"prompt": "b\''),
    "a line that is none": (lines(SEAS) + "oops\n", "line 3, column 1: must be JSON, got 'oops'"),
    "a first line that is none": ("oops\n" + lines(SEAS), "line 1, column 1: must be JSON, got 'oops'"),
    "Python's spelling": ("{'prompt': 'a'}\n", "line 1, column 2: must be JSON"),
    "within a list": ('[{"prompt": "a"},\n {"prompt": b}]', "line 2, column 13: must be JSON"),
    "a number": ('{"prompt": "a"}\n{"prompt": 7}\n', 'line 2: "prompt" must be a text or a list'),
    "numbers": ('{"prompt": [1, 2]}\n', "a list with the number 1 in it; token ids must be turned into text first"),
    "a list of numbers": ("[1, 2]", "line 1: must be an object with columns or a text, got the number 1"),
    "null": (
        '{"prompt": "a"}\n{"prompt": null}\n',
        'line 2: "prompt" must be a text or a list of turns or messages, got null',
    ),
    "blank": ('{"prompt": "a"}\n{"prompt": " "}\n', 'line 2: "prompt" must have at least one character'),
    "another column": (
        '{"prompt": "a"}\n{"text": "b"}\n',
        'line 2: must have a "prompt" as the other rows, got the columns text',
    ),
    "no column": ('{"words": "a"}\n', "got the columns words; name one with --column"),
    "half an emoji": (
        '{"prompt": "a"}\n{"prompt": "b \\ud83c"}\n',
        'line 2, column 15: "prompt" must be text, got half a',
    ),
    "its other half": ('[{"prompt": "\\ud83c\\udf32 \\uDF32"}]', "line 1, column 27: "),
    "NUL in JSON": ('{"prompt": "b\\u0000"}\n', 'line 1, column 14: "prompt" must be text, got a NUL character'),
    "a ragged row": (
        "id,prompt\n1,a\n2,b,c\n",
        "line 3: must have 2 cells, as the first line says (id, prompt), got 3",
    ),
    "an open quote": ('id,prompt\n1,"a\n2,b\n', "line 2: must be a row of a table"),
    "nothing": ("", "must have at least one prompt, got none"),
    "blanks": ("\r\n \n\t", "must have at least one prompt, got none"),
    "a mark alone": ("\ufeff", "must have at least one prompt, got none"),
    "a column twice": ("prompt,prompt\na,b\n", "line 1: must name each column once, got 'prompt' twice"),
    "a comment before": ('# of May\n{"prompt": "a"}\n', "line 1, column 1: must be JSON, got '# of May'"),
    "an empty list": ("[]", "must have at least one row, got none"),
    "an empty object": ("{}", "got the columns none"),
    "a list as an id": ('{"prompt": "a", "id": [1]}\n', 'line 1: "id" must be a text or a number, got a list'),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "got parts of image_url"),
    "no role": ('{"messages": [{"content": "a"}]}', 'must have a "role" or "from", got one with content'),
    "a tool": ('{"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]}', "of 'tool'"),
    "too deep": ('{"a":' * 100_000, "line 1, column 1: must be JSON that can be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_with_their_place(fault, name):
    content, said = FAULTS[name]
    assert said in fault(content)


def test_one_bad_line_among_thousands(fault):
    rows = [{"prompt": f"number {i}"} for i in range(5000)]
    bad = lines(rows[:4000]) + '{"prompt": "x",}\n' + lines(rows[4000:])
    assert re.match(r"file, line 4001, column 1[56]: must be JSON", fault(bad))  # one Python counts from the comma
    table = "id,prompt\n" + "".join(f"{i},number {i}\n" for i in range(3000)) + "1,a,b\n"
    assert fault(table).startswith("file, line 3002: must have 2 cells")


def test_a_long_cell_and_a_line_of_two_million_characters(read):
    long = "word " * 400_000
    assert texts(read(f'id,prompt\n1,"{long}"\n')) == [long]
    assert texts(read(json.dumps({"prompt": long}))) == [long]
    assert len(read(long).prompts) > 700


ROWS = {
    "HumanEval": ({"task_id": "HumanEval/3", "prompt": "def f():\n", "test": "pass"}, "def f():\n"),
    "Spec-Bench": ({"question_id": 81, "category": "writing", "turns": ["First?", "Then?"]}, "First?"),
    "MT-Bench on the hub": ({"prompt_id": 7, "prompt": ["First?", "Then?"]}, "First?"),
    "GSM8K": ({"question": "How many?", "answer": "4"}, "How many?"),
    "ShareGPT": (
        {
            "id": "x",
            "conversations": [
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "First?"},
                {"from": "gpt", "value": "Yes."},
                {"from": "human", "value": "Then?"},
            ],
        },
        "First?",
    ),
    "LMSYS": (
        {"conversation": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "A"}]},
        "First?",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "A"}]},
        "First?",
    ),
    "OpenAI's batches": (
        {
            "custom_id": "r-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "Short."},
                    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                ],
            },
        },
        "Why?",
    ),
    "their completions": ({"custom_id": "r-1", "body": {"model": "m", "prompt": "Once"}}, "Once"),
    "Alpaca": ({"instruction": "Sum up.", "input": "A text.", "output": "T", "text": "Below is"}, "Sum up.\n\nA text."),
    "Alpaca without input": ({"instruction": "Name one.", "input": "", "output": "T"}, "Name one."),
    "Dolly": ({"instruction": "Who?", "context": "A tale.", "response": "He"}, "Who?\n\nA tale."),
    "text": ({"text": "A short text."}, "A short text."),
    "a conversation alone": ([{"role": "user", "content": "First?"}], "First?"),
}


@pytest.mark.parametrize("name", ROWS)
def test_columns_as_benchmarks_hand_them_out(read, name):
    row, text = ROWS[name]
    assert texts(read(lines([row, row]))) == [text] * 2
    assert texts(read(json.dumps([row]) if isinstance(row, dict) else json.dumps(row), name="one")) == [text]


def test_what_was_said_before_and_later(read):
    said = [{"role": role, "content": words} for role, words in (("system", "S"), ("user", "a"), ("assistant", "b"))]
    [prompt] = read(json.dumps({"messages": [*said, {"role": "user", "content": "c"}]})).prompts
    assert (prompt.messages, prompt.later) == ([*said, {"role": "user", "content": "c"}], ())
    [prompt] = read(json.dumps({"conversations": [*said, {"role": "user", "content": "c"}]})).prompts
    assert (prompt.messages, prompt.later) == (said[:2], ("c",))
    [prompt] = read(json.dumps({"turns": ["a", "c"], "prompt": "other"}), is_played=True).prompts
    assert (prompt.text, prompt.later) == ("a", ("c",))
    [prompt] = read(json.dumps({"system_prompt": "S", "question": "a"})).prompts
    assert prompt.messages == said[:2]


def test_a_named_column(read, fault):
    rows = lines([{"prompt": "a", "hint": "b"}])
    assert texts(read(rows, column="hint")) == ["b"]
    assert "must have the column 'hnt', got the columns prompt, hint (did you mean 'hint'?)" in fault(
        rows, column="hnt"
    )
    assert texts(read("id,words\n1,a\n", column="words")) == ["a"]
    assert (
        fault("It rained. It rained.", column="words") == "file must be a table with a column 'words', got running text"
    )
    assert "got the columns id, words" in fault("id,words\n1,a\n2,b\n")
    assert "got the columns id, words" in fault("id,words one\n1,a\n", name="x.csv")


def test_ids_and_categories(read):
    rows = [{"prompt": "a", "id": None, "category": None}, {"prompt": "b", "id": 7}, {"prompt": "c", "question_id": 7}]
    found = read(lines(rows), name="mine.jsonl").prompts
    assert [(prompt.prompt_id, prompt.category) for prompt in found] == [
        ("mine-0000", "mine"), ("7", "mine"), ("mine-7", "mine"),
    ]  # fmt: skip
    assert [prompt.where.rpartition(os.sep)[2] for prompt in found] == [f"mine.jsonl, line {i}" for i in (1, 2, 3)]


def test_what_requests_to_a_server_set_is_told_not_to_be_applied(read):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": False}
    assert not read(lines([{"body": body}, {"body": {**body, "seed": None}}, {"body": body["messages"][0]}])).notes
    found = read(lines([{"body": body}, {"body": {**body, "temperature": 0.5, "max_tokens": 2}}]))
    [note] = found.notes
    assert (
        note.partition(": ")[2]
        == "what its requests set is not applied (max_tokens, temperature); give options instead"
    )


def test_silent_conversations_are_left_out_and_counted(read):
    rows = [{"conversations": []}, {"conversations": [{"from": "human", "value": "a"}]}]
    found = read(lines(rows))
    assert texts(found) == ["a"]
    assert [note.partition(": ")[2] for note in found.notes] == [
        "1 of 2 rows are left out, in which no user says anything"
    ]
