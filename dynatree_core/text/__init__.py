"""Files of prompts and of text, read for every command alike (docs/files.md).

One file for each step: `reading` (bytes to text), `tables` (text to rows), `columns` (a row to a prompt), `passages`
(running text to passages), `selection` (which prompts are taken) and `prompt_files`, which goes all the way. Nothing
here imports torch.
"""
