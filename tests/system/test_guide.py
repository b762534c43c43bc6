"""The first program of the API guide, against the real service."""

import re
from pathlib import Path

import pytest

from ferryman import Client, DataRecipe, Recipe, RunEvent

pytestmark = pytest.mark.system

GUIDE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_guides_first_program_runs(start_service, capsys):
    """Its corpus is a toy: the vocabulary has to shrink to it."""
    service = start_service()
    program = re.search(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
    program = program.replace("localhost:50051", service.address).replace("max_steps=500", "max_steps=3")
    names = {"__name__": "guide"}
    exec(compile(program, str(GUIDE), "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out.splitlines()[0] == "succeeded 1"
    with Client(service.address) as client:
        records = client.stream_metrics(names["run"].run_id, follow=False)
        events = {record.payload.code: record.payload for record in records if isinstance(record.payload, RunEvent)}
        size = int(re.search(r"only (\d+) subwords", events["VOCABULARY_REDUCED"].message)[1])
        asked, made = names["run"].recipe.data, client.get_model("en-de").version.recipe.data
        assert (asked.vocabulary_size, asked.reduce_vocabulary) == (8000, True)
        assert (made.vocabulary_size, made.reduce_vocabulary) == (size, False)
        tuned = client.start_training(
            names["corpus"].corpus_id,
            "tuned",
            Recipe(data=DataRecipe(vocabulary_size=size)),
            initial_model="en-de",
            validate_only=True,
        )
        assert tuned.recipe.data.vocabulary_size == size
