"""`dynatree chat`: what is said and remembered, what the commands do, what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import Ran, is_one_error_line
from talk import as_shown, conversation, expected_answers, folders, say, summaries

from dynatree_core.cli.chat_lines import obey_or_answer
from dynatree_core.conversation import Conversation
from dynatree_core.errors import ContextLimitError
from dynatree_core.trace import read

__all__ = ["conversation", "folders", "say"]  # fixtures

# what is said


@pytest.mark.parametrize("policy", ["phase3", "fixed", "autoregressive"])
def test_answers_are_those_of_the_whole_conversation(
    say: Callable[..., Ran], folders: SimpleNamespace, policy: str
) -> None:
    """Only they are on stdout; a line on stderr tells about each, with what was reused of the turns before."""
    said = ("abc", "and then?", "größer")
    ran = say(*said, args=("--policy", policy))
    assert ran.code == 0
    assert ran.out == as_shown(expected_answers(folders.plain, *said))
    found = summaries(ran)
    assert [(summary[1], summary[3]) for summary in found][:1] == [("12", "0")]
    # the last prompt at least; not always its answer, whose bytes may be no text and are read otherwise then
    assert [int(after[3]) >= int(before[4]) for before, after in itertools.pairwise(found)] == [True, True]
    assert len(ran.err.splitlines()) == 3


def test_a_system_message_and_settings(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", "def", args=("--system", "Be brief.", "--repetition-penalty", 1.5))
    assert ran.out == as_shown(
        expected_answers(folders.plain, "abc", "def", system="Be brief.", repetition_penalty=1.5)
    )


def test_sampling_repeats_with_a_seed(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    args = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 5)
    wanted = expected_answers(
        folders.plain, "abc", "def", do_sample=True, temperature=0.8, top_p=0.9, seed=5
    )  # the second answer is drawn by the next seed
    assert say("abc", "def", args=args).out == as_shown(wanted)
    assert say("abc", "def", args=(*args, "--policy", "linear", "--drafter", folders.drafter)).out == as_shown(wanted)
    assert say("abc", "def").out == say("abc", "def", args=("--temperature", 0)).out != as_shown(wanted)
    ran = say("abc", args=("--seed", 5))
    assert ran.code == 2
    assert is_one_error_line(ran, "--seed repeats what is drawn")


def test_without_a_prefix_cache(say: Callable[..., Ran]) -> None:
    ran = say("abc", "def", args=("--prefix-cache", 0))
    assert [found[3] for found in summaries(ran)] == ["0", "0"]
    assert ran.out == say("abc", "def").out


def test_what_is_no_question(say: Callable[..., Ran]) -> None:
    assert say().out == say("", "  ", "\t").out == ""
    ran = say("abc", b"caf\xe9\n", "def\r")
    assert ran.code == 1, "a script has to be told that a line failed"
    assert len(summaries(ran)) == 2
    assert "a line must be UTF-8 text" in ran.err
    assert say("abc", b"def").out == say("abc", "def").out, "the last line may lack its end"
    assert say(b"\xef\xbb\xbfabc\r\n").out == say("abc").out, "a byte order mark is no part of a line"
    assert "policy fixed" in say(b"\xef\xbb\xbf/policy fixed\n").err


# commands


def test_reset_begins_anew(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    [first] = expected_answers(folders.plain, "abc")
    ran = say("abc", "def", "/reset", "abc")
    assert ran.out == as_shown([*expected_answers(folders.plain, "abc", "def"), first])
    assert "a new conversation" in ran.err
    # all but the last token: the rows are still there
    assert summaries(ran)[-1][3] == str(len("<user>abc<assistant>") - 1)


def test_policy_changes_from_the_next_answer_on(say: Callable[..., Ran]) -> None:
    ran = say("abc", "/policy", "/policy autoregressive", "def", "/policy", "/policy atoregressive", "ghi")
    assert ran.code == 1
    assert [found[2] for found in summaries(ran)][1:] == ["1.00", "1.00"]
    lines = ran.err.splitlines()
    assert lines[1] == "policy phase3"
    assert lines[2] == lines[4] == "policy autoregressive"
    assert lines[5].startswith("dynatree: error: 'atoregressive' is not an installed policy")
    assert "did you mean 'autoregressive'" in lines[5]
    assert ran.out == say("abc", "def", "ghi").out, "a policy changes no answer"


def test_drafter(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", f"/drafter {folders.plain}", "/policy linear(depth=3)", "def", "/drafter promptlookup", "/drafter")
    assert summaries(ran)[1][2] == "4.00"  # the target's own drafts are all right
    assert ran.err.splitlines()[-1] == f"drafter {folders.plain}"
    assert "did you mean 'prompt_lookup'" in ran.err
    assert ran.out == say("abc", "def").out


def test_stats(say: Callable[..., Ran]) -> None:
    rows = dict(
        re.split(r" {3,}", line.strip(), maxsplit=1)
        for line in say("/stats", "abc", "def", "/stats").err.splitlines()
        if re.search(r"\w {3,}", line)
    )
    assert rows["answers"] == "2"
    assert rows["new tokens"] == "24"
    assert re.fullmatch(r"\d+, [1-9]\d* of them reused", rows["prompt tokens"])
    assert rows["context"].endswith("tokens of 20000")
    assert (rows["policy"], rows["drafter"]) == ("phase3", "prompt_lookup")


def test_help_and_quit(say: Callable[..., Ran]) -> None:
    ran = say("/help", "/quit", "abc")
    assert (ran.code, ran.out) == (0, "")
    for word in ("/help", "/reset", "/policy", "/drafter", "/stats", "/quit", "Ctrl-C", "Ctrl-D"):
        assert word in ran.err


def test_behind_a_blank_it_is_said(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    assert say(" /quit").out == as_shown(expected_answers(folders.plain, "/quit"))
    assert say("/quit now", "abc").out == ""


def test_a_command_that_is_none(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("/polcy fixed", " /polcy fixed")
    assert ran.err.startswith("dynatree: error: '/polcy' is no command (did you mean '/policy'?)")
    assert ran.out == as_shown(expected_answers(folders.plain, "/polcy fixed"))


# what cannot be done


def test_a_target_without_a_template(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", target=folders.mute)
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "has a chat template, got none", "dynatree generate")


def test_a_template_that_refuses(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", target=folders.strict, args=("--system", "x"))
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "a conversation of system, user", "roles must alternate")
    assert len(summaries(say("abc", "def", target=folders.strict))) == 2


def test_the_end_of_the_context(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    """Answers get what is left; then there is a kind word, and room again after /reset."""
    ran = say("abc", "d" * 40, "ghi", "/reset", "abc", target=folders.short, args=("--max-new-tokens", 30))
    assert ran.code == 1
    first, second, third = summaries(ran)
    assert (first[1], third[1]) == ("30", "30")
    assert 0 < int(second[1]) < 30
    assert int(second[1]) + int(second[4]) == 120
    assert "must fit the context of 120 tokens with room for an answer" in ran.err
    assert "/reset begins a new conversation" in ran.err
    alone = say("d" * 200, target=folders.short)
    assert "shorten the text" in alone.err
    assert "/reset" not in alone.err, "nothing is gained by it"


@pytest.mark.parametrize("spec", ["{}", "model(model='{}')", "model(model='{}')+prompt_lookup"])
def test_the_drafters_context_counts(conversation: Conversation, folders: SimpleNamespace, spec: str) -> None:
    obey_or_answer(conversation, f"/drafter {spec.format(folders.short)}")
    assert conversation.context_limit == 120
    with pytest.raises(ContextLimitError, match="context of 120 tokens"):
        conversation.ask("a" * 120)


@pytest.mark.parametrize("option", [("--policy", "phse3"), ("--drafter", "promptlookup")])
def test_mistakes_are_told_before_anything_is_loaded(say: Callable[..., Ran], option: tuple[str, str]) -> None:
    ran = say("abc", target="/nowhere", args=option)
    assert ran.code == 2
    assert is_one_error_line(ran, "did you mean")


def test_every_turn_of_a_traced_chat_is_a_sequence(say: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    assert say("abc", "/policy fixed", "b", args=("--trace", path)).code == 0
    first, second = read(path).sequences
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert second.prefills[0]["num_reused_tokens"] > 0
    assert (first.begin["policy"], second.begin["policy"]) == ("phase3", "fixed")
