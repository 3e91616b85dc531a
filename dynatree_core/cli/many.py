"""`dynatree generate` for many prompts at once: conversations that go through one engine, and what becomes of each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.cli import console
from dynatree_core.cli.answers import Answers
from dynatree_core.cli.exits import DONE, FAILED
from dynatree_core.cli.questions import Question, asked, num_asked
from dynatree_core.errors import DynaTreeError, InputError
from dynatree_core.text.columns import Prompt
from dynatree_core.text.prompt_files import Prompts

if TYPE_CHECKING:
    from dynatree_core.cli.setup import Setup
    from dynatree_core.engine.handle import Handle

__all__ = ["ManyAnswers"]


@attrs.define(eq=False)
class _Talk:
    """A prompt with its later turns. One of its questions is asked at a time."""

    index: int  # of the prompt in its file
    prompt: Prompt
    questions: Iterator[Question]
    question: Question | None = None  # that is being answered


@attrs.define(eq=False)
class ManyAnswers:
    """The answers to many prompts, `batch_size` at once.

    What fails ends its own conversation; its line has the error. Nothing that was answered is lost by an interrupt.
    """

    setup: Setup
    prompts: Prompts
    answers: Answers
    batch_size: int
    is_chat: bool | None
    is_played: bool
    num_found: int = attrs.field(default=0, init=False)  # questions whose answer was there
    num_done: int = attrs.field(default=0, init=False)  # questions that were answered in this run
    num_failed: int = attrs.field(default=0, init=False)
    num_tokens: int = attrs.field(default=0, init=False)  # of the done ones
    seconds: float = attrs.field(default=0.0, init=False)
    _running: dict[Handle, _Talk] = attrs.field(factory=dict, init=False)
    _has_asked: bool = attrs.field(default=False, init=False)

    def run(self) -> int:
        """Ask every question whose answer is not there yet.

        Returns:
            The exit status.

        Raises:
            InputError: the very first question cannot be asked as the settings are.
            KeyboardInterrupt: what was done is written.
        """
        from dynatree_core.engine.engine import ENGINE_OPTIONS, Engine

        assert self.setup.target is not None, "loaded before there is a question"
        options = {"policy": self.setup.policy, **self.setup.options}
        of_engine = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
        engine = Engine(self.setup.target.model, self.setup.drafter, max_sequences=self.batch_size, **of_engine)
        begin = time.monotonic()
        num_questions = num_asked(self.prompts, self.is_played)
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.answers.opened())
            self.num_found = sum(self.answers.find(place) is not None for place in self._places())
            show = opened.enter_context(console.answers_bar(num_questions, self.num_found))
            try:
                talks = self._talks()
                while True:
                    while len(self._running) < self.batch_size and (talk := next(talks, None)) is not None:
                        self._ask(engine, talk, options)
                    if not self._running:
                        break
                    engine.step()
                    for talk in self._collect():
                        self._ask(engine, talk, options)
                    self.seconds = time.monotonic() - begin
                    running = sum(handle.num_tokens for handle in self._running)
                    show(self.num_done + self.num_failed, (self.num_tokens + running) / self.seconds)
            except KeyboardInterrupt:
                self._collect()  # it may have come just when something was done
                raise
        return FAILED if self.num_failed else DONE

    def _places(self) -> Iterator[tuple[int, int]]:
        """Index and turn of each question."""
        for index, prompt in zip(self.prompts.places, self.prompts.prompts, strict=True):
            num_turns = 1 + (len(prompt.later) if self.is_played else 0)
            yield from ((index, turn) for turn in range(1, num_turns + 1))

    def _talks(self) -> Iterator[_Talk]:
        tokenizer = self.setup.tokenizer
        assert tokenizer is not None, "loaded before there is a question"
        for index, prompt in zip(self.prompts.places, self.prompts.prompts, strict=True):
            one = attrs.evolve(self.prompts, prompts=(prompt,), places=(index,))
            yield _Talk(index, prompt, asked(one, tokenizer, self.is_chat, self.is_played))

    def _ask(self, engine: Any, talk: _Talk, options: dict[str, Any]) -> None:
        """Submit a conversation's next question whose answer is not there."""
        for question in talk.questions:
            talk.question = question
            found = self.answers.find((talk.index, question.about["turn"]))
            if found is not None:
                question.answered(found["token_ids"])
                continue
            try:
                handle = engine.submit(question.prompt_ids, **options)
            except InputError as error:
                if not self._has_asked and not self.num_found:  # most likely the settings' fault, and so everybody's
                    raise InputError(f"{question.where}: {error}") from error
                self._write(talk, None, error)
                return
            self._has_asked = True
            self._running[handle] = talk
            return

    def _collect(self) -> list[_Talk]:
        """Write what is done, and give the conversations that go on."""
        talks = []
        for handle in [handle for handle in self._running if handle.is_done]:
            with console.interrupts_wait():  # so that it is written, and once
                talk = self._running.pop(handle)
                self._write(talk, handle, handle.error)
            if handle.error is None:
                talks.append(talk)
        return talks

    def _write(self, talk: _Talk, handle: Handle | None, error: BaseException | None) -> None:
        """A line for a question that was answered, or that failed."""
        from dynatree_core.cli.generate_report import Comparison, document

        question = talk.question
        assert question is not None, "a question was asked"
        turn = question.about["turn"]
        compared = Comparison(handle.partial) if handle is not None else None
        reason = "error" if error is not None else "interrupted"
        record = {
            "index": talk.index,
            **question.about,
            **document(self.setup, handle.request if handle is not None else None, compared, reason),
            "error": None if error is None else console.fold(_told(error)),
            "request": self.answers.fingerprints.of_question(talk.prompt, turn),
        }
        self.answers.add((talk.index, turn), record)
        if error is None:
            self.num_done += 1
            self.num_tokens += len(record["token_ids"])
            question.answered(record["token_ids"])
        else:
            self.num_failed += 1
            console.complain("warning", f"{question.where or talk.prompt.prompt_id}: {_told(error)}")

    def summary(self) -> dict[str, Any]:
        """What `--json` prints beside a file of answers."""
        return {
            "out": str(self.answers.path),
            "num_answered": self.num_done,
            "num_found": self.num_found,
            "num_failed": self.num_failed,
            "num_new_tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.num_tokens / self.seconds if self.seconds else None,
        }

    def told(self) -> str:
        """The same in a sentence."""
        found = self.summary()
        parts = [f"{self.num_done:,} answered"]
        if self.num_found:
            parts.append(f"{self.num_found:,} were there")
        if self.num_failed:
            parts.append(f"{self.num_failed:,} failed")
        speed = f", {found['tokens_per_second']:.1f} tokens/s" if found["tokens_per_second"] else ""
        return f"{', '.join(parts)}; {self.num_tokens:,} tokens in {self.seconds:.1f} s{speed}; {found['out']}"


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, DynaTreeError) else f"{type(error).__name__}: {error}"
