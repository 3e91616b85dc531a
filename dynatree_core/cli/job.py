"""`dynatree generate` at work: the answer to each question."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import click

from dynatree_core.cli import console
from dynatree_core.cli.exits import DONE, FAILED
from dynatree_core.cli.setup import Setup
from dynatree_core.errors import InputError

if TYPE_CHECKING:
    from dynatree_core.cli.questions import Question
    from dynatree_core.cli.screen import Answer
    from dynatree_core.engine.session import Session

__all__ = ["Job"]

WARM_UP_TOKENS = 8


@attrs.define(eq=False)
class Job:
    """The answer to one question, and how far it has come. It can be concluded at any time."""

    setup: Setup
    question: Question | None = None  # None before there is one
    session: Session | None = attrs.field(default=None, init=False)
    baseline: Session | None = attrs.field(default=None, init=False)  # the same prompt without drafting
    screen: Answer | None = attrs.field(default=None, init=False)
    bar: console.PrefillBar = attrs.field(factory=console.PrefillBar, init=False)

    def open(self) -> None:
        """Open a session on the question's prompt.

        Raises:
            InputError: naming the prompt's place in its file, if it has one.
        """
        from dynatree_core.engine.session import Session

        setup, question = self.setup, self.question
        assert setup.target is not None, "loaded before there is a question"
        assert question is not None, "open() is for a question"
        try:
            self.session = Session(
                setup.target.model,
                setup.drafter,
                question.prompt_ids,
                policy=setup.policy,
                on_prefill=self.bar,
                observer=setup.recorded.observer(),
                **setup.options,
            )
        except InputError as error:
            if question.where is None:
                raise
            raise InputError(f"{question.where}: {error}") from error

    def warm_up(self) -> None:
        """Decode a few tokens that nobody sees.

        A process's first passes page the weights in and set up threads and kernels; that was seen to slow them
        down fourfold, and would count against whichever of two runs comes first.
        """
        options = self.setup.options
        limits = {**options, "max_new_tokens": min(WARM_UP_TOKENS, options["max_new_tokens"])}
        with console.spinner("warming up, to compare"):
            _finish(self._plain_session(limits))

    def answer(self) -> None:
        """Decode to the end, on the screen unless a JSON document is wanted."""
        from dynatree_core.cli.screen import Answer
        from dynatree_core.generation import run

        assert self.session is not None, "open() comes first"
        assert self.question is not None, "open() is for a question"
        assert self.setup.tokenizer is not None, "loaded before there is a question"
        if self.setup.is_json:
            with self.bar:
                _finish(self.session)
        else:
            if self.question.title is not None:
                click.secho(self.question.title, err=True, dim=True)
            self.screen = Answer(self.setup.tokenizer)
            try:
                with self.bar:
                    for report in run(self.session):
                        if not self.setup.recorded.shows_trees:  # which come between; then the answer follows them
                            self.screen.show(report.token_ids, num_accepted=report.num_accepted)
            finally:  # an error or an interrupt may come between commit and report
                self.screen.finish(self.session.new_token_ids)
        self.question.answered(self.session.new_token_ids)

    def answer_without_drafting(self) -> None:
        """Decode the same prompt with the same runner, one token a step."""
        self.baseline = self._plain_session(self.setup.options)
        with console.spinner("decoding again without drafting, to compare"):
            _finish(self.baseline)

    def _plain_session(self, options: dict[str, Any]) -> Session:
        from dynatree_core.engine.session import Session

        assert self.session is not None, "open() comes first"
        assert self.setup.target is not None, "loaded before there is a question"
        return Session(self.setup.target.model, None, self.session.prompt_ids, policy="autoregressive", **options)

    def conclude(self, stop_reason: str = "interrupted") -> int:
        """Print what there is.

        Args:
            stop_reason: why it ended, where the tokens do not say so.

        Returns:
            The exit code, as far as a comparison decides it.
        """
        from dynatree_core.cli.generate_report import Comparison, document, show_report

        compared = None
        if self.session is not None:
            baseline = self.baseline.result(stop_reason) if self.baseline is not None else None
            compared = Comparison(self.session.result(stop_reason), baseline)
        is_different = compared is not None and compared.is_identical is False
        target = self.setup.target
        if is_different and target is not None and target.model.dtype.itemsize == 2:
            console.complain(
                "note", "half precision rounds; `dynatree audit` tells whether that explains the difference"
            )
        if self.setup.is_json:
            about = self.question.about if self.question is not None else {}
            click.echo(json.dumps(about | document(self.setup, self.session, compared, stop_reason)))
        elif self.screen is not None and compared is not None and not compared.is_empty:
            set_up = target.rounded if target is not None else None
            show_report(compared, has_legend=self.screen.is_coloured, set_up=set_up)
        return FAILED if is_different else DONE


def _finish(session: Session) -> None:
    from dynatree_core.generation import run

    for _ in run(session):
        pass
