"""What a judge is asked: the request and two answers in one prompt, the verdict in one token.

Read next: dpo/trees.py, which turns it into branches.
"""

from dpo.rows import Message

LABELS = ("A", "B")
SYSTEM = "You compare two answers to a request. Reply with the letter of the better answer, A or B."
BLIND_SYSTEM = "You compare two answers. Reply with the letter of the better answer, A or B."


def request_text(prompt: tuple[Message, ...]) -> str:
    """The request as the judge reads it: the text itself, or the whole dialogue with its speakers named."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def judge_messages(prompt: tuple[Message, ...], answer_a: str, answer_b: str, *, sighted: bool) -> tuple[Message, ...]:
    """The judge's messages for one order of the answers; a blind judge is not shown the request."""
    answers = f"Answer A: {answer_a}\n\nAnswer B: {answer_b}\n\nBetter answer:"
    if not sighted:
        return ({"role": "system", "content": BLIND_SYSTEM}, {"role": "user", "content": answers})
    request = f"Request: {request_text(prompt)}\n\n{answers}"
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": request})
