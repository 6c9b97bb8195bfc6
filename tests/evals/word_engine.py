"""An engine that answers `Say WORD.` with the word, for tests of what two engines say otherwise."""

from llmkit.runtime.dummy import DummyEngine


def engine(wrong=(), seed=0):
    "An engine that is right but for some words."

    def reply(text):
        word = text.partition("Say ")[2].partition(".")[0]
        return f"{'hm' if word in wrong else word}: done"

    return DummyEngine(replies=reply, seed=seed)
