"""Conversations that are played: each turn of the user is a prompt, behind the target's answers to those before."""

from __future__ import annotations

from dynatree_bench.data.workloads import EncodedPrompt, Workload, is_wrapped
from dynatree_core import LoadedModel, generate
from dynatree_core.text.prompt import encode_messages, tokenizer_of
from dynatree_core.text.stream import decode_text


def played(
    workload: Workload, loaded: LoadedModel, max_new_tokens: int, is_chat: bool | None = None
) -> list[EncodedPrompt]:
    """All turns of a workload's conversations in the target's tokens.

    The answers between are generated here, greedily, before anything is measured. So they are the same for every
    method, and for a run that goes on.

    Args:
        workload: the conversations.
        loaded: the target, with its tokenizer.
        max_new_tokens: of an answer.
        is_chat: as for `encode`.

    Raises:
        InputError: as `encode`, or a conversation that the target has no room for.
    """
    is_chat = is_wrapped(workload, loaded, is_chat)
    tokenizer = tokenizer_of(loaded)
    prompts = []
    for prompt in workload.prompts:
        messages = prompt.messages
        for turn, later in enumerate((*prompt.later, None), start=1):
            prompt_ids = encode_messages(messages, tokenizer, is_chat)
            name = prompt.prompt_id if turn == 1 else f"{prompt.prompt_id}/turn-{turn}"
            prompts.append(EncodedPrompt(name, prompt.category, tuple(prompt_ids), workload.name))
            if later is not None:
                answer = generate(loaded.model, "prompt_lookup", prompt_ids, max_new_tokens=max_new_tokens)
                said = {"role": "assistant", "content": decode_text(tokenizer, answer.token_ids)}
                messages = [*messages, said, {"role": "user", "content": later}]
    return prompts
