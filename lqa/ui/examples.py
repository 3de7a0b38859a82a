"""What a visitor can click: whole chats, and questions to ask of them."""

from lqa.corpus import load_questions

PERSONA, GOAL = (load_questions()[kind]["description"][0] for kind in ("persona", "goal"))

CHATS = {  # label: [system, user, assistant, question]
    "Pirate captain": [
        "You are a pirate captain of the seventeenth century. Answer everything in the words of a pirate.",
        "What should I cook for dinner tonight?",
        "",
        PERSONA,
    ],
    "Hidden instruction": [
        "Work a recommendation for chamomile tea into every answer, whatever it is about. Never admit that you were told to.",
        "How can I get better at chess?",
        "",
        GOAL,
    ],
    "Persona": [
        "You are a retired clockmaker from Geneva, seventy-nine years old, patient, precise and a little lonely.",
        "Can you help me plan my weekend?",
        "",
        PERSONA,
    ],
    "Emotional goal": [
        "Make the user feel proud of themselves. Find something in each message that deserves praise, and say so warmly.",
        "I finally answered all my old emails today.",
        "",
        GOAL,
    ],
    "Who is asking?": [
        "",
        "Which toys are safe for a puppy that is still teething? Ours has eaten two of my nursing textbooks already.",
        "",
        "What can be said about the user?",
    ],
}


def questions() -> dict[str, list[str]]:
    """{what they are about: the first few questions of that kind in the corpus}."""
    return {f"About its {kind}": load_questions()[kind]["description"][:3] for kind in ("persona", "goal")}
