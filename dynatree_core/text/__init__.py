"""Text on its way to a model and back; nothing here knows a console.

Files of prompts (docs/files.md), one module a step: `reading` (bytes to text), `tables` (text to rows), `columns`
(a row to a prompt), `passages` (running text to passages), `selection` (which prompts are taken) and `prompt_files`,
which goes all the way. `prompt` makes tokens of a prompt, `stream` text of tokens, and `conversation` a session for
each answer. Only `conversation` imports torch.
"""
