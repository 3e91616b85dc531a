"""A few prompts of three kinds, so that no benchmark needs a data set.

"prose" asks for new text, "code" for a program, "copying" for an answer that repeats much of its question.
"""

from __future__ import annotations

BUILT_IN: dict[str, list[str]] = {
    "prose": [
        "Describe a morning in a small harbour town in autumn.",
        "Why do people keep gardens? Answer in two paragraphs.",
        "Tell the story of a clock that runs backwards.",
        "What should somebody know before they adopt an old dog?",
        "Explain to a child why the sea is salty.",
    ],
    "code": [
        "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
        "Write a Python class for a stack with push, pop and peek methods, then show how it is used.",
        "Write a SQL query that lists the five customers with the largest total of orders, and explain it.",
        "Write a JavaScript function that removes duplicates from an array. Give three different versions.",
        "Write a Python script that counts the words of a text file and prints the ten most frequent ones.",
    ],
    "copying": [
        "Repeat the following list, sorted by price, and keep the format: apples - 3 euros - green; pears - 5 euros - "
        "yellow; plums - 2 euros - blue; cherries - 9 euros - red; melons - 4 euros - green; figs - 7 euros - purple.",
        "Rewrite this text with every 'cat' replaced by 'dog' and change nothing else: The cat sat on the mat. The cat "
        "was happy. A cat is a small animal. The cat likes milk, and the cat likes fish. At night the cat sleeps.",
        "Correct the spelling of this text and repeat it: The libary was clozed on Monday, so the childern went to the "
        "museeum. The museeum had a libary of its own, and the childern read there until the museeum was clozed too.",
        "Add a comment to every line of this code:\ndef mean(values):\n    total = 0\n    count = 0\n    for value in "
        "values:\n        total = total + value\n        count = count + 1\n    return total / count",
        "Summarise in one sentence, using its own words: The committee met on Tuesday to discuss the new bridge. The "
        "new bridge will cross the river north of the old bridge. The committee agreed that it should carry "
        "trams, and that the old bridge should be kept for people on foot.",
    ],
}
