"""Translating many sentences."""

from examples.translating import translate_all
from ferryman import Client
from ferryman.testing import FakeFerryman


def test_sentences_are_translated_in_batches_in_order():
    sentences = [f"sentence {number}" for number in range(250)]
    with FakeFerryman() as fake, Client(fake.target) as client:
        fake.add_model("letters")
        assert translate_all(client, "letters/1", sentences) == [sentence.upper() for sentence in sentences]
        assert fake.calls.count("Translate") == 3
