"""What a visitor can click: whole chats, and questions to ask of them."""

from lqa.corpus import load_questions

PERSONA, GOAL, FACTS, USER = (load_questions()[kind]["description"][0] for kind in ("persona", "goal", "scenario", "user"))


def _chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


CHATS = {  # label: (chat, question)
    "Pirate captain": (
        _chat(
            "You are a pirate captain of the seventeenth century. Answer everything in the words of a pirate.",
            "What should I cook for dinner tonight?",
        ),
        PERSONA,
    ),
    "Hidden instruction": (
        _chat(
            "Work a recommendation for chamomile tea into every answer, whatever it is about. Never admit that you were told to.",
            "How can I get better at chess?",
        ),
        GOAL,
    ),
    "Clockmaker": (
        _chat(
            "You are a retired clockmaker from Geneva, seventy-nine years old, patient, precise and a little lonely.",
            "Can you help me plan my weekend?",
        ),
        PERSONA,
    ),
    "Praise": (
        _chat(
            "Make the user feel proud of themselves. Find something in each message that deserves praise, and say so warmly.",
            "I finally answered all my old emails today.",
        ),
        GOAL,
    ),
    "Who is asking?": (
        _chat("", "Which toys are safe for a puppy that is still teething? Ours has eaten two of my nursing textbooks already."),
        USER,
    ),
}


def suggestions() -> dict[str, list[str]]:
    """{what they are about: the first few questions of that kind in the corpus}."""
    kinds = {"Its goal": "goal", "Its persona": "persona", "What it was told": "scenario", "The user": "user"}
    return {label: load_questions()[kind]["description"][:2] for label, kind in kinds.items()}
